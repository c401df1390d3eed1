"""README and docs/pytorch.md quote only what a file in benchmarks/results/ says, and their examples run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import fastunet
from fastunet.compiler import backend

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTORCH = (ROOT / "docs/pytorch.md").read_text()


def test_what_a_training_gives_is_in_the_result_files() -> None:
    found = json.loads((ROOT / "benchmarks/results/cpu/accuracy_minutes_4.json").read_text())["fastunet"]["dice"]
    membranes, cells = (f"{found[side]:.3f}" for side in ("background", "foreground"))
    assert f"4 minutes on two CPU cores give membranes a Dice of {membranes}, cells {cells}" in README


def test_the_kept_bytes_are_the_result_files() -> None:
    summary = json.loads((ROOT / "benchmarks/results/saved_memory.json").read_text())["summary"]
    sentence = (
        "keeps {} MB of every 512x512 image in bfloat16 on the Triton kernels; plain\n"
        "PyTorch, which a step on ATen is to the letter, keeps {} MB"
    )
    figures = (f"{summary[name]['bytes'] / 1e6:.0f}" for name in ("triton", "eager"))
    assert summary["aten"] == summary["eager"]
    assert sentence.format(*figures) in PYTORCH


def test_the_moved_bytes_are_the_result_files() -> None:
    found = json.loads((ROOT / "benchmarks/results/traffic.json").read_text())
    summary, images = found["summary"], found["settings"]["batch"]
    ours, eager = (f"{summary[name]['bytes'] / images / 1e6:.0f}" for name in ("joined", "eager"))
    text = PYTORCH
    assert f"moves {ours} MB for every 512x512 image" in text
    assert f"every op is a pass of its own {eager} MB" in text


def test_what_8_bits_cost_is_the_result_files() -> None:
    found = json.loads((ROOT / "benchmarks/results/cpu/quantization.json").read_text())
    text = PYTORCH
    for side, words in (("foreground", "cells on 4 others stays at"), ("background", "membranes at")):
        before, after = (f"{found[name]['dice'][side]:.4f}" for name in ("float", "e4m3"))
        assert before == after, "then it does not stay"
        assert f"{words} {before}" in text


def python_example(call: str) -> str:
    """The one block of Python with this call in it."""
    examples = set(re.findall(r"```python\n(.*?)```", README + PYTORCH, re.DOTALL))
    (example,) = (text for text in examples if call in text)
    return example


def test_the_python_example_runs() -> None:
    example = python_example("fastunet.UNet(3, 2)")
    names: dict = {}
    exec(example.replace("fastunet.UNet(3, 2)", "fastunet.UNet(3, 2, features=(4, 8, 8, 8, 8))"), names)
    assert names["probabilities"].shape == (1, 2, 257, 190)
    assert names["loss"].isfinite()


def test_the_example_of_one_line_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        backend, "default_fallback", lambda: "eager"
    )  # Inductor's compiling takes longer than all else.
    names: dict = {"torch": torch, "fastunet": fastunet, "x": torch.randn(1, 3, 9, 8)}
    names["your_model"] = torch.nn.Conv2d(3, 4, 3, padding=1)
    exec(python_example("torch.compile(your_model"), names)
    assert names["compiled"](names["x"]).shape == (1, 4, 9, 8)


def test_the_example_of_a_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = fastunet.UNet(3, 2, features=(4, 8))
    torch.save({**model.state_dict(), "mask_values": [0, 1]}, "checkpoint_epoch5.pth")
    names: dict = {}
    exec(python_example("fastunet.UNet.from_pretrained"), names)
    assert names["same"].config == model.config
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in names["same"].state_dict().items())
