"""Options of `pytest benchmarks/`, and a benchmark for each piece of work that a file lists by `works(options)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .suite import Options, Work, time_work, timer_of

_SECONDS = {"cpu": 0.5, "cuda": 2.0}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastunet")
    group.addoption(
        "--bench-device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one"
    )
    group.addoption("--bench-seconds", type=float, help=f"what a call may take by the estimate {_SECONDS}")
    group.addoption("--bench-all", action="store_true", help="leave nothing out for its time or memory; compile all")


def options_of(config: pytest.Config) -> Options:
    """UsageError for a device that is not there and a time that is none."""
    device, seconds = config.getoption("--bench-device"), config.getoption("--bench-seconds")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--bench-device: expected a CUDA device for cuda, got none")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = _SECONDS[device] if seconds is None else seconds
    if seconds <= 0:
        raise pytest.UsageError(f"--bench-seconds: expected more than 0, got {seconds:g}")
    return Options(torch.device(device), seconds, config.getoption("--bench-all"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "work" in metafunc.fixturenames:
        works: list[Work] = metafunc.module.works(options_of(metafunc.config))
        metafunc.parametrize("work", works, ids=[work.name for work in works])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "timed" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=timer_of(options_of(config).device)))


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Work], None]:
    """Times a piece of work."""
    return lambda work: time_work(benchmark, work, options_of(request.config))
