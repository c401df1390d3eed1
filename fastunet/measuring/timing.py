"""Timing A against B: in turn, in one run, on inputs that no cache still holds; medians with the spread beside them.

On CUDA a sample is what the GPU takes: the calls of a sample are queued behind a short wait, so that the GPU never
waits for Python, and events mark begin and end. A net whose launches take longer than its kernels is timed as it runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastunet.torch_private import sleep_on_gpu

# Clock cycles of the wait before each sample: about half a millisecond, in which Python queues some ten launches.
_HEAD_START = 1_000_000
# Caches are passed twice over, with no more sets of inputs than this.
_MOST_SETS = 8
# Bytes of cache of a device that does not tell: more than the last level of most CPUs.
_UNKNOWN_CACHE = 64 << 20


class Clock:
    """Marks moments on a device's own time line, here a CPU's: `prepare` before each sample, `mark` at its begin and
    end, `wait` until every mark has passed, then the seconds `elapsed` between two. rest: seconds before each sample.
    """

    def __init__(self, rest: float = 0.0) -> None:
        self.rest = rest

    def prepare(self) -> None:
        if self.rest:
            time.sleep(self.rest)

    def mark(self) -> Any:
        return time.perf_counter()

    def wait(self) -> None: ...

    def elapsed(self, begin: Any, end: Any) -> float:
        return end - begin


class CudaClock(Clock):
    """Events on the current stream."""

    def prepare(self) -> None:
        sleep_on_gpu(_HEAD_START)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        torch.cuda.synchronize()

    def elapsed(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1000


def clock_of(device: torch.device, rest: float = 0.0) -> Clock:
    """The clock for work on that device; rest: seconds before each sample on a CPU."""
    return CudaClock() if device.type == "cuda" else Clock(rest)


@contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """Within the block cuDNN tries its algorithms. Not beyond it: it would do so for float64 references as well."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@dataclass(frozen=True)
class Quantiles:
    """Seconds, or ratios: median, 10th and 90th percentile, and the number of samples they are of."""

    median: float
    p10: float
    p90: float
    samples: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Quantiles:
        """Of at least one sample, interpolated between neighbours."""
        p10, median, p90 = map(float, np.quantile(seconds, (0.1, 0.5, 0.9)))
        return cls(median, p10, p90, len(seconds))


def interleaved_samples(
    runs: Mapping[str, Sequence[Callable[[], Any]]],
    clock: Clock,
    *,
    rounds: int,
    warmup: int = 3,
    seconds: float = math.inf,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run, timed once a round, in turn, every other round in the opposite order.

    runs: by name, the same work on one set of inputs after the other; round r takes set r. The warm-up rounds before
    the first sample compile, choose algorithms and fill the allocator. After `seconds`, by `now`, no further round
    begins, but one always runs.
    """
    end = now() + seconds
    names = list(runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warmup):
        for name in names:
            runs[name][i % len(runs[name])]()
    clock.wait()
    for i in range(rounds):
        if i and now() >= end:
            break
        marks = []
        for name in names if i % 2 == 0 else reversed(names):
            clock.prepare()
            begin = clock.mark()
            runs[name][i % len(runs[name])]()
            marks.append((name, begin, clock.mark()))
        # A round is short beside what is queued in it: waiting here costs nothing and keeps `seconds`.
        clock.wait()
        for name, begin, finish in marks:
            samples[name].append(clock.elapsed(begin, finish))
    return samples


def ratio(samples: Mapping[str, Sequence[float]], over: str, under: str) -> Quantiles:
    """Of the rounds' ratios of two runs: what slows a round slows both, and cancels out."""
    return Quantiles.of([a / b for a, b in zip(samples[over], samples[under], strict=True)])


def sets_past_cache(inputs: Sequence[Tensor], device: torch.device) -> int:
    """Return how many copies of the inputs to take in turn, so that each has left the cache before its next turn."""
    cache = _UNKNOWN_CACHE
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    total = sum(t.numel() * t.element_size() for t in inputs)
    return max(1, min(_MOST_SETS, math.ceil(2 * cache / max(1, total)) + 1))
