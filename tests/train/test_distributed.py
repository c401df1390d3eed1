"""Training in two processes over gloo: the losses of one, one writer, and what is left when one of them dies."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stopped_training import DEEP, TINY, losses_of
from training_ranks import train_in_ranks

from fastunet.checks import ConfigError
from fastunet.train import loop
from fastunet.train.checkpoint import checkpoints, find_damage
from fastunet.train.config import TrainConfig
from fastunet.train.distributed import make_accelerator

# A norm of each image by itself: torch has statistics over processes on GPUs only. Each rank draws its augmentations.
CONFIG = replace(TINY, norm="instance", crop=16, device="cpu", augment="none")
DEEP_CONFIG = replace(DEEP, norm="instance", augment="none", steps=4)


def losses_in(results: Path, rank: int) -> Any:
    return json.loads((results / f"{rank}.json").read_text())


@pytest.mark.parametrize("config", [CONFIG, DEEP_CONFIG], ids=["plain", "deep"])
def test_two_ranks_give_the_losses_of_one_with_the_doubled_batch(
    config: TrainConfig, data: Path, tmp_path: Path
) -> None:
    assert train_in_ranks(data, tmp_path / "two", config, tmp_path / "results") == [0, 0]
    expected = losses_of(data, tmp_path / "one", replace(config, batch_size=2 * TINY.batch_size))
    for rank in range(2):
        losses = {int(step): loss for step, loss in losses_in(tmp_path / "results", rank).items()}
        assert losses == pytest.approx(expected, rel=1e-5)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    weights, right = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name in right:
        torch.testing.assert_close(weights[name], right[name], rtol=1e-3, atol=1e-5)
    scores = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("two", "one")]
    assert scores[0]["mean_dice"] == pytest.approx(scores[1]["mean_dice"], rel=1e-3)
    assert [score["processes"] for score in scores] == [2, 1]


def test_the_first_rank_reads_for_all(data: Path, tmp_path: Path) -> None:
    """Every file is surveyed once; what is wrong with one ends all ranks, by one message."""
    readings = tmp_path / "readings"
    config = replace(CONFIG, steps=2)
    assert train_in_ranks(data, tmp_path / "run", config, tmp_path / "results", readings=readings) == [0, 0]
    stems = sorted(path.stem for path in (data / "images").iterdir())
    assert sorted(readings.read_text().splitlines()) == [f"0 {stem}" for stem in stems]

    broken = shutil.copytree(data, tmp_path / "broken")
    (broken / "masks" / f"{stems[0]}.png").write_bytes(b"")
    assert train_in_ranks(broken, tmp_path / "none", config, tmp_path / "errors") == [0, 0]
    first, second = (losses_in(tmp_path / "errors", rank) for rank in range(2))
    assert first == second
    assert re.fullmatch(rf".*{stems[0]}\.png: expected .*, got: an empty file", first)
    assert not (tmp_path / "none" / "config.json").exists()


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_other_and_leaves_a_run_that_goes_on(data: Path, tmp_path: Path) -> None:
    whole, out, results = tmp_path / "whole", tmp_path / "run", tmp_path / "results"
    assert train_in_ranks(data, whole, CONFIG, tmp_path / "expected") == [0, 0]
    start = time.perf_counter()
    assert train_in_ranks(data, out, CONFIG, results, dies_at=4) == [0, -signal.SIGKILL]
    assert time.perf_counter() - start < 60
    assert "process 0: expected all 2 processes to go on, got one that has ended" in losses_in(results, 0)
    (*_, newest) = checkpoints(out)
    assert newest.name == "checkpoint-000004"
    assert find_damage(newest) is None
    with pytest.raises(ConfigError, match=r"processes: expected 2, with which .* was begun, got 1"):
        loop.train(None, out, resume=True)
    assert train_in_ranks(data, out, None, results, resume=True) == [0, 0]
    rest, expected = losses_in(results, 1), losses_in(tmp_path / "expected", 1)
    assert rest == {step: expected[step] for step in map(str, range(5, 11))}
    weights, right = (load_file(folder / "model.safetensors") for folder in (out, whole))
    assert all(torch.equal(weights[name], right[name]) for name in right)


def test_statistics_of_batch_norm_over_processes_want_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TINY, sync_batch_norm=True)
    assert make_accelerator(config).num_processes == 1
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    with pytest.raises(ConfigError, match=r"sync_batch_norm: expected GPUs, .*, got processes on the CPU"):
        make_accelerator(config)
