"""The history of a run for TensorBoard, which looks for event files in RUN."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

EVENTS = "events.out.tfevents."  # how the names of event files begin


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
