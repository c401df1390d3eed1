"""What every test begins with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastunet.kernels import autotune
from torch import Tensor

from fastunet import dispatch
from fastunet.testing import float32_precision


@pytest.fixture(autouse=True)
def _nothing_known(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Choices are remembered as if the device never changed: tests that put another in its place change it. What was
    measured, by the user of this machine or another test, is no test's.
    """
    folder = f"cache{hash(request.node.nodeid)}"
    monkeypatch.setenv("FASTUNET_CACHE", str(tmp_path_factory.getbasetemp() / folder))
    for forget in (dispatch._choices.clear, autotune._tables.clear, autotune._config.cache_clear):
        forget()
    yield
    for forget in (dispatch._choices.clear, autotune._tables.clear, autotune._config.cache_clear):
        forget()


@pytest.fixture
def layers_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers and nets are computed like large ones, which would take the tests longer."""
    for limit in ("_FEW_PRODUCTS", "_FEW_PRODUCTS_OF_TWO"):
        monkeypatch.setattr(dispatch, limit, 0)


@pytest.fixture
def nan_in_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element a launcher allocates and no kernel writes shows as NaN."""
    empty = torch.empty

    def poisoned(*arguments: Any, **keywords: Any) -> Tensor:
        fresh = empty(*arguments, **keywords)
        return fresh.fill_(math.nan) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def ieee() -> Iterator[None]:
    """float32 is float32, in torch's operations and ours: ops ask torch whether TF32 is allowed."""
    with float32_precision("ieee"):
        yield


@pytest.fixture
def forced() -> Iterator[None]:
    """Every op runs on its Triton kernel."""
    with dispatch.backend("triton"):
        yield


@pytest.fixture
def undrawn_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings leave an empty report, which would take longer to draw than they do."""
    from fastunet.train import results

    for name in ("write_report", "write_html"):
        monkeypatch.setattr(results, name, lambda path, *_: path.write_bytes(b""))


# --- trainings that several tests look at ---


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fastunet.data.synthetic import write_dataset

    root = tmp_path_factory.mktemp("data")
    write_dataset(root, 8, size=64)
    return root


@pytest.fixture(scope="session")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stopped_training import TINY

    from fastunet.train.loop import train

    out = tmp_path_factory.mktemp("runs") / "run"
    train(data, out, TINY)
    return out


@pytest.fixture(scope="session")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its third checkpoint."""
    from stopped_training import TINY, killed, losses_of, stop_at

    out = tmp_path_factory.mktemp("runs") / "stopped"
    losses_of(data, out, TINY, stop=stop_at(3, killed))
    return out
