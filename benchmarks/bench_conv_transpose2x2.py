"""2x2 transposed convolution."""

from __future__ import annotations

from collections.abc import Callable

from .suite import Options, Work
from .suite_ops import op_works

OPS = ("conv_transpose2x2",)


def works(options: Options) -> list[Work]:
    return op_works(OPS, options)


def test_conv_transpose2x2(work: Work, timed: Callable[[Work], None]) -> None:
    timed(work)
