"""Weights that a training begins with."""

from __future__ import annotations

from fastunet.checks import ConfigError
from fastunet.unet import UNet

HEAD = "outc."


def load_initial(model: UNet, source: str) -> None:
    """Give a model the weights of another: of a run, or what else `UNet.from_pretrained` reads.

    For other classes the head keeps its own.

    Raises:
        DataError: weights that cannot be read.
        ConfigError: of another architecture.
    """
    other = UNet.from_pretrained(source)
    for name in ("dims", "in_channels", "features", "norm", "upsample"):
        kept, new = other.config[name], model.config[name]
        if kept != new:
            raise ConfigError(f"init: expected weights of {name} {new}, got {kept} in {source}")
    weights = other.state_dict()
    if other.config["out_channels"] != model.config["out_channels"]:
        weights |= {key: value for key, value in model.state_dict().items() if key.startswith(HEAD)}
    model.load_state_dict(weights)
