"""`fastunet doctor`, with GPUs and without, and the help of all commands."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="needs the extra train")

import torch
from command import fastunet
from fastunet.kernels import autotune, gpu
from typer.main import get_command

from fastunet import __version__, backend, dispatch
from fastunet.cli import app, doctor
from fastunet.cli.shared import GROUPS
from fastunet.torch_private import FakeTensorMode
from fastunet.train.config import TrainConfig

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

OF_GPU = {"op": "conv1x1", "dtype": "float32"}


def doctors_lines() -> list[str]:
    """What `fastunet doctor` says, in lines that fit anywhere."""
    result = fastunet("doctor")
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines if os.sep not in line) <= 100, "but for a path, which is not broken"
    assert sum(line[:1].strip() != "" for line in lines) <= 14, "a few rows, not one for each op"
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
    assert sum(map(bool, lines)) <= 11
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


# --- help, version, completion ---

COMMANDS = ("check", "train", "predict", "evaluate", "export", "tune", "bench", "doctor", "demo")
SCRIPT = Path(sys.executable).with_name("fastunet")


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


@pytest.mark.parametrize("command", ["check", "train", "evaluate"])
def test_groups_come_in_one_order(command: str) -> None:
    places = [GROUPS.index(each.rich_help_panel) for each in options_of(command)]
    assert places == sorted(places)


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_in_groups_and_say_their_defaults(command: str) -> None:
    for each in options_of(command):
        assert each.rich_help_panel in (*GROUPS, "Objects", "Duration"), each.name
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


@pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the command `fastunet` beside Python")
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
