"""A run timed by another timer too: that both agree is what all other times rest on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastunet.measuring.timing import Clock, Quantiles, interleaved_samples


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
