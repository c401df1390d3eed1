"""`pytest benchmarks/ --benchmark-only [--benchmark-json=FILE]`: every op, ours and torch's, by pytest-benchmark.

On CUDA the timer waits for the GPU on both sides of a round, and a round is as many calls as take ten milliseconds:
they are queued back to back, so that launches hide behind kernels as they do in use, and one wait is shared by all.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import pytest
import torch

from fastunet.measuring.timing import cudnn_benchmark

from .harness.environment import environment
from .ops import Work, works
from .providers import Provider

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORKS = [(work, provider) for work in works(DEVICE) for provider in work.providers(DEVICE)]
# Seconds that a round and all rounds of one benchmark are to take.
_ROUND, _TOTAL = 0.01, 0.25


def _timer() -> float:
    """Seconds, when all work that was queued is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.mark.benchmark(timer=_timer)
@pytest.mark.parametrize(("work", "provider"), WORKS, ids=lambda each: getattr(each, "group", "") or each.name)
def test_op(benchmark: Any, work: Work, provider: Provider) -> None:
    if provider.unavailable:
        pytest.skip(provider.unavailable)
    with cudnn_benchmark():
        runs = provider.prepare()
        for run in runs:
            run()
        begin = _timer()
        runs[0]()
        seconds = _timer() - begin
        calls, turns = max(1, math.ceil(_ROUND / seconds)), itertools.cycle(runs)
        benchmark.group = work.group
        benchmark.extra_info.update(
            op=work.case.op,
            shapes={name: list(shape) for name, shape in work.case.shapes.items()},
            direction=work.direction,
            dtype=str(work.dtype),
            implementation=provider.name,
            device=environment(DEVICE.type)["device"],
            commit=environment("cpu")["commit"],
        )
        rounds = max(3, min(50, int(_TOTAL / (seconds * calls))))
        benchmark.pedantic(lambda: next(turns)(), rounds=rounds, iterations=calls, warmup_rounds=1)
