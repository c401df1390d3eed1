"""3x3 convolution, norm and ReLU: batch norm in training and inference, instance norm; with pooling, on two inputs."""

from __future__ import annotations

from collections.abc import Callable

from .suite import Options, Work
from .suite_ops import op_works

FORMS = (("", ""), ("", "_pool"), ("concat_", ""))
OPS = (*(f"{form}conv3x3_{norm}_norm_relu{pool}" for norm in ("batch", "instance") for form, pool in FORMS),)


def works(options: Options) -> list[Work]:
    return op_works(OPS, options)


def test_conv3x3_norm(work: Work, timed: Callable[[Work], None]) -> None:
    timed(work)
