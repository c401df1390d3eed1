"""Short trainings, and ways to stop them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastunet.checks import Interrupted
from fastunet.train.loop import Progress, TrainConfig, train

TINY = TrainConfig(steps=10, features=(4, 8), crop=32, batch_size=2, val_fraction=0.25, tta=False, precision="fp32")
DEEP = replace(TINY, features=(4, 4, 8, 8, 8), deep_supervision=True, device="cpu")


class Killed(BaseException):
    """As if the process ended there: nothing catches it."""


def killed(*args: Any, **options: Any) -> None:
    raise Killed


def stop_at(step: int, how: Callable[[], None]) -> Callable[[Progress], None]:
    return lambda progress: how() if progress.step == step else None


def losses_of(data: Path | None, out: Path, config: TrainConfig | None, **options: Any) -> dict[int, float]:
    """The loss of each step of a training, however it ends."""
    losses: dict[int, float] = {}
    stop = options.pop("stop", lambda progress: None)

    def note(progress: Progress) -> None:
        losses[progress.step] = progress.loss
        stop(progress)

    with suppress(Killed, Interrupted):
        train(data, out, config, on_step=note, **options)
    return losses
