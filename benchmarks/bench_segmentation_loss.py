"""The sums over pixels that losses are made of, and the Dice loss."""

from __future__ import annotations

from collections.abc import Callable

from .suite import Options, Work
from .suite_ops import op_works

OPS = ("segmentation_sums", "sigmoid_dice_loss")


def works(options: Options) -> list[Work]:
    return op_works(OPS, options)


def test_segmentation_loss(work: Work, timed: Callable[[Work], None]) -> None:
    timed(work)
