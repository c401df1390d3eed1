"""The measured roofs: rates from times, burst and steady state, and what is said where L2 cannot be read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
import torch
from fastunet.benchmarks import roofline as roofs
from fastunet.benchmarks.harness import timing
from fastunet.benchmarks.roofline import Reader, Sizes

CPU = torch.device("cpu")


class SteppedClock:
    """Each mark is `step()` seconds after the one before."""

    def __init__(self, step: Callable[[], float]) -> None:
        self.time, self._step = 0.0, step

    def prepare(self) -> None: ...

    def mark(self) -> float:
        self.time += self._step()
        return self.time

    def wait(self) -> None: ...

    def elapsed(self, begin: float, end: float) -> float:
        return end - begin


def test_burst_is_the_beginning_and_steady_the_second_half() -> None:
    """A device that slows down from 1 s to 2 s after 25 runs."""
    done, rests = [], []

    def run() -> None:
        done.append(1)

    clock = SteppedClock(lambda: 1.0 if len(done) <= 25 + 3 else 2.0)
    burst, steady = timing.burst_and_steady(run, clock, seconds=100.0, now=lambda: clock.time, pause=rests.append)
    assert (burst.median, burst.p90, steady.p10, steady.median) == (1.0, 1.0, 2.0, 2.0)
    assert rests == [1.0]
    assert burst.samples == 10
    assert steady.samples == (len(done) - 3) // 2


def test_rates_are_work_over_time() -> None:
    clock = SteppedClock(lambda: 0.5)
    assert roofs.copy_rate(CPU, Sizes(1 << 20, 8), clock)["gb_per_s"] == pytest.approx(2 * (1 << 20) / 0.5 / 1e9)
    found = roofs.matmul_rate(CPU, Sizes(1, 16, seconds=0.0), clock)
    assert found["burst_tflops"] == found["steady_tflops"] == pytest.approx(2 * 16**3 / 0.5 / 1e12)
    read = roofs.l2_rate(CPU, clock, lambda device: Reader(lambda: None, 1 << 20, 1 << 26))
    assert read["gb_per_s"] == pytest.approx((1 << 26) / 0.5 / 1e9)
    assert str(1 << 20) in read["how"]


def test_no_rate_of_l2_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SteppedClock(lambda: 1.0)
    assert roofs.l2_rate(CPU, clock) == {"gb_per_s": None, "reason": "the device is cpu, not cuda"}
    monkeypatch.setitem(sys.modules, "cupy", None)
    without = roofs.l2_rate(torch.device("cuda"), clock)
    assert without["gb_per_s"] is None
    assert "CuPy cannot be imported" in without["reason"]

    def broken(device: torch.device) -> Reader:
        raise RuntimeError("no compiler")

    assert roofs.l2_rate(CPU, clock, broken)["reason"] == "RuntimeError: no compiler"


@pytest.mark.parametrize(("cache", "size"), [(50 << 20, 8 << 20), (40 << 20, 8 << 20), (64 << 20, 16 << 20)])
def test_the_buffer_stays_in_half_an_l2(cache: int, size: int) -> None:
    assert roofs.l2_buffer_bytes(cache) == size


def test_the_roofs_of_a_cpu() -> None:
    row = json.loads(json.dumps(roofs.measure_roofs(CPU, Sizes(1 << 22, 64, rounds=2, seconds=0.0))))
    assert row["copy"]["gb_per_s"] > 0
    assert row["matmul"]["burst_tflops"] > 0
    assert row["l2"]["reason"]
