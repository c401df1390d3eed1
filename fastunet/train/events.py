"""The history of a run for TensorBoard, which looks for event files in RUN."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastunet.checks import MissingPackageError

EVENTS = "events.out.tfevents."  # how the names of event files begin


def check_tensorboard() -> None:
    """Raise MissingPackageError without TensorBoard."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        text = "tensorboard: expected the package, got none: pip install 'fastunet[tensorboard]'"
        raise MissingPackageError(text) from error


def write_events(out: Path, row: Mapping[str, float], rate: float) -> None:
    """Write a row of the history, and the learning rate, as an event file of its own.

    What a run that was stopped had written of this step, and later ones, gives way to it.
    """
    from torch.utils.tensorboard import SummaryWriter

    step = int(row["step"])
    with SummaryWriter(str(out), purge_step=step) as writer:
        for name, value in (*row.items(), ("learning_rate", rate)):
            if name != "step":
                writer.add_scalar(name.replace(" ", "/"), value, step)
