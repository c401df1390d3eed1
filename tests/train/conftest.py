"""Trainings that several tests look at; what they need may be missing, where the tests are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest


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
