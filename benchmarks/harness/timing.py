"""What takes longer than a comparison: a run without a break, and a run timed by another timer too."""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastunet.measuring.timing import Clock, Quantiles, interleaved_samples

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


def second_clock(
    run: Callable[[], Any],
    clock: Clock,
    *,
    rounds: int = 30,
    stream: Callable[[], int] = lambda: torch.cuda.current_stream().cuda_stream,
) -> dict[str, Any]:
    """Time a run by another timer too, CuPy's profiler: medians "event_ms", "cupy_ms" and their "ratio", CuPy's on top.

    CuPy waits for the GPU before each sample, so that a launch is part of its time, and not of ours: the ratio is 1 for
    a run of milliseconds, and larger the shorter the run. Without CuPy: "event_ms", and the "reason" why there is no
    more. stream: the address of torch's current stream, on which CuPy is to record its events.
    """
    event_ms = 1e3 * Quantiles.of(interleaved_samples({"run": [run]}, clock, rounds=rounds)["run"]).median
    try:
        cupy, profiler = importlib.import_module("cupy"), importlib.import_module("cupyx.profiler")
    except ImportError as error:
        return {"event_ms": event_ms, "reason": f"CuPy cannot be imported: {error}"}
    with cupy.cuda.ExternalStream(stream()):
        samples = profiler.benchmark(run, n_repeat=rounds, n_warmup=3).gpu_times
    cupy_ms = 1e3 * float(np.median(samples))
    return {"event_ms": event_ms, "cupy_ms": cupy_ms, "ratio": cupy_ms / event_ms}
