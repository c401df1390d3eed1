"""The cross-check of the GPU timer, with a CuPy that only notes what it is asked for."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastunet.benchmarks.harness.timing import timing_cross_check


class Clock:
    """Each run takes two milliseconds."""

    def prepare(self) -> None: ...

    def mark(self) -> int:
        return 0

    def wait(self) -> None: ...

    def elapsed(self, begin: int, end: int) -> float:
        return 0.002


def test_both_timers_time_the_run_on_torchs_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []

    class ExternalStream:
        def __init__(self, address: int) -> None:
            self.address = address

        def __enter__(self) -> None:
            log.append(("stream", self.address))

        def __exit__(self, *error: object) -> None:
            log.append("left")

    def benchmark(function: Any, *, n_repeat: int, n_warmup: int) -> Any:
        log.append(("benchmark", function, n_repeat, n_warmup))
        return SimpleNamespace(gpu_times=np.array([[0.004, 0.003, 0.1]]))

    cupy, cupyx, profiler = ModuleType("cupy"), ModuleType("cupyx"), ModuleType("cupyx.profiler")
    cupy.cuda = SimpleNamespace(ExternalStream=ExternalStream)  # type: ignore[attr-defined]
    profiler.benchmark = benchmark  # type: ignore[attr-defined]
    for module in (cupy, cupyx, profiler):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    calls = []

    def run() -> None:
        calls.append(1)

    found = timing_cross_check(run, rounds=5, clock=Clock(), stream=lambda: 77)
    assert found == pytest.approx({"event_ms": 2.0, "cupy_ms": 4.0, "ratio": 2.0})
    assert log == [("stream", 77), ("benchmark", run, 5, 3), "left"]
    assert len(calls) == 3 + 5  # Ours: warm-up and rounds. The other timer is fake.


def test_without_cupy_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    found = timing_cross_check(lambda: None, rounds=2, clock=Clock())
    assert found["event_ms"] == 2.0
    assert "CuPy cannot be imported" in found["reason"]
    assert "ratio" not in found
