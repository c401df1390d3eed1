"""3x3 convolution, bias and ReLU; with pooling, on two inputs, twice."""

from __future__ import annotations

from collections.abc import Callable

from .suite import Options, Work
from .suite_ops import op_works

OPS = ("conv3x3_bias_relu", "conv3x3_bias_relu_pool", "concat_conv3x3_bias_relu", "double_conv3x3_bias_relu")


def works(options: Options) -> list[Work]:
    return op_works(OPS, options)


def test_conv3x3(work: Work, timed: Callable[[Work], None]) -> None:
    timed(work)
