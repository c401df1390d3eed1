"""2x2 transposed convolution, alone and with the convolution after it."""

from __future__ import annotations

from collections.abc import Callable

from .suite import Options, Work
from .suite_ops import op_works

OPS = ("conv_transpose2x2", "conv_transpose2x2_concat_conv3x3_relu")


def works(options: Options) -> list[Work]:
    return op_works(OPS, options)


def test_conv_transpose2x2(work: Work, timed: Callable[[Work], None]) -> None:
    timed(work)
