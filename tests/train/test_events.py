"""The history as TensorBoard reads it."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from stopped_training import TINY, Killed, killed, losses_of, stop_at

from fastunet.checks import MissingPackageError
from fastunet.train import loop
from fastunet.train.events import EVENTS
from fastunet.train.loop import train


def test_without_the_package_nothing_is_begun(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingPackageError, match=r"tensorboard: expected the package, .*fastunet\[tensorboard\]"):
        train(data, tmp_path / "run", replace(TINY, tensorboard=True))
    assert not (tmp_path / "run").exists()


def test_tensorboard_reads_the_history_of_a_run_that_was_stopped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, config = tmp_path / "run", replace(TINY, tensorboard=True)
    losses_of(data, out, config, stop=stop_at(4, killed))
    with monkeypatch.context() as patch:  # once more after a validation, before its checkpoint
        patch.setattr(loop, "save_checkpoint", killed)
        with pytest.raises(Killed):
            train(None, out, resume=True)
    train(None, out, resume=True)
    events = EventAccumulator(str(out)).Reload()
    rows = list(csv.DictReader((out / "history.csv").open()))
    for tag, column in (("train_loss", "train_loss"), ("val_dice", "val_dice"), ("val_dice/foreground",) * 2):
        read = [(event.step, event.value) for event in events.Scalars(tag)]
        expected = {int(row["step"]): float(row[column.replace("/", " ")]) for row in rows}
        assert len(read) == len(rows)  # no step twice
        assert dict(read) == pytest.approx(expected)
    assert events.Scalars("learning_rate")[-1].value == pytest.approx(0, abs=1e-9)
    train(data, out, replace(TINY, steps=1), overwrite=True)
    assert not list(out.glob(f"{EVENTS}*"))
