"""Training on a folder: what a run leaves, interruption at any moment, resuming, and errors before any work."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("kornia", reason="needs the extra train")

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from fastunet import UNet, checkpoint, training
from fastunet.checks import ConfigError, DataError, FastUNetError
from fastunet.synthetic import write_dataset
from fastunet.training import TrainConfig, rate_at, train

TINY = TrainConfig(steps=10, features=(4, 8), crop=32, batch_size=2, val_fraction=0.25, tta=False, precision="fp32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, 8, size=64)
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train(data, out, TINY)
    return out


def test_what_a_run_leaves(run: Path) -> None:
    assert {p.name for p in run.iterdir()} == {
        "config.json",
        "history.csv",
        "metrics.json",
        "model.safetensors",
        "report.png",
    }
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 10
    assert len(metrics["images"]) == 2
    assert set(metrics["dice"]) == {"background", "foreground"}
    rows = list(csv.DictReader((run / "history.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    assert Image.open(run / "report.png").size[0] > 500
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
    metrics = train(data, tmp_path / "run", replace(TINY, steps=120, features=(8, 16), lr=5e-3))
    assert metrics["dice"]["foreground"] > 0.75


def test_the_same_seed_gives_the_same_weights(data: Path, run: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "again", TINY)
    train(data, tmp_path / "other", replace(TINY, seed=1))
    first, again, other = (
        load_file(folder / "model.safetensors") for folder in (run, tmp_path / "again", tmp_path / "other")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["outc.conv.weight"], other["outc.conv.weight"])


def test_two_trainings_in_one_process_may_differ_in_precision(data: Path, tmp_path: Path) -> None:
    for precision in ("bf16", "fp32"):
        metrics = train(data, tmp_path / precision, replace(TINY, steps=1, precision=precision))
        assert metrics["precision"] == precision


def test_a_time_limit_ends_the_schedule(data: Path, tmp_path: Path) -> None:
    rates: list[float] = []
    start = time.perf_counter()
    metrics = train(
        data,
        tmp_path / "run",
        replace(TINY, steps=10**9, max_minutes=0.05),
        on_step=lambda progress: rates.append(rate_at(progress.fraction)),
    )
    assert 3 <= metrics["seconds"] < 3 + (time.perf_counter() - start)
    assert metrics["steps"] == len(rates)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [rate_at(i / 1000) for i in range(1001)]
    peak = int(np.argmax(rates))
    assert 0 < rates[0] < 0.1
    assert rates[peak] == 1
    assert peak == 30
    assert rates[1000] == pytest.approx(0)
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@pytest.mark.parametrize("channels", [3])
def test_multi_class_and_colour(channels: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for i in range(4):
        labels = generator.integers(0, 3, (8, 8)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
        image = np.stack([labels * 80 + generator.integers(0, 40, labels.shape) for _ in range(channels)], -1)
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / "data/images" / f"{i}.png")
        Image.fromarray(labels).save(tmp_path / "data/masks" / f"{i}.png")
    metrics = train(tmp_path / "data", tmp_path / "run", replace(TINY, steps=60, lr=1e-2))
    assert set(metrics["dice"]) == {"class 0", "class 1", "class 2"}
    assert metrics["mean_dice"] > 0.5
    model, _ = checkpoint.load_run(tmp_path / "run")
    assert (model.config["in_channels"], model.config["out_channels"]) == (3, 3)


def test_no_image_kept_out(data: Path, tmp_path: Path) -> None:
    metrics = train(data, tmp_path / "run", replace(TINY, val_fraction=0.0, steps=2))
    assert metrics["images"] == []
    assert "dice" not in metrics
    assert (tmp_path / "run/report.png").is_file()


# --- interruption ---

SCRIPT = """
import sys
from fastunet.training import TrainConfig, train
small = dict(features=(4, 8), crop=32, batch_size=2, val_fraction=0.25, tta=False, precision="fp32")
config = TrainConfig(steps=int(sys.argv[3]), **small)
def report(progress):
    print(progress.step, flush=True)
train(sys.argv[1], sys.argv[2], config, resume=len(sys.argv) > 4, on_step=report)
"""


def start(data: Path, out: Path, steps: int, *resume: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(data), str(out), str(steps), *resume]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_of(process: subprocess.Popen[str]) -> list[int]:
    output, _ = process.communicate(timeout=300)
    return [int(line) for line in output.split()]


def test_ctrl_c_keeps_the_step_and_resume_goes_on(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(data, out, 2000)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 5:
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "--resume continues" in errors
    (folder,) = out.glob("checkpoint-*")
    kept = json.loads((folder / "progress.json").read_text())["step"]
    assert 5 <= kept < 2000
    with pytest.raises(ConfigError, match=rf"expected limits beyond the {kept} steps .* got {kept - 1} steps"):
        train(data, out, replace(TINY, steps=kept - 1), resume=True)
    steps = steps_of(start(data, out, kept + 7, "resume"))
    assert steps == list(range(kept + 1, kept + 8))
    assert json.loads((out / "metrics.json").read_text())["steps"] == kept + 7
    assert not list(out.glob("checkpoint-*"))


def test_resume_restores_weights_and_optimizer(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    class Stop(Exception):
        pass

    def stop_at(step: int):
        def check(progress: training.Progress) -> None:
            if progress.step == step:
                raise Stop

        return check

    with pytest.raises(Stop):
        train(data, out, replace(TINY, steps=20), on_step=stop_at(13))
    (folder,) = out.glob("checkpoint-*")
    assert folder.name == "checkpoint-000012"  # a checkpoint each tenth of the run
    saved = load_file(folder / "model.safetensors")
    loop_weights: dict[str, torch.Tensor] = {}
    restore = training._Loop.restore

    def spy(loop: training._Loop) -> None:
        restore(loop)
        loop_weights.update({name: t.clone() for name, t in loop.model.state_dict().items()})
        assert loop.optimizer.state_dict()["state"][0]["step"] == 12

    training._Loop.restore = spy  # type: ignore[method-assign]
    try:
        metrics = train(data, out, replace(TINY, steps=20), resume=True)
    finally:
        training._Loop.restore = restore  # type: ignore[method-assign]
    assert metrics["steps"] == 20
    for name, t in saved.items():
        torch.testing.assert_close(loop_weights[name], t, rtol=0, atol=0)


def test_a_kill_while_saving_leaves_the_older_checkpoint(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = f"""
import os
from pathlib import Path
from fastunet import checkpoint
from fastunet.training import TrainConfig, train
from accelerate import Accelerator
save, calls = Accelerator.save_state, []
def die_in_the_third(self, folder, **kwargs):
    calls.append(folder)
    save(self, folder, **kwargs)
    if len(calls) == 3:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), 9)
Accelerator.save_state = die_in_the_third
config = TrainConfig(steps=10, features=(4, 8), crop=32, batch_size=2, val_fraction=0.25, tta=False, precision="fp32")
train({str(data)!r}, {str(out)!r}, config)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == -signal.SIGKILL, result.stderr
    metrics = train(data, out, TINY, resume=True)
    assert metrics["steps"] == 10
    assert not list(out.glob(".checkpoint*"))


# --- errors before any work ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"max_minutes": 0.0}, "max_minutes: expected more than 0"),
        ({"lr": -1.0}, "expected lr > 0"),
        ({"precision": "fp8"}, "precision: expected one of auto, fp32, bf16, fp16, got 'fp8'"),
        ({"split": "first"}, "split: expected last or random, got 'first'"),
        ({"norm": "group"}, "norm: expected batch, instance or none, got 'group'"),
        ({"crop": 1}, "crop: expected at least 2 pixels for 2 levels, got 1"),
        ({"device": "tpu"}, "device: expected auto, cpu or cuda, got 'tpu'"),
        ({"val_fraction": 1.0}, "val_fraction: expected 0 <= fraction < 1, got 1"),
    ],
)
def test_bad_settings(change: dict, message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train(data, tmp_path / "run", replace(TINY, **change))
    assert not (tmp_path / "run").exists()


def test_images_smaller_than_the_net_takes(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cell_000.png: expected at least 128x128 pixels for 8 levels, got 64x64"):
        train(data, tmp_path / "run", replace(TINY, features=(1,) * 8, crop=128))


@pytest.mark.parametrize("classes", [None, 1, 3])
def test_nothing_is_learnt_from_background_alone(tmp_path: Path, classes: int | None) -> None:
    write_dataset(tmp_path, 4, size=64)
    for mask in (tmp_path / "masks").iterdir():
        Image.new("L", (64, 64)).save(mask)
    with pytest.raises(DataError, match=r"masks: expected foreground in at least one of 4 masks, got only 0"):
        train(tmp_path, tmp_path / "run", replace(TINY, classes=classes))
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_overwritten(data: Path, run: Path) -> None:
    before = (run / "model.safetensors").read_bytes()
    with pytest.raises(DataError, match=r"expected a folder without a run, got one that holds config.json"):
        train(data, run, TINY)
    with pytest.raises(DataError, match="expected a checkpoint to resume from, got none"):
        train(data, run, replace(TINY, steps=99), resume=True)
    assert (run / "model.safetensors").read_bytes() == before
    assert checkpoint.load_config(run).training["steps"] == TINY.steps


def test_resume_wants_the_same_settings_and_images(data: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a run to resume, got no config.json"):
        train(data, tmp_path / "none", TINY, resume=True)
    with pytest.raises(ConfigError, match=r"crop: expected 32, with which .* was begun, got 64"):
        train(data, run, replace(TINY, crop=64), resume=True)
    write_dataset(tmp_path / "other", 12, size=64)
    with pytest.raises(DataError, match="expected the 6 training images the run was begun with, got 9"):
        train(tmp_path / "other", run, TINY, resume=True)


def test_a_loss_that_is_not_finite_stops(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training._Loop, "_loss_of", lambda self, logits, labels: logits.sum() * float("nan"))
    with pytest.raises(FastUNetError, match="step 1: expected a finite loss, got nan"):
        train(data, tmp_path / "run", TINY)


def test_broken_runs_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config.json: expected the config.json of a training run, got no such file"):
        checkpoint.load_run(tmp_path)
    config, weights = run / "config.json", run / "model.safetensors"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"expected the config.json of a training run, got JSONDecodeError"):
        checkpoint.load_run(tmp_path)
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    with pytest.raises(DataError, match="expected the weights of a finished run, got no such file"):
        checkpoint.load_run(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="expected a whole safetensors file"):
        checkpoint.load_run(tmp_path)
