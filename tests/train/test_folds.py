"""Cross-validation: each image is kept out once, and the same command goes on where it was stopped."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from command import error_of, fastunet

from fastunet.checks import DataError
from fastunet.cli import train as command
from fastunet.data import find_pairs, split
from fastunet.train.checkpoint import load_config

OPTIONS = ["--steps", "2", "--features", "4,8", "--crop", "32", "--batch-size", "2", "--precision", "fp32"]


@pytest.mark.parametrize("seed", [None, 3])
def test_folds_keep_each_image_out_once(data: Path, seed: int | None) -> None:
    pairs = find_pairs(data)
    parts = [split(pairs, 0.15, seed, (number, 3)) for number in (1, 2, 3)]
    assert sorted(pair.stem for _, val in parts for pair in val) == [pair.stem for pair in pairs]
    assert [len(val) for _, val in parts] == [3, 3, 2]
    for train, val in parts:
        assert {pair.stem for pair in train} == {pair.stem for pair in pairs} - {pair.stem for pair in val}
    if seed is None:
        assert [pair.stem for pair in parts[2][1]] == [pair.stem for pair in pairs[-2:]]
    with pytest.raises(DataError, match="expected at least 9 pairs for as many folds, got 8"):
        split(pairs, 0.15, seed, (1, 9))


def test_all_folds_are_trained_and_the_same_command_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, trained = tmp_path / "out", command.train_with_bar

    def stop_at_second(data: Any, folder: Path, config: Any, **options: Any) -> Any:
        if folder.name == "fold-2":
            raise DataError("stopped")
        return trained(data, folder, config, **options)

    with monkeypatch.context() as patch:
        patch.setattr(command, "train_with_bar", stop_at_second)
        error_of("train", data, "--out", out, "--folds", "2", *OPTIONS)
    first = (out / "fold-1/checkpoint-000002").stat().st_mtime_ns
    result = fastunet("train", data, "--out", out, "--folds", "2", *OPTIONS)
    assert (out / "fold-1/checkpoint-000002").stat().st_mtime_ns == first
    runs = [load_config(out / f"fold-{number}") for number in (1, 2)]
    assert runs[0].val == runs[1].train
    assert runs[0].train == runs[1].val
    scores = [json.loads((out / f"fold-{number}/metrics.json").read_text())["mean_dice"] for number in (1, 2)]
    summary = json.loads((out / "folds.json").read_text())
    assert [row["mean_dice"] for row in summary["folds"]] == scores
    assert summary["mean_dice"] == {"mean": statistics.mean(scores), "std": statistics.stdev(scores)}
    assert "Dice over 2 folds: " in result.stdout
    other = ("train", data, "--out", out, "--folds", "2", *OPTIONS, "--lr", "0.1")
    assert "lr: expected 0.001, with which" in error_of(*other)
