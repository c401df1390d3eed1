"""2x2 max-pooling."""

from __future__ import annotations

from collections.abc import Callable

from .suite import Options, Work
from .suite_ops import op_works

OPS = ("max_pool2x2",)


def works(options: Options) -> list[Work]:
    return op_works(OPS, options)


def test_max_pool2x2(work: Work, timed: Callable[[Work], None]) -> None:
    timed(work)
