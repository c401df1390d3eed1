"""README, docs/pytorch.md and docs/volumes.md quote only what a file in benchmarks/results/ says, and examples run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fastunet.kernels import gpu

import fastunet
from fastunet.compiler import backend

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTORCH = (ROOT / "docs/pytorch.md").read_text()
VOLUMES = (ROOT / "docs/volumes.md").read_text()


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks/results" / name).read_text())


def test_what_a_training_gives_is_in_the_result_files() -> None:
    dice = result("cpu/accuracy_minutes_4.json")["summary"]["fastunet"]["dice"]
    membranes, cells = (f"{dice[side]:.3f}" for side in ("background", "foreground"))
    assert f"4 minutes on two CPU cores give membranes a Dice of {membranes}, cells {cells}" in README


def test_the_bytes_of_volumes_are_the_result_files() -> None:
    """And the arithmetic on them: least times by the rates that the page names, and shares of the FLOPs."""
    found = result("traffic_volumes.json")
    flops = found["flops"]
    rows = re.findall(r"^\| .* \| (\d+) \| (\d\.\d\d) \| (\d+) \|$", VOLUMES, re.MULTILINE)
    assert "790 TFLOP/s and bytes at 3.0 TB/s" in VOLUMES
    for name, row in zip(found["summary"], rows, strict=True):
        summary, layers = found["summary"][name], found["by_layer"][name]
        least = sum(max(flops[layer] / 790e12, layers[layer] / 3.0e12) for layer in layers)
        assert row == (f"{summary['bytes'] / 1e6:.0f}", f"{summary['of_eager']:.2f}", f"{1e6 * least:.0f}"), name
    total = sum(flops.values())
    assert f"bfloat16, {total / 1e9:.0f} GFLOP (" in VOLUMES
    assert f"products alone would take {1e6 * total / 790e12:.0f} µs" in VOLUMES

    def share(pattern: str) -> str:
        return f"{100 * sum(n for layer, n in flops.items() if re.fullmatch(pattern, layer)) / total:.1f} %"

    strided, lowest = share(r"down[1-5]\.c1"), share(r"(down[45]|up1)\.c.")
    assert share(r"(down0|up5)\.c.") + " of the FLOPs are in the four" in VOLUMES
    assert share(r"down0\.c1") + " in the first of them" in VOLUMES
    assert f"{strided} in the five of stride 2, {lowest} in all of the two lowest" in VOLUMES


def test_the_plan_of_volumes_fits_the_hardware() -> None:
    """Its bytes and clocks, from the tile: planes of 32x8 voxels of 64 channels, and of 32."""
    room = gpu.known_target(90).shared_memory
    products = 2048  # a clock of a multiprocessor's tensor cores
    box, narrow = 34 * 8 * 64 * 2, 34 * 8 * 32 * 2
    weight, paired = 64 * 64 * 2, 64 * 32 * 2
    one, two = 256 * 64 * 64 * 27 // products, 2 * 256 * 64 * 64 * 27 // products
    memory = 2 * box + 9 * weight + 2 * 256 * 64 * 2, 4 * narrow + 12 * paired + 4 * 256 * 32 * 2
    assert max(memory) <= room
    pairs = 36 * 2 * 64 * 256 * 32 // products
    for text in (
        f"| {9 * box:,} | {12 * box:,} |",
        f"| {27 * weight:,} | {27 * weight:,} |",
        f"| {one:,} | {two:,} |",
        f"| {(9 * box + 27 * weight) / one:.1f} | {(12 * box + 27 * weight) / two:.1f} |",
        f"by two warpgroups, would need {(9 * box + 54 * weight) / two:.1f}:",
        f"\n{memory[0]:,} of {room:,} bytes",
        f"are {memory[1]:,} bytes. {(18 * narrow + 36 * paired) / pairs:.1f} bytes a clock",
        f"at 32 channels in; {18 * narrow / pairs:.1f} where",
    ):
        assert text in VOLUMES, text


def test_what_8_bits_cost_is_the_result_files() -> None:
    found = result("cpu/quantization.json")
    for side, words in (("foreground", "cells on 4 others stays at"), ("background", "membranes at")):
        before, after = (f"{found[name]['dice'][side]:.4f}" for name in ("float", "e4m3"))
        assert before == after, "then it does not stay"
        assert f"{words} {before}" in PYTORCH


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
    # Inductor's compiling takes longer than all else.
    monkeypatch.setattr(backend, "default_fallback", lambda: "eager")
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
