"""`python -m benchmarks accuracy`: who is trained on what, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fastunet.benchmarks import accuracy
from fastunet.benchmarks.__main__ import main

from fastunet.data.synthetic import cells


def test_the_rare_set_has_three_in_a_thousand() -> None:
    _, masks = cells(**accuracy.RARE)
    assert 0.0025 < np.mean(masks) / 255 < 0.0035


def test_both_train_on_the_first_images_and_are_judged_on_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    load = accuracy.load
    monkeypatch.setattr(accuracy, "load", lambda pairs: seen.append([each.stem for each in pairs]) or load(pairs))
    monkeypatch.setattr(accuracy, "RARE", accuracy.RARE | {"count": 5, "size": 256})
    assert (
        main(["accuracy", "--rare", "--steps", "1", "--seeds", "2", "--train-images", "2", "--out", str(tmp_path)]) == 0
    )
    found = json.loads((tmp_path / "accuracy_steps_1_rare_images_2.json").read_text())
    assert seen[::2] == [["cell_000", "cell_001"]] * 2
    assert [run["seed"] for run in found["runs"]] == [0, 1]
    for who in ("plain", "fastunet"):
        dice = [run[who]["dice"]["foreground"] for run in found["runs"]]
        assert found["summary"][who]["dice"]["foreground"] == pytest.approx(sum(dice) / 2)
        assert all(run[who]["steps"] == 1 for run in found["runs"])
