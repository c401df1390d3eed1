"""The command line, as a user runs it: what it leaves, and one error line with exit code 2 for what a user can mend."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="needs the extra train")

import numpy as np
import tifffile
import torch
from command import fastunet
from fastunet.kernels import autotune, gpu
from PIL import Image
from typer.main import get_command

from fastunet import __version__, backend, dispatch
from fastunet.checks import DataError
from fastunet.cli import app, demo, doctor, tune
from fastunet.data import synthetic
from fastunet.data.synthetic import write_dataset
from fastunet.inference import evaluation
from fastunet.torch_private import FakeTensorMode
from fastunet.train.config import TrainConfig

pytestmark = pytest.mark.usefixtures("undrawn_reports")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
TINY = ["--steps", "4", "--features", "4,8", "--crop", "32", "--batch-size", "2", "--no-tta", "--precision", "fp32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, 5, size=48)
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    result = fastunet("train", data, "--out", out, *TINY)
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


def test_evaluate_scores_and_warns_of_training_images(run: Path, data: Path, tmp_path: Path) -> None:
    result = fastunet("evaluate", run, data, "--out", tmp_path / "scores.json")
    assert result.returncode == 0, result.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores["dice"]) == {"background", "foreground"}
    assert len(scores["images"]) == 5
    assert "4 of them have the names of training images" in result.stdout
    # The foreground's score comes first, in the file and on the screen.
    assert next(iter(scores)) == "mean_dice"
    assert scores["mean_dice"] == scores["dice"]["foreground"]
    assert result.stdout.index("foreground") < result.stdout.index("background")


# --- doctor ---

OF_GPU = {"op": "conv1x1", "dtype": "float32"}


def doctors_lines() -> list[str]:
    """What `fastunet doctor` says, in lines that fit anywhere."""
    result = fastunet("doctor")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines if os.sep not in line) <= 100, "but for a path, which is not broken"
    assert len(lines) <= 26, "a few rows, not one for each op"
    return lines


def beginning(lines: list[str], word: str) -> str:
    (line,) = (line for line in lines if line.startswith(f"{word} "))
    return " ".join(line.split())


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that says what it is, and has tensors without data."""
    properties = types.SimpleNamespace(
        name="sm_90", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30
    )
    for name, value in (("is_available", True), ("device_count", 1), ("get_device_properties", properties)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(gpu, "target", lambda _: gpu.known_target(90))
    empty = torch.empty

    def of_no_data(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        with FakeTensorMode() if str(device) == "cuda" else nullcontext():
            return empty(*size, device=device, **options)

    monkeypatch.setattr(torch, "empty", of_no_data)


@without_gpu
def test_doctor_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = doctors_lines()
    assert f"fastunet {__version__}, Python " in beginning(lines, "versions")
    assert any("3x3 conv" in line and line.startswith("cpu") for line in lines)
    assert sum("TRITON_INTERPRET" in line for line in lines) <= 1, "the same sentence once"
    assert beginning(lines, "next").startswith("next fastunet demo: ")
    Path("fastunet-demo").mkdir()
    assert beginning(doctors_lines(), "next").startswith("next fastunet check DATA")
    with backend("triton"):
        lines = doctors_lines()
    assert "'triton' was asked for, but" in " ".join(lines)
    assert beginning(lines, "backend").startswith("backend triton ")


@without_gpu
def test_doctor_beside_a_gpu_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path)
    assert "install a CUDA build of torch" in beginning(doctors_lines(), "next")


def test_doctor_without_triton(fake_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    lines = doctors_lines()
    (row,) = (line for line in lines if line.startswith("cuda "))
    assert row.split("  ")[-1].strip() == "triton is not installed", "one reason, one row"
    assert beginning(lines, "next").startswith("next pip install triton: ")
    assert not any(line.startswith("measured") for line in lines)


def test_doctor_with_a_gpu_of_which_nothing_is_known(fake_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs triton, whose version is part of an environment")
    lines = doctors_lines()
    assert beginning(lines, "cuda:0") == "cuda:0 sm_90: sm_90, 132 SMs, 80 GiB"
    assert "each is when it first runs" in " ".join(lines)
    assert beginning(lines, "measured") == "measured 0 layers, Triton faster in 0; kernels checked: 0, failed: 0"
    assert beginning(lines, "next").startswith("next fastunet tune: ")
    monkeypatch.setattr(dispatch, "_tune", "0")
    assert "FASTUNET_TUNE=0" in " ".join(doctors_lines())


def test_doctor_tells_what_is_known_of_the_kernels(fake_gpu: None) -> None:
    pytest.importorskip("triton", reason="needs triton, whose version is part of an environment")
    shape = {"c_out": 2, "c_in": 64, "width": 8, "training": False}
    known = [OF_GPU | {"shape": {}, "failed": ""}]
    known += [OF_GPU | {"shape": shape | {"height": h}, "speedup": h / 8} for h in (4, 8, 16, 24)]
    for op in ("max_pool2x2", "segmentation_sums"):
        known += [OF_GPU | {"op": op, "shape": {}, "failed": "its check failed: y is off"}]
    autotune.put("sm_90", known)
    lines = doctors_lines()
    text = " ".join(" ".join(lines).split())
    (row,) = (line for line in lines if line.startswith("cuda ") and "1x1 conv in inf" in line)
    assert "triton, aten" in row
    assert "faster in 2 of 4 measured, 2.00 to 3.00 times as fast" in text
    assert beginning(lines, "measured") == "measured 4 layers, Triton faster in 2; kernels checked: 3, failed: 2"
    assert "not used max_pool2x2 in float32, segmentation_sums in float32: its check failed: y is off" in text
    assert str(autotune.cache_file("sm_90")) in text
    assert "fastunet tune" not in beginning(lines, "next")


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_tune_shows_what_runs_each_layer(mode: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "chosen_device", lambda _: "cpu")
    result = fastunet("tune", run, "--precision", "fp32", *(["--train"] if mode == "training" else []))
    assert result.returncode == 0, result.stderr
    for words in (f"{mode}, fp32", "runs on", "aten"):
        assert words in result.stdout


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "write_dataset", lambda root, count: write_dataset(root, count // 10, size=64))
    monkeypatch.setattr(demo, "TrainConfig", lambda **options: TrainConfig(**{**options, "features": (4, 8)}))
    arguments = ("demo", "--out", tmp_path / "demo", "--minutes", "0.001")
    result = fastunet(*arguments)
    assert result.returncode == 0, result.stderr
    before = contents(tmp_path)
    assert "--overwrite" in error_of(fastunet(*arguments))
    mine = tmp_path / "demo/data/years_of_work.png"
    grey(mine)
    assert str(mine) in error_of(fastunet(*arguments, "--overwrite"))
    mine.unlink()
    assert contents(tmp_path) == before
    result = fastunet(*arguments, "--overwrite")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "demo/run/report.png").is_file()
    assert len(list((tmp_path / "demo/predictions").iterdir())) == 4
    assert "report.png" in result.stdout


# --- help, version, completion ---

COMMANDS = ("check", "train", "predict", "evaluate", "export", "tune", "bench", "doctor", "demo")
SCRIPT = Path(sys.executable).with_name("fastunet")
needs_script = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the command `fastunet` beside Python")


def test_help_shows_commands_and_defaults() -> None:
    listed = fastunet("--help").stdout
    shown = {command: " ".join(fastunet(command, "--help").stdout.replace("│", " ").split()) for command in COMMANDS}
    assert all(command in listed for command in COMMANDS)
    assert "[default: 3000]" in shown["train"]
    assert "[inferred from the masks]" in shown["train"], "brackets are no markup"
    assert "[256; 512 on a GPU; 128 --quick]" in shown["bench"]
    for command in COMMANDS:
        assert fastunet(command, "-h").stdout == fastunet(command, "--help").stdout


def options_of(command: str) -> list[Any]:
    group: Any = get_command(app)
    return [each for each in group.commands[command].params if each.param_type_name == "option" and each.name != "help"]


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_in_groups_and_say_their_defaults(command: str) -> None:
    groups = {
        "Data",
        "Model",
        "Training",
        "Validation",
        "Prediction",
        "Objects",
        "Scores",
        "Hardware",
        "Duration",
        "Output",
    }
    for each in options_of(command):
        assert each.rich_help_panel in groups, each.name
        assert each.help, each.name
        has_default = each.required or each.default not in (None, "") or "[" in each.help
        # Without a value nothing is done for them: the text says for which data they are.
        assert has_default or each.name in ("mask_suffix", "ignore", "threshold", "out", "config"), each.name


def test_the_settings_of_a_training_are_its_options() -> None:
    settings = {each.name: each.metadata["group"].capitalize() for each in fields(TrainConfig)}
    found = {each.name: each.rich_help_panel for each in options_of("train")}
    assert {name: found[name] for name in settings} == settings


def test_version() -> None:
    result = fastunet("--version")
    assert (result.returncode, result.stdout) == (0, f"fastunet {__version__}\n")


@needs_script
def test_help_costs_less_than_half_a_second() -> None:
    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([SCRIPT, "train", "--help"], check=True, stdout=subprocess.DEVNULL, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    least = min(cpu_seconds() for _ in range(5))
    if least >= 0.5 and os.getloadavg()[0] > 2 * (os.cpu_count() or 1):
        pytest.skip("other work on this machine slows every process down")
    assert least < 0.5


@needs_script
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_of_a_shell(shell: str, tmp_path: Path) -> None:
    def run_in(**variables: str) -> str:
        environment = {**os.environ, "HOME": str(tmp_path), **variables}
        # The shell is told, not looked for among the parents of this process.
        environment["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
        command = [SCRIPT] if "_FASTUNET_COMPLETE" in variables else [SCRIPT, "--install-completion", shell]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "completion installed" in run_in()
    installed = "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    assert "_FASTUNET_COMPLETE" in installed
    for words, completed in (("fastunet tr", "train"), ("fastunet train --max", "--max-minutes")):
        place = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        if shell != "bash":
            place = {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        assert completed in run_in(_FASTUNET_COMPLETE=f"complete_{shell}", **place)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_of(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of what was refused."""
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def grey(path: Path, size: tuple[int, int] = (48, 48), value: int = 0) -> None:
    Image.fromarray(np.full(size, value, np.uint8)).save(path)


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
        (["evaluate", "{run}", "{data}", "--tile", "1"], ["tile", "at least 2x2"]),
        (["tune", "--precision", "fp8"], ["precision", "got 'fp8'"]),
        pytest.param(["tune", "{run}"], ["expected a CUDA device", "got none"], marks=without_gpu),
        (["bench", "--out", "{tmp}/one.png", "--quick"], ["one.png", "expected a folder"]),
        (["bench", "--out", "{tmp}/x", "--size", "0"], ["size", "got 0"]),
        (["bench", "--out", "{tmp}/x", "--size", "16", "--batch", "1"], ["more than one value per channel"]),
        (["bench", "--out", "{tmp}/x", "--quick", "--all"], ["--quick or --all"]),
    ],
)
def test_bad_arguments_are_one_error_line(
    arguments: list[str], words: list[str], data: Path, run: Path, tmp_path: Path
) -> None:
    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((48, 48), np.uint16))
    grey(tmp_path / "one.png", (1, 1))
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    broken = shutil.copytree(data, tmp_path / "broken")
    (broken / "images/cell_001.png").write_bytes(b"hello")
    before = contents(tmp_path) | contents(run) | contents(data)
    line = error_of(fastunet(*(a.format(data=data, run=run, tmp=tmp_path, broken=broken) for a in arguments)))
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
        line = error_of(fastunet("predict", run, images, "--out", out, *options))
        assert "expected a folder apart from the images and masks" in line
    assert contents(tmp_path) == before


def test_predict_overwrites_only_predictions_and_only_when_asked(run: Path, data: Path, tmp_path: Path) -> None:
    arguments = ("predict", run, data, "--out", tmp_path / "out")
    assert fastunet(*arguments).returncode == 0
    first = tmp_path / "out/cell_001.png"
    before = contents(tmp_path)
    assert "--overwrite replaces what fastunet wrote" in error_of(fastunet(*arguments))
    assert fastunet(*arguments, "--overwrite").returncode == 0
    assert contents(tmp_path) == before
    for put in (lambda: grey(first), lambda: first.write_text("notes"), lambda: first.symlink_to(data / "images")):
        first.unlink()
        put()
        assert f"{first}: expected a file that fastunet wrote" in error_of(fastunet(*arguments, "--overwrite"))


def test_evaluate_and_bench_overwrite_only_their_own(run: Path, data: Path, tmp_path: Path) -> None:
    scores, rows = tmp_path / "scores.json", tmp_path / "bench/bench.json"
    rows.parent.mkdir()
    for arguments, file in (
        (["evaluate", run, data, "--out", scores], scores),
        (["bench", "--quick", "--size", "16", "--features", "4,8", "--rounds", "1", "--out", rows.parent], rows),
    ):
        file.write_text('{"mine": 1}')
        assert "expected nothing there" in error_of(fastunet(*arguments))
        assert "expected a file that fastunet wrote" in error_of(fastunet(*arguments, "--overwrite"))
        assert file.read_text() == '{"mine": 1}'
    scores.unlink()
    assert fastunet("evaluate", run, data, "--out", scores).returncode == 0
    assert fastunet("evaluate", run, data, "--out", scores, "--overwrite").returncode == 0


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_all_images_are_checked_before_the_first_result(command: str, run: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(tmp_path / "data/images/cell_004.png")
    assert "cell_004.png" in error_of(fastunet(command, run, tmp_path / "data", "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_instance_norm_wants_more_than_one_pixel_at_the_bottom(data: Path, tmp_path: Path) -> None:
    result = fastunet("train", data, "--out", tmp_path / "run", *TINY, "--norm", "instance", "--steps", "1")
    assert result.returncode == 0, result.stderr
    grey(tmp_path / "small.png", (3, 3))
    for arguments in ([tmp_path / "small.png"], [data, "--tile", "3"]):
        line = error_of(fastunet("predict", tmp_path / "run", *arguments, "--out", tmp_path / "out"))
        assert "expected at least 2x4 pixels for 2 levels with instance norm, got 3x3" in line


# --- resuming by the command line ---


def test_resume_needs_nothing_retyped(data: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    before = json.loads((out / "config.json").read_text())["training"]
    for options, steps in (([], 4), (["--steps", "6"], 6), ([data, "--steps", "7", "--workers", "1"], 7)):
        result = fastunet("train", "--out", out, "--resume", *options)
        assert result.returncode == 0, result.stderr
        assert json.loads((out / "metrics.json").read_text())["steps"] == steps
    after = json.loads((out / "config.json").read_text())["training"]
    assert after == before | {"steps": 7, "workers": 1}
    assert "weights: step " in result.stdout


# --- what the system refuses ---


def test_any_name_goes_through_all_commands(data: Path, tmp_path: Path) -> None:
    root, names = tmp_path / "[/b]", ["[red]x", ":smile:", "$\\a$b", "a\nb", "\udcff"]
    shutil.copytree(data, root)
    for folder in ("images", "masks"):
        for file, name in zip(sorted((root / folder).iterdir()), names, strict=True):
            file.rename(root / folder / f"{name}.png")
    out = root / "run"
    for arguments in (
        ["train", root, "--out", out, *TINY],
        ["predict", out, root, "--out", root / "out"],
        ["evaluate", out, root, "--out", root / "x.json"],
    ):
        result = fastunet(*arguments)
        assert result.returncode == 0, result.stderr
        assert "[/b]" in result.stdout
    assert sorted(file.stem for file in (root / "out").iterdir()) == sorted(names)
    error_of(fastunet("predict", out, root, "--out", root / "out"))


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
    line = error_of(fastunet("evaluate", run, data))
    for word in words:
        assert word in line


def test_an_error_of_ours_keeps_its_traceback(run: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "evaluate", lambda: None)
    with pytest.raises(TypeError):
        fastunet("evaluate", run, data)


def test_output_that_nobody_takes(tmp_path: Path) -> None:
    """A full disk is an error, a reader that has left is not; of a command that does not wait for torch."""
    command = [sys.executable, "-m", "fastunet", "--help"]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert "No space left on device" in error_of(
        subprocess.CompletedProcess(command, result.returncode, "", result.stderr)
    )
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writing)
    assert (result.returncode, result.stderr) == (0, "")
