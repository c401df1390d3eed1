"""The timer: samples taken in turn, their quantiles, and inputs that no cache still holds."""

from __future__ import annotations

import torch
from fake_clock import FakeClock

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
