"""Weights that a training begins with, and their moving average."""

from __future__ import annotations

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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


def features_of(source: str) -> tuple[int, ...]:
    """Return the channels of each level of the net that weights are of. Raises DataError where they cannot be read."""
    return tuple(UNet.from_pretrained(source).config["features"])


def moving_average(model: UNet, decay: float) -> AveragedModel:
    """Return the exponential moving average of a model's weights and running statistics; it begins with the first."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
