"""Training on a folder: what a run leaves, interruption at any moment, resuming, and errors before any work."""

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
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kornia", reason="needs the extra train")

import numpy as np
import torch
from accelerate import Accelerator
from killed_training import kill_runs
from PIL import Image
from safetensors.torch import load_file

from fastunet import UNet
from fastunet.checks import ConfigError, DataError, FastUNetError, Interrupted
from fastunet.data.synthetic import write_dataset
from fastunet.files import written_whole
from fastunet.inference.predict import evaluate
from fastunet.train import checkpoint, loop
from fastunet.train.checkpoint import checkpoints, read_progress
from fastunet.train.loop import TrainConfig, rate_at, train

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
        replace(TINY, steps=10**9, max_minutes=0.02),
        on_step=lambda progress: rates.append(rate_at(progress.fraction)),
    )
    assert 1.2 <= metrics["seconds"] < 1.2 + (time.perf_counter() - start)
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


def test_multi_class_and_colour(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for i in range(4):
        labels = generator.integers(0, 3, (8, 8)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
        image = np.stack([labels * 80 + generator.integers(0, 40, labels.shape) for _ in range(3)], -1)
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


# --- stopped at any moment, and resumed ---


class Killed(BaseException):
    """As if the process ended there: nothing catches it."""


def killed(*args: Any, **options: Any) -> None:
    raise Killed


def stop_at(step: int, how: Callable[[], None]) -> Callable[[loop.Progress], None]:
    return lambda progress: how() if progress.step == step else None


def losses_of(data: Path | None, out: Path, config: TrainConfig | None, **options: Any) -> dict[int, float]:
    """The loss of each step of a training, however it ends."""
    losses: dict[int, float] = {}
    stop = options.pop("stop", lambda progress: None)

    def note(progress: loop.Progress) -> None:
        losses[progress.step] = progress.loss
        stop(progress)

    with suppress(Killed, Interrupted):
        train(data, out, config, on_step=note, **options)
    return losses


@pytest.mark.parametrize(("norm", "workers", "stop"), [("batch", 0, "kill"), ("instance", 1, "Ctrl-C")])
def test_resuming_is_exact(norm: str, workers: int, stop: str, data: Path, tmp_path: Path) -> None:
    """Across the end of an epoch, of 100 steps, from a checkpoint within one: losses and weights to the bit."""
    config = replace(TINY, steps=110, norm=norm, workers=workers, crop=16, device="cpu")
    whole = losses_of(data, tmp_path / "whole", config)
    how = killed if stop == "kill" else lambda: os.kill(os.getpid(), signal.SIGINT)
    first = losses_of(data, tmp_path / "run", config, stop=stop_at(97, how))
    kept = read_progress(checkpoints(tmp_path / "run")[-1])["step"]
    assert kept == (88 if stop == "kill" else 98)
    rest = losses_of(None, tmp_path / "run", None, resume=True)
    assert list(rest) == list(range(kept + 1, 111))
    assert first | rest == whole
    for name in ("model.safetensors", "checkpoint-000110/model.safetensors"):
        weights, expected = load_file(tmp_path / "run" / name), load_file(tmp_path / "whole" / name)
        assert all(torch.equal(weights[key], expected[key]) for key in expected)
    history, expected_history = (
        [{k: v for k, v in row.items() if k != "minutes"} for row in csv.DictReader((folder / "history.csv").open())]
        for folder in (tmp_path / "run", tmp_path / "whole")
    )
    assert history == expected_history


@pytest.mark.parametrize("moment", ["save_config", "save_checkpoint", "save_weights", "write_report"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_kill_at_any_moment_is_no_dead_end(
    moment: str, resume: bool, data: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, moment, killed)
        losses_of(data, tmp_path / "run", TINY)
    if resume and moment != "save_config":
        train(None, tmp_path / "run", resume=True)
    elif moment in ("save_weights", "write_report"):
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
    out = tmp_path / "run"
    shutil.copytree(run, out)
    assert losses_of(data, out, None, resume=True) == {}
    assert_same_files(out, run)
    assert list(losses_of(data, out, replace(TINY, steps=13), resume=True)) == [11, 12, 13]
    assert [folder.name for folder in checkpoints(out)] == ["checkpoint-000013"]
    assert json.loads((out / "metrics.json").read_text())["steps"] == 13


def test_a_limit_of_time_that_is_used_up(data: Path, tmp_path: Path) -> None:
    config = replace(TINY, steps=10**6, max_minutes=0.005)
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

    assert list(losses_of(data, tmp_path / "run", TINY, stop=stop_at(5, second))) == list(range(1, 11))


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "one bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "missing": lambda content: None,
}


class Loaded:
    """Stands for an Accelerator: notes what it is to load."""

    folder = ""

    def load_state(self, folder: str) -> None:
        self.folder = folder


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("optimizer.bin", "missing"),
        ("progress.json", "half"),
        ("model.safetensors", "one bit"),
        ("SHA256SUMS", "empty"),
        ("SHA256SUMS", "missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    name: str, damage: str, data: Path, stopped: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    older, newest = checkpoints(out)

    def spoil(folder: Path) -> str:
        content = DAMAGE[damage]((folder / name).read_bytes())
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        # Of spoilt sums the first file that they do not vouch for is named.
        return re.escape(str(folder)) + ("" if name == "SHA256SUMS" else f"/{name}")

    loaded: Any = Loaded()
    with pytest.warns(UserWarning, match=spoil(newest) + ".*; going on from .*000002"):
        progress, _ = checkpoint.load_checkpoint(out, loaded) or ({}, None)
    assert (loaded.folder, progress["step"]) == (str(older), 2)
    spoil(older)
    with pytest.raises(DataError, match=rf"{re.escape(str(newest))}.*: remove .*, or that folder, to begin anew"):
        train(data, out, resume=True)


@pytest.fixture(scope="module")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its third checkpoint."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    losses_of(data, out, TINY, stop=stop_at(3, killed))
    return out


def test_a_disk_that_is_full_costs_no_checkpoint(data: Path, stopped: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the disk: it refuses files of more than that."""
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(DataError, match=r"checkpoint-000004: expected to write it, with \d+ MiB free, got: "):
            train(None, out, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [folder.name for folder in checkpoints(out)] == ["checkpoint-000002", "checkpoint-000003"]
    assert not list(out.glob(".*"))
    assert len(losses_of(None, out, None, resume=True)) == 7


def test_the_weights_are_the_best_by_validation(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = iter([0.1, 0.2, 0.8, 0.3, 0.8, *5 * [0.5]])

    def scored(model: UNet, samples: Any, names: list[str], *, tile: int, tta: bool | None = None) -> Any:
        if tta is None:
            return {"mean_dice": next(dice), "dice": {}}, []
        return evaluate(model, samples, names, tile=tile, tta=tta)

    monkeypatch.setattr(loop, "evaluate", scored)
    states: dict[int, dict[str, torch.Tensor]] = {}
    weights = loop._Loop._weights

    def note(loop: loop._Loop) -> dict[str, torch.Tensor]:
        states[loop.progress.step] = weights(loop)
        return states[loop.progress.step]

    monkeypatch.setattr(loop._Loop, "_weights", note)
    losses_of(data, tmp_path / "run", TINY, stop=stop_at(7, killed))
    metrics = train(None, tmp_path / "run", resume=True)
    assert metrics["weights"] == "step 3 of 10: best validation Dice of the foreground, 0.8000"
    assert checkpoint.load_config(tmp_path / "run").weights == metrics["weights"]
    assert list(states) == [1, 2, 3]
    kept = load_file(tmp_path / "run/model.safetensors")
    assert all(torch.equal(kept[name], states[3][name]) for name in kept)


# --- errors before any work ---

NAN, INFINITE = float("nan"), float("inf")
BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    *(({name: 0}, f"{name}: expected 1 to") for name in ("steps", "batch_size")),
    *(({"crop": value}, f"crop: expected 3 to 65536, got {value}") for value in (-1, 2, 10**9)),
    *(({name: value}, f"{name}: expected ") for name in ("lr", "max_minutes") for value in (NAN, -1.0, 0.0)),
    *(({name: INFINITE}, f"{name}: expected a finite number from 0, got inf") for name in ("lr", "weight_decay")),
    *(({"weight_decay": value}, "weight_decay: expected ") for value in (NAN, -1.0)),
    *(({"val_fraction": value}, "val_fraction: expected 0 <= fraction < 1") for value in (NAN, -0.1, 1.0)),
    *(({"seed": value}, f"seed: expected 0 to 4294967295, got {value}") for value in (-1, 2**32)),
    *(({"workers": value}, f"workers: expected 0 to 256, got {value}") for value in (-1, 10**6)),
    *(({"classes": value}, f"classes: expected 1 to 256, got {value}") for value in (0, 257)),
    *(({"features": value}, "features: expected 2 to 16 numbers from 1 ") for value in ((16,), (), (0, 8), (-4, 8))),
    *(({"features": value}, "features: expected 2 to 16 numbers from 1 ") for value in ((8, 2**17), 17 * (1,))),
    ({"crop": 3, "features": (4, 4, 4)}, "crop: expected at least 4x4 pixels for 3 levels, got 3x3"),
    ({"crop": 3, "norm": "instance"}, "crop: expected at least 2x4 pixels .* with instance norm, got 3x3"),
    (
        {"crop": 3, "batch_size": 1},
        "batch_size, crop: expected more than one value per channel .* batch of 2, or crops of 4",
    ),
    *(({name: "odd"}, f"{name}: expected one of .*, got 'odd'") for name in ("precision", "split", "norm", "device")),
]


@pytest.mark.parametrize(
    ("change", "message"), BAD_SETTINGS, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_bad_settings(change: dict[str, Any], message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train(data, tmp_path / "run", replace(TINY, **change))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change", [{"crop": 3, "batch_size": 2}, {"crop": 4, "batch_size": 1}, {"crop": 4, "norm": "instance"}]
)
def test_the_smallest_crops_train(change: dict[str, Any], data: Path, tmp_path: Path) -> None:
    """What the settings let through, the norms can take statistics of."""
    train(data, tmp_path / "run", replace(TINY, steps=1, val_fraction=0.0, **change))


def test_images_smaller_than_the_net_takes(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cell_000.png: expected at least 128x128 pixels for 8 levels, got 64x64"):
        train(data, tmp_path / "run", replace(TINY, features=(1,) * 8, crop=128))


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "metrics.json", "history.csv", "report.png", "checkpoint-000500"]
)
def test_files_that_are_not_a_runs_stay(name: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=f"expected a folder without files of a run's names, got {name}"):
            train(data, tmp_path, TINY, overwrite=overwrite)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "{}", "notes.txt": "mine"}


def test_a_run_is_begun_anew_only_when_asked_and_what_is_beside_it_stays(
    data: Path, stopped: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"expected a folder without a run, got one that holds config.json"):
        train(data, out, TINY)
    assert list(losses_of(data, out, replace(TINY, steps=2), overwrite=True)) == [1, 2]
    assert [folder.name for folder in checkpoints(out)] == ["checkpoint-000002"]
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_the_folders_of_the_data_are_no_place_for_a_run(folder: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(data / folder)
    before = sorted((data / folder).iterdir())
    with pytest.raises(DataError, match="expected a folder apart from the images and masks"):
        train(data, tmp_path / "link", TINY)
    assert sorted((data / folder).iterdir()) == before


def test_resume_wants_the_same_settings_and_images(data: Path, stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a run to resume, got no config.json"):
        train(data, tmp_path / "none", TINY, resume=True)
    with pytest.raises(ConfigError, match=r"crop: expected 32, with which .* was begun, got 64"):
        train(data, stopped, replace(TINY, crop=64), resume=True)
    with pytest.raises(ConfigError, match=r"steps: expected at least the 3 that are done, got 2"):
        train(data, stopped, replace(TINY, steps=2), resume=True)
    write_dataset(tmp_path / "other", 12, size=64)
    with pytest.raises(DataError, match="expected the 6 training images the run was begun with, got 9"):
        train(tmp_path / "other", stopped, TINY, resume=True)
    write_dataset(tmp_path / "larger", 8, size=80)
    with pytest.raises(DataError, match=r"expected size_min \(64, 64\) of the images .* got \(80, 80\)"):
        train(tmp_path / "larger", stopped, TINY, resume=True)
    assert [folder.name for folder in checkpoints(stopped)] == ["checkpoint-000002", "checkpoint-000003"]


def test_a_loss_that_is_not_finite_stops(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop._Loop, "_loss_of", lambda self, logits, labels: logits.sum() * float("nan"))
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
