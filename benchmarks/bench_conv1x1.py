"""The 1x1 head: by itself, and in the last convolution."""

from __future__ import annotations

from collections.abc import Callable

from .suite import Options, Work
from .suite_ops import op_works

OPS = ("conv1x1", "conv3x3_relu_conv1x1")


def works(options: Options) -> list[Work]:
    return op_works(OPS, options)


def test_conv1x1(work: Work, timed: Callable[[Work], None]) -> None:
    timed(work)
