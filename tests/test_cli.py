"""The command line, as a user runs it: what it leaves, and one error line with exit code 2 for what a user can mend."""

from __future__ import annotations

import errno
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
import torch
from command import error_of, fastunet
from PIL import Image

from fastunet.checks import DataError
from fastunet.cli import demo, tune
from fastunet.data import synthetic
from fastunet.data.synthetic import write_dataset
from fastunet.inference import evaluation
from fastunet.train.config import TrainConfig

pytestmark = pytest.mark.usefixtures("undrawn_reports")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
TINY = ["--steps", "4", "--features", "4,8", "--crop", "32", "--batch-size", "2", "--no-tta", "--precision", "fp32"]


def test_evaluate_scores_and_warns_of_training_images(run: Path, data: Path, tmp_path: Path) -> None:
    result = fastunet("evaluate", run, data, "--out", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores["dice"]) == {"background", "foreground"}
    assert len(scores["images"]) == 8
    assert "6 of them are named like training images" in result.stdout
    # The foreground's score comes first, in the file and on the screen.
    assert next(iter(scores)) == "mean_dice"
    assert scores["mean_dice"] == scores["dice"]["foreground"]
    assert result.stdout.index("foreground") < result.stdout.index("background")


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_tune_shows_what_runs_each_layer(mode: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "chosen_device", lambda _: "cpu")
    result = fastunet("tune", run, "--precision", "fp32", *(["--train"] if mode == "training" else []))
    for words in (f"{mode}, fp32", "runs on", "aten"):
        assert words in result.stdout


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "write_dataset", lambda root, count: write_dataset(root, count // 10, size=64))
    monkeypatch.setattr(demo, "TrainConfig", lambda **options: TrainConfig(**{**options, "features": (4, 8)}))
    arguments = ("demo", "--out", tmp_path / "demo", "--minutes", "0.001")
    fastunet(*arguments)
    before = contents(tmp_path)
    assert "--overwrite" in error_of(*arguments)
    mine = tmp_path / "demo/data/years_of_work.png"
    grey(mine)
    assert str(mine) in error_of(*arguments, "--overwrite")
    mine.unlink()
    assert contents(tmp_path) == before
    result = fastunet(*arguments, "--overwrite")
    assert (tmp_path / "demo/run/report.png").is_file()
    assert len(list((tmp_path / "demo/predictions").iterdir())) == 4
    assert "report.png" in result.stdout


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def grey(path: Path, size: tuple[int, int] = (64, 64)) -> None:
    Image.fromarray(np.zeros(size, np.uint8)).save(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "{tmp}/nowhere", "--out", "{tmp}/run"], ["nowhere", "got"]),
        (["train", "{broken}", "--out", "{tmp}/x", *TINY], ["images/cell_001.png", "expected a readable image"]),
        (["train", "{data}", "--out", "{run}"], ["holds config.json", "--resume"]),
        (["predict", "{tmp}", "{data}", "--out", "{tmp}/x"], ["config.json", "no such file"]),
        (["predict", "{run}", "{tmp}/nowhere", "--out", "{tmp}/x"], ["nowhere"]),
        (["predict", "{run}", "{tmp}/deep.tif", "--out", "{tmp}/x"], ["deep.tif", "uint8", "uint16"]),
        (["predict", "{run}", "{tmp}/one.png", "--out", "{tmp}/x"], ["one.png", "at least 2x2", "got 1x1"]),
        (["predict", "{run}", "{data}", "--out", "{tmp}/one.png/x"], ["one.png", "expected a folder"]),
        (["predict", "{run}", "{data}", "--out", "{tmp}/dangling"], ["dangling", "a link to nothing"]),
        (["predict", "{run}", "{data}", "--out", "{tmp}/" + 300 * "y"], ["yyy", "name too long"]),
        (["predict", "{run}", "{data}", "--out", "/proc/x"], ["/proc", "expected a folder to write into"]),
        (["predict", "{run}", "{data}", "--out", "{tmp}/x", "--tile", "1"], ["tile", "at least 2x2"]),
        (["predict", "{run}", "{data}"], ["--out"]),
        (["predict", "{run}", "{tmp}/[/b].png", "--out", "{tmp}/x"], ["[/b].png", "nothing there"]),
        (["train", "{data}", "--out", "{tmp}/dangling/x", *TINY], ["dangling", "a link to nothing"]),
        (["train", "--out", "{tmp}/x", *TINY], ["data", "got none"]),
        (["train", "{data}", "--out", "{tmp}/\udcff", *TINY], ["UTF-8"]),
        (["train", "{data}", "--out", "{tmp}/x", "--features", "4;8"], ["features", "4;8"]),
        (["train", "{data}", "--out", "{tmp}/x", "--steps", "many"], ["--steps", "integer"]),
        (["train", "{data}", "--out", "{run}", "--resume", "--crop", "64"], ["crop", "expected 32", "got 64"]),
        (["train", "{data}", "--out", "{run}", "--resume", "--overwrite"], ["resume or overwrite"]),
        (["evaluate", "{run}", "{data}", "--out", "{tmp}"], ["expected nothing there"]),
        (["evaluate", "{run}", "{data}", "--out", "{data}/masks/x.json"], ["apart from the images and masks"]),
        (["check", "{data}", "--out", "{data}/masks/a/x.png"], ["apart from the images and masks"]),
        (["evaluate", "{run}", "{data}", "--tile", "1"], ["tile", "at least 2x2"]),
        (["evaluate", "{run}", "{data}", "--tolerance", "inf"], ["tolerance", "finite", "got inf"]),
        (["evaluate", "{run}", "{data}", "--threshold", "nan"], ["threshold", "finite", "got nan"]),
        (["evaluate", "{run}", "{data}", "--labels", "0," + 5000 * "9"], ["labels: expected values such as"]),
        (["check", "{data}", "--ignore", 5000 * "9" + ":0:0"], ["ignore: expected values such as"]),
        (["check", "{data}", "--threshold", "1e400"], ["threshold", "finite", "got inf"]),
        *((["check", "{data}", "--out", "{tmp}/x/" + n], ["PNG", n]) for n in ("y", "y.svg", "y.jpg", "y.z", ".png")),
        (["predict", "{run}", "{data}", "--out", "{tmp}/x", "--shard", "1/" + 5000 * "9"], ["shard: expected I/N"]),
        (["train", "{data}", "--out", "{tmp}/x", "--config", "{tmp}/a\nb"], ["/a b: No such file"]),
        (["tune", "--precision", "fp8"], ["precision", "got 'fp8'"]),
        pytest.param(["tune", "{run}"], ["expected a CUDA device", "got none"], marks=without_gpu),
        (["bench", "--out", "{tmp}/one.png", "--quick"], ["one.png", "expected a folder"]),
        (["bench", "--out", "{tmp}/x", "--size", "16", "--batch", "1"], ["more than one value per channel"]),
    ],
)
def test_bad_arguments_are_one_error_line(
    arguments: list[str], words: list[str], data: Path, run: Path, tmp_path: Path
) -> None:
    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((64, 64), np.uint16))
    grey(tmp_path / "one.png", (1, 1))
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    broken = shutil.copytree(data, tmp_path / "broken")
    (broken / "images/cell_001.png").write_bytes(b"hello")
    before = contents(tmp_path) | contents(run) | contents(data)
    line = error_of(*(a.format(data=data, run=run, tmp=tmp_path, broken=broken) for a in arguments))
    for word in words:
        assert word in line
    assert contents(tmp_path) | contents(run) | contents(data) == before
    assert not (tmp_path / "x").exists()


# --- what is there stays there ---


# Ways to say the folder of the images, or that of the masks.
SAME_FOLDERS: dict[str, Callable[[Path], tuple[Path, Path]]] = {
    "images": lambda d: (d, d / "images"),
    "masks": lambda d: (d, d / "masks"),
    "of one image": lambda d: (d / "images/cell_001.png", d / "images"),
    "relative": lambda d: (d, Path(os.path.relpath(d)) / "masks" / ".." / "images"),
    "a link to it": lambda d: (d, linked(d.parent / "link", d / "masks")),
    "where the images really are": lambda d: (moved_away(d), d.parent / "archive"),
}


def linked(link: Path, target: Path) -> Path:
    link.symlink_to(target)
    return link


def moved_away(data: Path) -> Path:
    """The images are links to files of a folder elsewhere."""
    (data / "images").rename(data.parent / "archive")
    (data / "images").mkdir()
    for file in (data.parent / "archive").iterdir():
        linked(data / "images" / file.name, file)
    return data


@pytest.mark.parametrize("how", SAME_FOLDERS)
def test_predictions_never_go_where_the_data_are(how: str, run: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    images, out = SAME_FOLDERS[how](tmp_path / "data")
    before = contents(tmp_path)
    for options in ([], ["--overwrite"]):
        line = error_of("predict", run, images, "--out", out, *options)
        assert "expected a folder apart from the images and masks" in line
    assert contents(tmp_path) == before


def test_predict_overwrites_only_predictions_and_only_when_asked(run: Path, data: Path, tmp_path: Path) -> None:
    arguments = ("predict", run, data, "--out", tmp_path / "out", "--tile", "32")
    fastunet(*arguments)
    first = tmp_path / "out/cell_001.png"
    before = contents(tmp_path)
    assert {path.stem for path in before} == {path.stem for path in (data / "images").iterdir()}
    assert set(np.unique(np.array(Image.open(first)))) <= {0, 255}
    assert "--overwrite replaces what fastunet wrote" in error_of(*arguments)
    fastunet(*arguments, "--overwrite")
    assert contents(tmp_path) == before
    for put in (lambda: grey(first), lambda: first.write_text("notes"), lambda: first.symlink_to(data / "images")):
        first.unlink()
        put()
        assert f"{first}: expected a file that fastunet wrote" in error_of(*arguments, "--overwrite")


@pytest.mark.parametrize("mine", ["notes.txt", "c/0/notes.txt"])
def test_a_zarr_array_is_overwritten_if_nothing_else_is_in_it(mine: str, run: Path, data: Path, tmp_path: Path) -> None:
    command = ("predict", run, data, "--out", tmp_path / "out", "--format", "zarr")
    for options in ([], ["--overwrite"]):
        fastunet(*command, *options)
    file = tmp_path / "out/cell_001.zarr" / mine
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    assert "cell_001.zarr: expected a file that fastunet wrote, got another" in error_of(*command, "--overwrite")
    assert file.read_text() == "mine"


def test_evaluate_and_bench_overwrite_only_their_own(run: Path, data: Path, tmp_path: Path) -> None:
    scores, rows = tmp_path / "scores.json", tmp_path / "bench/bench.json"
    rows.parent.mkdir()
    for arguments, file in (
        (["evaluate", run, data, "--out", scores], scores),
        (["bench", "--quick", "--size", "16", "--features", "4,8", "--rounds", "1", "--out", rows.parent], rows),
    ):
        file.write_text('{"mine": 1}')
        assert "expected nothing there" in error_of(*arguments)
        assert "expected a file that fastunet wrote" in error_of(*arguments, "--overwrite")
        assert file.read_text() == '{"mine": 1}'
    scores.unlink()
    fastunet("evaluate", run, data, "--out", scores)
    fastunet("evaluate", run, data, "--out", scores, "--overwrite")


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_all_images_are_checked_before_the_first_result(command: str, run: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "data/images/cell_004.png")
    assert "cell_004.png" in error_of(command, run, tmp_path / "data", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_instance_norm_wants_more_than_one_pixel_at_the_bottom(data: Path, tmp_path: Path) -> None:
    fastunet("train", data, "--out", tmp_path / "run", *TINY, "--norm", "instance", "--steps", "1")
    grey(tmp_path / "small.png", (3, 3))
    for arguments in ([tmp_path / "small.png"], [data, "--tile", "3"]):
        line = error_of("predict", tmp_path / "run", *arguments, "--out", tmp_path / "out")
        assert "expected at least 2x4 pixels for 2 levels with instance norm, got 3x3" in line


# --- resuming by the command line ---


def test_resume_needs_nothing_retyped(data: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    before = json.loads((out / "config.json").read_text())["training"]
    for options, steps in (([], 10), (["--steps", "12"], 12), ([data, "--steps", "13", "--workers", "1"], 13)):
        result = fastunet("train", "--out", out, "--resume", *options)
        assert json.loads((out / "metrics.json").read_text())["steps"] == steps
    after = json.loads((out / "config.json").read_text())["training"]
    assert after == before | {"steps": 13, "workers": 1}
    assert "weights: step " in result.stdout


# --- what the system refuses ---


def test_any_name_goes_through_all_commands(data: Path, tmp_path: Path) -> None:
    root, names = tmp_path / "[/b]", ["[red]x", ":smile:", "$\\a$b", "a\nb", "\udcff"]
    shutil.copytree(data, root)
    for folder in ("images", "masks"):
        for file, name in zip(sorted((root / folder).iterdir()), names, strict=False):
            file.rename(root / folder / f"{name}.png")
    out = root / "run"
    for arguments in (
        ["train", root, "--out", out, *TINY],
        ["predict", out, root, "--out", root / "out"],
        ["evaluate", out, root, "--out", root / "x.json"],
    ):
        result = fastunet(*arguments)
        assert "[/b]" in result.stdout
    assert {*names} <= {file.stem for file in (root / "out").iterdir()}
    error_of("predict", out, root, "--out", root / "out")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("Unable to allocate 36 GiB"), ["not enough memory", "36 GiB"]),
        (torch.OutOfMemoryError("CUDA out of memory"), ["not enough memory"]),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: 9 bytes"), ["not enough memory"]),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."), ["fewer workers"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["No space left"]),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), ["/x/y: Permission denied"]),
        (
            DataError(
                "Caught DataError in DataLoader worker process 0.\nOriginal Traceback\n\nfastunet.checks.DataError: a"
            ),
            ["error: a"],
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_system_refuses_is_one_line(
    error: Exception, words: list[str], run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(evaluation, "evaluate", fail)
    line = error_of("evaluate", run, data)
    for word in words:
        assert word in line


def test_an_error_of_ours_keeps_its_traceback(run: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "evaluate", lambda: None)
    with pytest.raises(TypeError):
        fastunet("evaluate", run, data)


def test_output_that_nobody_takes() -> None:
    """A full disk is an error, a reader that has left is not; of a command that does not wait for torch."""
    command = [sys.executable, "-m", "fastunet", "--help"]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (2, "error: output: [Errno 28] No space left on device\n")
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writing)
    assert (result.returncode, result.stderr) == (0, "")
