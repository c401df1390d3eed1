"""Our timer on a GPU against another's: CuPy's profiler, which has its own events and its own loop."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from typing import Any

import torch

from .harness.timing import Clock, CudaClock, interleaved_samples


def timing_cross_check(
    run: Callable[[], Any],
    *,
    rounds: int = 30,
    clock: Clock | None = None,
    stream: Callable[[], int] = lambda: torch.cuda.current_stream().cuda_stream,
) -> dict[str, Any]:
    """The same run timed both ways: medians "event_ms" (`CudaClock`) and "cupy_ms", and "ratio", CuPy's over ours.

    CuPy waits for the GPU before each sample, so that a launch is part of its time, and not of ours: the ratio is 1 for
    a run of milliseconds, and larger the shorter the run. Without CuPy: "event_ms", and the "reason" why there is no
    more. stream: the address of torch's current stream, on which CuPy is to record its events.
    """
    event_ms = 1e3 * statistics.median(interleaved_samples({"run": [run]}, clock or CudaClock(), rounds=rounds)["run"])
    try:
        cupy, profiler = importlib.import_module("cupy"), importlib.import_module("cupyx.profiler")
    except ImportError as error:
        return {"event_ms": event_ms, "reason": f"CuPy cannot be imported: {error}"}
    with cupy.cuda.ExternalStream(stream()):
        samples = profiler.benchmark(run, n_repeat=rounds, n_warmup=3).gpu_times
    ordered = sorted(float(seconds) for seconds in samples.ravel())
    cupy_ms = 1e3 * ordered[len(ordered) // 2]
    return {"event_ms": event_ms, "cupy_ms": cupy_ms, "ratio": cupy_ms / event_ms}
