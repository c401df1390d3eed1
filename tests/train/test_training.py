"""Training on a folder: what a run leaves, interruption at any moment, and resuming."""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from image_files import save
from killed_training import kill_runs
from PIL import Image
from safetensors.torch import load_file
from stopped_training import TINY, Killed, killed, losses_of, stop_at
from torch import Tensor

from fastunet import UNet
from fastunet.checks import ConfigError, DataError, Interrupted
from fastunet.files import written_whole
from fastunet.inference.tiling import field_of
from fastunet.train import checkpoint, loop, results
from fastunet.train.checkpoint import checkpoints, load_config, read_progress
from fastunet.train.config import TILE
from fastunet.train.distributed import make_accelerator
from fastunet.train.loop import train
from fastunet.train.loss import rate_at
from fastunet.train.results import tile_of


def interrupted() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_what_a_run_leaves(run: Path) -> None:
    assert {p.name for p in run.iterdir()} == {
        "config.json",
        "history.csv",
        "metrics.json",
        "model.safetensors",
        "report.html",
        "report.png",
        "checkpoint-000010",
    }
    modes = {p.stat().st_mode for p in run.rglob("*") if p.is_file()}
    assert modes == {(run / "config.json").stat().st_mode}
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 10
    assert metrics["mean_dice"] == metrics["dice"]["foreground"]
    assert len(metrics["images"]) == 2
    assert set(metrics["dice"]) == {"background", "foreground"}
    rows = list(csv.DictReader((run / "history.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    assert Image.open(run / "report.png").size[0] > 500
    optimizer = torch.load(run / "checkpoint-000010/optimizer.bin")
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(TINY.lr * rate_at(0.9))
    model, config = checkpoint.load_run(run)
    assert not model.training
    assert model.config == {**config.model, "features": (4, 8)}
    weights, again = load_file(run / "model.safetensors"), UNet.from_pretrained(run)
    assert again.config == model.config
    for name, t in again.state_dict().items():
        assert torch.equal(t, weights[name]), name
        assert torch.equal(t, model.state_dict()[name]), name
    assert config.val == metrics["images"]
    assert not set(config.val) & set(config.train)


def test_training_learns(data: Path, tmp_path: Path) -> None:
    metrics = train(data, tmp_path / "run", replace(TINY, steps=60, features=(8, 16), lr=1e-2))
    assert metrics["dice"]["foreground"] > 0.9


def test_trainings_in_one_process_may_differ_in_precision_and_seed(data: Path, tmp_path: Path) -> None:
    weights = []
    for i, (precision, seed) in enumerate((("bf16", 0), ("fp32", 0), ("fp32", 1))):
        config = replace(TINY, steps=1, val_fraction=0.0, precision=precision, seed=seed)
        metrics = train(data, tmp_path / str(i), config)
        assert metrics["precision"] == precision
        assert metrics["images"] == []
        assert "dice" not in metrics
        assert (tmp_path / str(i) / "report.png").is_file()
        weights.append(load_file(tmp_path / str(i) / "model.safetensors")["outc.conv.weight"])
    assert not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_image_is_validated_once_and_in_exact_tiles(
    precision: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision accelerate puts a forward of its own into the model."""
    calls, forward, told = [], UNet.forward, []
    monkeypatch.setattr(results, "tile_of", lambda model: told.append(field_of(model)) or 64)

    def counted(self: UNet, x: Tensor) -> Tensor:
        calls.append(self.training)
        return forward(self, x)

    monkeypatch.setattr(UNet, "forward", counted)
    train(data, tmp_path / "run", replace(TINY, steps=1, precision=precision, device="cpu"))
    kept_out = len(load_config(tmp_path / "run").val)
    assert all(told)
    # At the only step, in the end, for the report and its extremes.
    assert calls.count(False) == 4 * kept_out


def test_of_a_deep_net_a_tile_holds_more_than_its_halo() -> None:
    net = UNet(1, 1, features=(2,) * 8)
    halo, multiple = field_of(net)
    assert tile_of(UNet(1, 1, features=(2, 4))) == TILE < 2 * halo + multiple < tile_of(net)


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [({"avx512_bf16": True, "amx_bf16": False}, "no"), ({"avx512_bf16": True, "amx_bf16": True}, "bf16"), ({}, "no")],
)
def test_a_cpu_trains_in_16_bits_where_that_is_faster(
    capabilities: dict[str, bool], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert make_accelerator(replace(TINY, precision="auto", device="cpu")).mixed_precision == precision


@pytest.mark.parametrize("done", [1, 15])  # of 100 steps, of which every tenth is validated
def test_a_run_that_is_to_end_where_it_was_stopped_is_scored_there(done: int, data: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=f"step {done + 1};"):
        train(data, tmp_path / "run", replace(TINY, steps=100), on_step=stop_at(done, interrupted))
    metrics = train(data, tmp_path / "run", replace(TINY, steps=done + 1), resume=True)
    assert metrics["steps"] == done + 1
    with (tmp_path / "run/history.csv").open() as file:
        assert int([*csv.DictReader(file)][-1]["step"]) == done + 1


def test_a_time_limit_ends_the_schedule(data: Path, tmp_path: Path) -> None:
    rates: list[float] = []
    start = time.perf_counter()
    metrics = train(
        data,
        tmp_path / "run",
        replace(TINY, steps=10**9, max_minutes=0.01),
        on_step=lambda progress: rates.append(rate_at(progress.fraction)),
    )
    assert 0.6 <= metrics["seconds"] < 0.6 + (time.perf_counter() - start)
    assert metrics["steps"] == len(rates)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_the_last_steps_neither_mirror_nor_turn(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[bool] = []

    def watched(level: str, *, flip: bool) -> Callable[..., Any]:
        def augment(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            moved.append(flip)
            return images, labels

        return augment

    monkeypatch.setattr(loop, "augmentation_of", watched)
    train(data, tmp_path / "run", replace(TINY, steps=20))
    train(data, tmp_path / "upright", replace(TINY, steps=20, flip=False))
    assert moved == [True] * 17 + [False] * 23


def test_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [rate_at(i / 1000) for i in range(1001)]
    peak = int(np.argmax(rates))
    assert 0 < rates[0] < 0.1
    assert rates[peak] == 1
    assert peak == 30
    assert rates[1000] == pytest.approx(0)
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_multi_class_and_colour(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for i in range(4):
        labels = generator.integers(0, 3, (8, 8)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
        image = labels[..., None] * 80 + generator.integers(0, 40, (32, 32, 3))
        save(tmp_path / f"data/images/{i}.png", image.astype(np.uint8))
        save(tmp_path / f"data/masks/{i}.png", labels)
    metrics = train(tmp_path / "data", tmp_path / "run", replace(TINY, steps=60, lr=1e-2))
    assert set(metrics["dice"]) == {"class 0", "class 1", "class 2"}
    assert metrics["mean_dice"] > 0.5
    model, _ = checkpoint.load_run(tmp_path / "run")
    assert (model.config["in_channels"], model.config["out_channels"]) == (3, 3)


# --- stopped at any moment, and resumed ---


@pytest.mark.parametrize(
    ("changes", "stop", "kept"),
    [
        pytest.param({}, (9, killed), 8, id="killed"),
        pytest.param({"norm": "instance", "workers": 1}, (8, interrupted), 9, id="Ctrl-C"),
        pytest.param({"ema": 0.5, "val_fraction": 0.0}, (9, killed), 8, id="moving average"),
        pytest.param({"features": (4, 4, 8, 8), "deep_supervision": True}, (9, killed), 8, id="deep supervision"),
    ],
)
def test_resuming_is_exact(
    changes: dict[str, Any], stop: tuple[int, Any], kept: int, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Across the end of an epoch, from a checkpoint within one: losses and weights to the bit."""
    monkeypatch.setattr(loop, "SHORTEST_EPOCH", 10)
    config = replace(TINY, steps=20, crop=16, device="cpu", **changes)
    whole = losses_of(data, tmp_path / "whole", config)
    first = losses_of(data, tmp_path / "run", config, stop=stop_at(*stop))
    assert read_progress(checkpoints(tmp_path / "run")[-1])["step"] == kept
    rest = losses_of(None, tmp_path / "run", None, resume=True)
    assert list(rest) == list(range(kept + 1, 21))
    assert first | rest == whole
    for name in ("model.safetensors", "checkpoint-000020/model.safetensors"):
        weights, expected = load_file(tmp_path / "run" / name), load_file(tmp_path / "whole" / name)
        assert all(torch.equal(weights[key], expected[key]) for key in expected)
    history, expected_history = (
        [{k: v for k, v in row.items() if k != "minutes"} for row in csv.DictReader((folder / "history.csv").open())]
        for folder in (tmp_path / "run", tmp_path / "whole")
    )
    assert history == expected_history


@pytest.mark.parametrize(
    ("moment", "resume"),
    [
        *(("write_json", False), ("save_checkpoint", True), ("save_checkpoint", False)),
        *(("write_weights", True), ("write_report", True), ("write_report", False)),
    ],
)
def test_a_kill_at_any_moment_is_no_dead_end(
    moment: str, resume: bool, data: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it change what comes of the training."""
    with monkeypatch.context() as patch:
        patch.setattr(results if moment in ("write_weights", "write_report") else loop, moment, killed)
        losses_of(data, tmp_path / "run", TINY)
    if resume:
        train(None, tmp_path / "run", resume=True)
    elif moment == "write_report":
        with pytest.raises(DataError, match=r"--resume continues it, --overwrite begins anew"):
            train(data, tmp_path / "run", TINY)
        train(data, tmp_path / "run", TINY, overwrite=True)
    else:
        train(data, tmp_path / "run", TINY)
    assert_same_files(tmp_path / "run", run)


def assert_same_files(folder: Path, expected: Path) -> None:
    names = {path.name for path in expected.iterdir()}
    assert {path.name for path in folder.iterdir()} == names
    weights, right = load_file(folder / "model.safetensors"), load_file(expected / "model.safetensors")
    assert all(torch.equal(weights[name], right[name]) for name in right)


def test_a_kill_while_saving_leaves_the_older_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save = tmp_path / "run", Accelerator.save_state

    def die_in_the_third(self: Accelerator, folder: str) -> None:
        save(self, folder)
        if folder.endswith("03.partial"):
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", die_in_the_third)
        assert list(losses_of(data, out, TINY)) == [1, 2]
    assert [folder.name for folder in checkpoints(out)] == ["checkpoint-000001", "checkpoint-000002"]
    with written_whole(out / "history.csv") as unfinished:
        unfinished.write_text("half")
        os.link(unfinished, tmp_path / unfinished.name)
    shutil.move(tmp_path / unfinished.name, out)  # as a kill leaves it
    assert list(losses_of(data, out, TINY, resume=True)) == list(range(3, 11))
    assert not list(out.glob(".*"))


def test_a_finished_run_goes_on_with_more_steps(data: Path, run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(run, tmp_path / "run")
    assert losses_of(data, out, None, resume=True) == {}
    assert_same_files(out, run)
    assert list(losses_of(data, out, replace(TINY, steps=13), resume=True)) == [11, 12, 13]
    assert [folder.name for folder in checkpoints(out)] == ["checkpoint-000013"]
    assert json.loads((out / "metrics.json").read_text())["steps"] == 13


def test_a_limit_of_time_that_is_used_up(data: Path, tmp_path: Path) -> None:
    config = replace(TINY, steps=10**6, max_minutes=0.004)
    done = len(losses_of(data, tmp_path / "run", config))
    assert losses_of(None, tmp_path / "run", config, resume=True) == {}
    with pytest.raises(ConfigError, match=r"max_minutes: expected more than the 0\.0\d done, got 0\.001"):
        train(None, tmp_path / "run", replace(config, max_minutes=0.001), resume=True)
    more = losses_of(None, tmp_path / "run", replace(config, steps=done + 2), resume=True)
    assert list(more) == [done + 1, done + 2]


@pytest.mark.slow
def test_kills_at_random(tmp_path: Path) -> None:
    assert kill_runs(tmp_path, 20) == 20


def test_a_second_training_in_the_folder_is_refused(data: Path, tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(DataError, match="run: expected no training in it, got one that is still running"):
            train(data, tmp_path / "run", TINY)
        with pytest.raises(DataError, match="still running"):
            train(None, tmp_path / "run", resume=True)

    assert list(losses_of(data, tmp_path / "run", replace(TINY, steps=2), stop=stop_at(1, second))) == [1, 2]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("optimizer.bin", None),
        ("progress.json", lambda content: content[: len(content) // 2]),
        ("model.safetensors", lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]),
        ("SHA256SUMS", lambda content: b""),
        ("SHA256SUMS", None),
    ],
    ids=["missing", "half", "one bit", "sums empty", "sums missing"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    name: str, damage: Callable[[bytes], bytes] | None, data: Path, stopped: Path, tmp_path: Path
) -> None:
    out, accelerator = shutil.copytree(stopped, tmp_path / "run"), Mock()
    older, newest = checkpoints(out)

    def alter(folder: Path) -> str:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        if damage is not None:
            (folder / name).write_bytes(damage(content))
        # Of altered sums the first file that they do not vouch for is named.
        return re.escape(str(folder)) + ("" if name == "SHA256SUMS" else f"/{name}")

    with pytest.warns(UserWarning, match=alter(newest) + ".*; going on from .*000002"):
        progress, _ = checkpoint.load_checkpoint(out, accelerator) or ({}, None)
    assert progress["step"] == 2
    accelerator.load_state.assert_called_once_with(str(older))
    alter(older)
    with pytest.raises(DataError, match=rf"{re.escape(str(newest))}.*: remove .*, or that folder, to begin anew"):
        train(data, out, resume=True)


def test_a_disk_that_is_full_costs_no_checkpoint(data: Path, stopped: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the disk: it refuses files of more than that."""
    out = shutil.copytree(stopped, tmp_path / "run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(DataError, match=r"checkpoint-000004: expected to write it, with \d+ MiB free, got: "):
            train(None, out, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [folder.name for folder in checkpoints(out)] == ["checkpoint-000002", "checkpoint-000003"]
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("stop", [3, 7], ids=["at the best", "after it"])
def test_the_weights_are_the_best_by_validation(
    stop: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = iter([0.1, 0.2, 0.8, 0.3, 0.8, *5 * [0.5]])

    scored = Mock(compute=lambda: {"mean_dice": next(dice), "dice": {}})
    monkeypatch.setattr(loop, "validate", lambda *args, **options: (scored, []))
    states: dict[int, dict[str, torch.Tensor]] = {}
    weights = loop._Loop._weights

    def note(loop: loop._Loop) -> dict[str, torch.Tensor]:
        states[loop.progress.step] = weights(loop)
        return states[loop.progress.step]

    monkeypatch.setattr(loop._Loop, "_weights", note)
    losses_of(data, tmp_path / "run", TINY, stop=stop_at(stop, killed))
    metrics = train(None, tmp_path / "run", resume=True)
    assert metrics["weights"] == "step 3 of 10: best validation Dice of the foreground, 0.8000"
    assert checkpoint.load_config(tmp_path / "run").weights == metrics["weights"]
    assert list(states) == [1, 2, 3]
    kept = load_file(tmp_path / "run/model.safetensors")
    assert all(torch.equal(kept[name], states[3][name]) for name in kept)
