"""What takes longer than a comparison: a run without a break."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

from fastunet.measuring.timing import Clock, Quantiles

# Samples of a burst: too few to heat anything.
_BURST = 10


def burst_and_steady(
    run: Callable[[], Any],
    clock: Clock,
    *,
    seconds: float,
    warmup: int = 3,
    now: Callable[[], float] = time.perf_counter,
    pause: Callable[[float], None] = time.sleep,
) -> tuple[Quantiles, Quantiles]:
    """The first samples after a second of rest, and the last half of the samples of `seconds` without a break.

    A GPU begins at its highest clock and lowers it when its power limit is reached.
    """
    for _ in range(warmup):
        run()
    clock.wait()
    pause(1.0)
    end, samples = now() + seconds, list[float]()
    while not samples or now() < end:
        # Back to back: the end of a sample is the beginning of the next.
        marks = [clock.mark()]
        for _ in range(_BURST):
            run()
            marks.append(clock.mark())
        clock.wait()
        samples += [clock.elapsed(begin, finish) for begin, finish in itertools.pairwise(marks)]
    return Quantiles.of(samples[:_BURST]), Quantiles.of(samples[len(samples) // 2 :])
