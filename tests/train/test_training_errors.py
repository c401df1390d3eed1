"""What a training refuses before any work, and what it leaves alone then."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import save
from stopped_training import TINY, losses_of

import fastunet
from fastunet.checks import ConfigError, DataError, FastUNetError
from fastunet.data import DataOptions
from fastunet.data.synthetic import write_dataset
from fastunet.train import checkpoint
from fastunet.train.checkpoint import checkpoints
from fastunet.train.checks import resumed_config
from fastunet.train.events import EVENTS
from fastunet.train.loop import train
from fastunet.train.loss import TrainingLoss

NAN = float("nan")
BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    *(({name: 0}, f"{name}: expected 1 to") for name in ("steps", "batch_size", "classes")),
    *(({"crop": value}, f"crop: expected 3 to 65536, got {value}") for value in (2, 10**9)),
    *(({name: value}, f"{name}: expected ") for name in ("lr", "max_minutes") for value in (NAN, 0.0)),
    ({"lr": float("inf")}, "lr: expected a finite number from 0, got inf"),
    ({"weight_decay": -1.0}, "weight_decay: expected a finite number from 0, got -1.0"),
    *(({"val_fraction": value}, "val_fraction: expected 0 <= fraction < 1") for value in (NAN, 1.0)),
    ({"seed": 2**32}, "seed: expected 0 to 4294967295, got 4294967296"),
    ({"workers": -1}, "workers: expected 0 to 256, got -1"),
    *(({"features": value}, "features: expected 2 to 16 numbers from 1 ") for value in ((16,), (0, 8), 17 * (1,))),
    ({"crop": 3, "features": (4, 4, 4)}, "crop: expected at least 4x4 pixels for 3 levels, got 3x3"),
    ({"crop": 3, "norm": "instance"}, "crop: expected at least 2x4 pixels .* with instance norm, got 3x3"),
    ({"crop": 3, "batch_size": 1}, "batch_size, crop: expected more than one value .* batch of 2, or crops of 4"),
    *(({"fold": fold}, "fold: expected I/N with 1 <= I <= N") for fold in ("0/3", "4/3", "1/1", "2", "a/b")),
    *(
        ({"class_weights": text}, "class_weights: expected none, balanced or positive numbers")
        for text in ("even", "1,0", "1,nan", "1,,2")
    ),
    *(
        ({"features": widths, "deep_supervision": True}, "deep_supervision: expected at least 4 levels, got ")
        for widths in ((4, 8), (4, 8, 8))
    ),
    ({"precision": "fp16", "device": "cpu"}, "precision: expected one that the device has, got fp16: a CPU trains in"),
    ({"patience": 1, "val_fraction": 0.0}, "patience: expected images kept out, by whose scores to end, got none"),
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
    "name",
    ["config.json", "model.safetensors", "metrics.json", "history.csv", "report.png", "checkpoint-000500", EVENTS],
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
    out = shutil.copytree(stopped, tmp_path / "run")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"expected a folder without a run, got one that holds config.json"):
        train(data, out, TINY)
    assert list(losses_of(data, out, replace(TINY, steps=2), overwrite=True)) == [1, 2]
    assert [folder.name for folder in checkpoints(out)] == ["checkpoint-000002"]
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("below", ["", "run", "a/run"])
@pytest.mark.parametrize("folder", ["images", "masks"])
def test_the_folders_of_the_data_are_no_place_for_a_run(folder: str, below: str, data: Path, tmp_path: Path) -> None:
    """Nor are those within, which are searched for images too: the report would be one when the run is resumed."""
    (tmp_path / "link").symlink_to(data / folder)
    before = sorted((data / folder).iterdir())
    with pytest.raises(DataError, match="expected a folder apart from the images and masks"):
        train(data, tmp_path / "link" / below, TINY)
    assert sorted((data / folder).iterdir()) == before


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_above_nested_images_is_no_place_for_a_run(folder: str, data: Path, tmp_path: Path) -> None:
    for each in ("images", "masks"):
        shutil.copytree(data / each, tmp_path / each / "nested")
    with pytest.raises(DataError, match=f"expected a folder apart from the images and masks, got one in .*{folder}"):
        train(tmp_path, tmp_path / folder, TINY)
    assert list(losses_of(tmp_path, tmp_path / "run", replace(TINY, steps=1))) == [1]


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


def test_a_checkpoint_of_another_net_is_one_error(data: Path, stopped: Path, tmp_path: Path) -> None:
    """As after features that were changed by hand."""
    out = shutil.copytree(stopped, tmp_path / "run")
    path = out / "config.json"
    config = json.loads(path.read_text())
    features = [2 * each for each in config["training"]["features"]]
    config["training"]["features"] = config["model"]["features"] = features
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"000003: expected a checkpoint of the net in config.json, got another's"):
        train(data, out, None, resume=True)
    assert [folder.name for folder in checkpoints(out)] == ["checkpoint-000002", "checkpoint-000003"]


def test_a_run_is_no_weights_for_the_one_that_replaces_it(data: Path, run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(run, tmp_path / "run")
    before = (out / "model.safetensors").read_bytes()
    for source in (out, out / "model.safetensors"):
        with pytest.raises(ConfigError, match=f"init: expected weights of another run than {out}, .*, got {source}"):
            train(data, out, replace(TINY, init=str(source)), overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    train(data, tmp_path / "new", replace(TINY, init=str(out), steps=1))


def test_initial_weights_are_looked_for_before_the_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        train(tmp_path / "no data", tmp_path / "run", replace(TINY, init=str(tmp_path / "nowhere")))


def test_the_first_images_may_be_ignored_as_a_whole(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", 6, size=64)
    for file in sorted((tmp_path / "data/masks").iterdir())[:4]:
        save(file, np.full((64, 64), 128, np.uint8))
    config = replace(TINY, val_fraction=0.0)
    metrics = train(tmp_path / "data", tmp_path / "run", config, reading=DataOptions(ignore="128"))
    assert "dice" not in metrics
    assert (tmp_path / "run/model.safetensors").is_file()


def test_a_loss_that_is_not_finite_stops(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingLoss, "forward", lambda self, logits, labels: logits.sum() * float("nan"))
    with pytest.raises(FastUNetError, match="step 1: expected a finite loss, got nan"):
        train(data, tmp_path / "run", TINY)


def places_of(value: Any, *before: str) -> Iterator[tuple[str, ...]]:
    for name, each in value.items() if isinstance(value, dict) else ():
        yield *before, name
        yield from places_of(each, *before, name)


@pytest.mark.parametrize("wrong", [[[]], {"?": 0}, True], ids=str)
def test_a_value_of_another_type_in_the_config_is_named(wrong: Any, run: Path, tmp_path: Path) -> None:
    """Wherever it is but in the model, of which the weights tell the rest."""
    text = (run / "config.json").read_text()
    flags = {("training", name) for name in ("flip", "deep_supervision", "tta", "tensorboard", "sync_batch_norm")}
    places = {place for place in places_of(json.loads(text)) if place[0] != "model"}
    for place in places - ({*flags, ("data", "mixed")} if wrong is True else set()):
        part = changed = json.loads(text)
        for name in place[:-1]:
            part = part[name]
        part[place[-1]] = wrong
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match=r"config.json: expected the (config.json|settings) of a training"):
            resumed_config(tmp_path, {})


def test_a_net_is_told_by_its_weights_where_the_config_does_not(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps({**config, "model": {}}))
    with pytest.raises(DataError, match="expected at least 2x2 pixels for 2 levels, got 1x1"):
        fastunet.load(tmp_path / "run", "cpu").source_of(np.zeros((1, 1), np.uint8))


def test_broken_runs_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config.json: expected the config.json of a training run, got no such file"):
        checkpoint.load_run(tmp_path)
    config, weights = run / "config.json", run / "model.safetensors"
    for text, error in (("{", "JSONDecodeError"), (10**5 * "[", "RecursionError")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DataError, match=rf"expected the config.json of a training run, got {error}"):
            checkpoint.load_run(tmp_path)
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    with pytest.raises(DataError, match="expected the weights of a finished run, got no such file"):
        checkpoint.load_run(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="expected a whole safetensors file"):
        checkpoint.load_run(tmp_path)
