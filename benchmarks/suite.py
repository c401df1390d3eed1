"""What the pytest-benchmark files share: a piece of work, whether it fits this machine, and how it is timed.

    pytest benchmarks/ --benchmark-json=FILE [--bench-device cpu|cuda] [--bench-seconds S] [--bench-all]

On CUDA the timer waits for the GPU on both sides of a round, and a round is as many calls as take ten milliseconds:
they are queued back to back, so that launches hide behind kernels as they do in use, and one wait is shared by all.
Calls take sets of inputs in turn that together pass the cache. Nothing is timed before its result is right.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from .harness import timing
from .harness.environment import environment
from .opponents import Opponent, Run, Unavailable

# Products and additions in a second that a device is assumed to do at least, by which estimates are made: of one CPU
# thread in any dtype, and of a GPU.
CPU_RATE, CUDA_RATE = 2e10, 2e13
# Seconds that a round and all rounds of one benchmark are to take, and how many rounds there may be.
_ROUND, _TOTAL = 0.01, 0.25
_ROUNDS = (3, 50)


@dataclass(frozen=True)
class Options:
    """Of the command line. seconds: what one call may take by the estimate. everything: no estimate leaves out a thing,
    and what takes minutes to compile is compiled.
    """

    device: torch.device
    seconds: float
    everything: bool = False

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Those that are worth timing: a CPU has no float16 products."""
        wide = (torch.float32, torch.bfloat16)
        return (*wide, torch.float16) if self.device.type == "cuda" else wide


@dataclass(frozen=True)
class Work:
    """Something to time. name: of the benchmark; group: what it is compared within; info: for extra_info.

    flops, memory: an estimate of one call's operations, and of the bytes it needs at once, its check included.
    prepare: checks the result (AssertionError) and gives the calls, one for each set of inputs. after: more of
    extra_info, from the first of the calls.
    """

    name: str
    group: str
    prepare: Callable[[], Sequence[Run]]
    flops: float
    memory: float
    info: Mapping[str, Any] = field(default_factory=dict)
    unavailable: str = ""
    after: Callable[[Run], Mapping[str, Any]] = lambda run: {}


def obstacle(work: Work, options: Options, memory: float | None = None) -> str:
    """Why the work is left out, or "". memory: bytes of the device, by default what it has."""
    if work.unavailable or options.everything:
        return work.unavailable
    rate = CUDA_RATE if options.device.type == "cuda" else CPU_RATE * torch.get_num_threads()
    seconds = work.flops / rate
    if seconds > options.seconds:
        return (
            f"estimated {seconds:.2g} s a call ({work.flops / 1e9:.3g} GFLOP at {rate / 1e9:g} GFLOP/s), "
            f"more than --bench-seconds {options.seconds:g}"
        )
    available = device_memory(options.device) if memory is None else memory
    if work.memory > available:
        return f"estimated {work.memory / 1e9:.3g} GB, more than the {available / 1e9:.3g} GB that may be used"
    return ""


def left_to_all(opponent: Opponent, options: Options) -> str:
    """Why the opponent cannot run, or why it is left to --bench-all: a suite compiles hundreds of shapes."""
    is_slow = options.device.type == "cpu" and opponent.name.startswith("compile") and not options.everything
    return opponent.unavailable or ("compiling takes longer than all else on a CPU: --bench-all" if is_slow else "")


def device_memory(device: torch.device) -> float:
    """Bytes that benchmarks may use: four fifths of a GPU's, half of a computer's."""
    if device.type == "cuda":
        return 0.8 * torch.cuda.get_device_properties(device).total_memory
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cuda_timer() -> float:
    """Seconds, when all work that was queued on the GPU is done."""
    torch.cuda.synchronize()
    return time.perf_counter()


def timer_of(device: torch.device) -> Callable[[], float]:
    return cuda_timer if device.type == "cuda" else time.perf_counter


def pace(seconds: float) -> tuple[int, int]:
    """(rounds, calls in a round) for a call that takes so long."""
    calls = max(1, math.ceil(_ROUND / seconds))
    least, most = _ROUNDS
    return max(least, min(most, int(_TOTAL / (seconds * calls)))), calls


def time_work(benchmark: Any, work: Work, options: Options) -> None:
    """Check, warm up and time the work with pytest-benchmark's fixture; skip, with the reason, what is left out."""
    reason = obstacle(work, options)
    if reason:
        pytest.skip(reason)
    with timing.cudnn_benchmark():
        try:
            runs = work.prepare()
        except Unavailable as error:
            pytest.skip(str(error))
        for run in runs:
            run()
        timer = timer_of(options.device)
        begin = timer()
        runs[0]()
        rounds, calls = pace(timer() - begin)
        turns = itertools.cycle(runs)
        benchmark.group = work.group
        benchmark.extra_info.update(work.info, flops=work.flops, device=device_name(options.device), commit=commit())
        benchmark.pedantic(lambda: next(turns)(), rounds=rounds, iterations=calls, warmup_rounds=1)
        benchmark.extra_info.update(work.after(runs[0]))


@functools.cache
def _environment(device: str) -> dict[str, Any]:
    return environment(device)


def device_name(device: torch.device) -> str:
    return _environment(device.type)["device"]


def commit() -> str | None:
    return _environment("cpu")["commit"]
