"""The timer: samples taken in turn, their quantiles, and inputs that no cache still holds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_clock import FakeClock
from fastunet.benchmarks.harness.second_clock import second_clock

from fastunet.measuring.timing import interleaved_samples, sets_past_cache


def test_runs_take_turns_in_both_orders_on_every_set() -> None:
    clock = FakeClock()
    runs = {"a": [clock.run("a0", 1.0), clock.run("a1", 3.0)], "b": [clock.run("b0", 10.0)]}
    samples = interleaved_samples(runs, clock, rounds=3, warmup=1)
    assert clock.log == [
        *("a0", "b0", "wait"),
        *("prepare", "a0", "prepare", "b0", "wait"),
        *("prepare", "b0", "prepare", "a1", "wait"),
        *("prepare", "a0", "prepare", "b0", "wait"),
    ]
    assert samples == {"a": [1.0, 3.0, 1.0], "b": [10.0, 10.0, 10.0]}


def test_warmup_is_not_counted_and_time_ends_the_rounds() -> None:
    clock = FakeClock()
    runs = {"a": [clock.run("a", 100.0, 100.0, 1.0)]}
    samples = interleaved_samples(runs, clock, rounds=50, warmup=2, seconds=204.5, now=lambda: clock.time)
    assert samples == {"a": [1.0] * 5}
    again = {"a": [clock.run("a", 1.0)]}
    assert interleaved_samples(again, clock, rounds=9, seconds=0.0, now=lambda: clock.time) == {"a": [1.0]}


def test_more_sets_of_inputs_for_smaller_ones() -> None:
    small, large = torch.empty(1 << 20, dtype=torch.uint8), torch.empty(1 << 28, dtype=torch.uint8)
    assert sets_past_cache([small], torch.device("cpu")) == 8
    assert sets_past_cache([large], torch.device("cpu")) == 2


class Steady:
    """A clock by which each run takes two milliseconds."""

    def prepare(self) -> None: ...

    def mark(self) -> int:
        return 0

    def wait(self) -> None: ...

    def elapsed(self, begin: int, end: int) -> float:
        return 0.002


def test_both_timers_time_the_run_on_torchs_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []

    @contextmanager
    def stream(address: int) -> Iterator[None]:
        log.append(("stream", address))
        yield
        log.append("left")

    def benchmark(function: Any, n_repeat: int, n_warmup: int) -> SimpleNamespace:
        log.append(("benchmark", function, n_repeat, n_warmup))
        return SimpleNamespace(gpu_times=np.array([[0.004, 0.003, 0.1]]))

    cupy, cupyx, profiler = ModuleType("cupy"), ModuleType("cupyx"), ModuleType("cupyx.profiler")
    cupy.cuda = SimpleNamespace(ExternalStream=stream)  # type: ignore[attr-defined]
    profiler.benchmark = benchmark  # type: ignore[attr-defined]
    for module in (cupy, cupyx, profiler):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def run() -> None: ...

    found = second_clock(run, Steady(), rounds=5, stream=lambda: 77)
    assert found == pytest.approx({"event_ms": 2.0, "cupy_ms": 4.0, "ratio": 2.0})
    assert log == [("stream", 77), ("benchmark", run, 5, 3), "left"]


def test_without_cupy_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    found = second_clock(lambda: None, Steady(), rounds=2)
    assert (found["event_ms"], "ratio" in found) == (2.0, False)
    assert "CuPy cannot be imported" in found["reason"]
