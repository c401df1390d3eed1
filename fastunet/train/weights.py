"""Weights that a training begins with."""

from __future__ import annotations

from pathlib import Path

from fastunet.checks import ConfigError
from fastunet.train.checks import run_files
from fastunet.unet import UNet

HEAD = "outc."


def features_of_initial(source: str, out: Path) -> tuple[int, ...]:
    """Return the features of the weights that a new run in `out` begins with, before its images are read.

    Raises:
        DataError: weights that cannot be read.
        ConfigError: of the run that this one replaces.
    """
    path, removed = Path(source).resolve(), [file.resolve() for file in run_files(out)]
    if (removed and path == out.resolve()) or any(map(path.is_relative_to, removed)):
        raise ConfigError(
            f"init: expected weights of another run than {out}, which begins anew, got {source}: give it another folder"
        )
    return tuple(UNet.from_pretrained(source).config["features"])


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
