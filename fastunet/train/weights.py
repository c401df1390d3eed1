"""Weights that a training begins with."""

from __future__ import annotations

from pathlib import Path

from fastunet.checks import ConfigError
from fastunet.train.checks import run_files
from fastunet.unet import UNet

HEAD = "outc."


def check_initial(source: str, out: Path) -> None:
    """Refuse, before the images are read, weights that cannot be, or that the new run in `out` would remove.

    Raises:
        DataError: weights that cannot be read.
        ConfigError: of the run that is overwritten.
    """
    path, removed = Path(source).resolve(), [file.resolve() for file in run_files(out)]
    if (removed and path == out.resolve()) or any(map(path.is_relative_to, removed)):
        raise ConfigError(
            f"init: expected weights of another run than {out}, which begins anew, got {source}: give it another folder"
        )
    UNet.from_pretrained(source)


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
