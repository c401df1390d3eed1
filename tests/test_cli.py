"""The command line, as a user runs it: what it leaves, and one error line with exit code 2 for what a user can mend."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="needs the extra train")

import numpy as np
import tifffile
from command import fastunet
from PIL import Image

from fastunet.synthetic import write_dataset

TINY = ["--steps", "4", "--features", "4,8", "--crop", "32", "--batch-size", "2", "--no-tta", "--precision", "fp32"]


def fastunet_command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fastunet", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "200", **environment},
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, 5, size=48)
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    result = fastunet_command("train", data, "--out", out, *TINY)
    assert result.returncode == 0, result.stderr
    assert "report.png" in result.stdout
    return out


def test_predict_writes_a_label_image_for_each(run: Path, data: Path, tmp_path: Path) -> None:
    result = fastunet("predict", run, data / "images", "--out", tmp_path / "labels", "--tile", "32")
    assert result.returncode == 0, result.stderr
    stems = {p.stem for p in (data / "images").iterdir()}
    assert {p.name for p in (tmp_path / "labels").iterdir()} == {f"{stem}.png" for stem in stems}
    for file in (tmp_path / "labels").iterdir():
        labels = np.array(Image.open(file))
        assert labels.shape == (48, 48)
        assert set(np.unique(labels)) <= {0, 255}


def test_predict_of_one_image(run: Path, data: Path, tmp_path: Path) -> None:
    image = sorted((data / "images").iterdir())[0]
    result = fastunet("predict", run, image, "--out", tmp_path, "--tta")
    assert result.returncode == 0, result.stderr
    assert [p.name for p in tmp_path.iterdir()] == [f"{image.stem}.png"]


def test_evaluate_scores_and_warns_of_training_images(run: Path, data: Path, tmp_path: Path) -> None:
    result = fastunet("evaluate", run, data, "--out", tmp_path / "scores.json")
    assert result.returncode == 0, result.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores["dice"]) == {"background", "foreground"}
    assert len(scores["images"]) == 5
    assert "4 of them have the names of training images" in result.stdout


def test_doctor() -> None:
    result = fastunet_command("doctor")
    assert result.returncode == 0, result.stderr
    for word in (
        "torch",
        "triton",
        "conv3x3_bias_relu",
        "max_pool2x2",
        "no Triton kernel for this op",
        "backend: auto",
    ):
        assert word in result.stdout
    forced = fastunet_command("doctor", FASTUNET_BACKEND="triton")
    assert "'triton' was asked for, but" in forced.stdout


def test_demo(tmp_path: Path) -> None:
    result = fastunet("demo", "--out", tmp_path / "demo", "--minutes", "0.02")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "demo/run/report.png").is_file()
    assert len(list((tmp_path / "demo/predictions").iterdir())) == 40
    assert "report.png" in result.stdout


def test_help_names_the_commands() -> None:
    result = fastunet("--help")
    assert result.returncode == 0
    for command in ("train", "predict", "evaluate", "doctor", "demo"):
        assert command in result.stdout


def grey(path: Path, size: tuple[int, int] = (48, 48), value: int = 0) -> None:
    Image.fromarray(np.full(size, value, np.uint8)).save(path)


# Each spoils one thing in a copy of good data; the error line must hold all of the words.
SPOILERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no masks": (lambda d: shutil.rmtree(d / "masks"), ("masks", "got")),
    "no images": (lambda d: [p.unlink() for p in (d / "images").iterdir()], ("images", ".png", "got")),
    "no partner": (lambda d: (d / "masks/cell_001.png").unlink(), ("masks", "cell_001.png")),
    "sizes": (lambda d: grey(d / "masks/cell_001.png", (40, 48)), ("cell_001.png", "48 x 48", "40 x 48")),
    "text": (lambda d: (d / "images/cell_001.png").write_text("hello"), ("images/cell_001.png",)),
    "truncated": (
        lambda d: (d / "images/cell_001.png").write_bytes((d / "images/cell_001.png").read_bytes()[:500]),
        ("images/cell_001.png",),
    ),
    "mask values": (lambda d: grey(d / "masks/cell_001.png", value=128), ("cell_001.png", "0 and 255", "128")),
    "channels": (
        lambda d: Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(d / "images/cell_001.png"),
        ("cell_001.png", "expected 1", "got 3"),
    ),
    "depth": (
        lambda d: Image.fromarray(np.zeros((48, 48), np.uint16)).save(d / "images/cell_001.png"),
        ("cell_001.png", "uint8", "uint16"),
    ),
}


@pytest.mark.parametrize("what", SPOILERS)
def test_bad_data_is_one_error_line_before_training(what: str, data: Path, tmp_path: Path) -> None:
    spoil, words = SPOILERS[what]
    shutil.copytree(data, tmp_path / "data")
    spoil(tmp_path / "data")
    result = fastunet("train", tmp_path / "data", "--out", tmp_path / "run", *TINY)
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "{tmp}/nowhere", "--out", "{tmp}/run"], ["nowhere", "got"]),
        (["train", "{data}", "--out", "{run}"], ["holds config.json", "--resume"]),
        (["train", "{data}", "--out", "{tmp}/run", "--resume"], ["expected a run to resume"]),
        (["train", "{data}", "--out", "{tmp}/run", "--val-fraction", "2"], ["val_fraction", "got 2"]),
        (["predict", "{tmp}", "{data}", "--out", "{tmp}/x"], ["config.json", "no such file"]),
        (["predict", "{run}", "{tmp}/nowhere", "--out", "{tmp}/x"], ["nowhere"]),
        (["predict", "{run}", "{tmp}/deep.tif", "--out", "{tmp}/x"], ["deep.tif", "uint8", "uint16"]),
        (["predict", "{run}", "{tmp}/one.png", "--out", "{tmp}/x"], ["one.png", "at least 2x2", "got 1x1"]),
        (["predict", "{run}", "{data}", "--out", "{tmp}/one.png"], ["one.png", "expected a folder"]),
    ],
)
def test_bad_arguments_are_one_error_line(
    arguments: list[str], words: list[str], data: Path, run: Path, tmp_path: Path
) -> None:
    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((48, 48), np.uint16))
    grey(tmp_path / "one.png", (1, 1))
    result = fastunet(*(a.format(data=data, run=run, tmp=tmp_path) for a in arguments))
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_sixteen_bits_keep_their_range(tmp_path: Path) -> None:
    """Two grey levels that differ only in the low byte: cut to 8 bits there would be nothing to learn."""
    generator = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for i in range(6):
        mask = generator.integers(0, 2, (6, 6)).repeat(8, 0).repeat(8, 1)
        tifffile.imwrite(tmp_path / f"data/images/{i}.tif", (30_000 + 100 * mask).astype(np.uint16))
        Image.fromarray((255 * mask).astype(np.uint8)).save(tmp_path / f"data/masks/{i}.png")
    result = fastunet("train", tmp_path / "data", "--out", tmp_path / "run", *TINY, "--steps", "60", "--lr", "0.01")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run/metrics.json").read_text())["dice"]["foreground"] > 0.9
