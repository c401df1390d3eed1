"""Bytes kept for the backward, beside those counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastunet.benchmarks.__main__ import main
from fastunet.benchmarks.cases import Settings
from fastunet.benchmarks.memory import counted, kept_bytes

pytest.importorskip("triton", reason="asks what the Triton kernels would keep")

# Two levels, 8x8 and 4x4 pixels, in float32. A map of the upper one takes 4 * 64 * 4 bytes, of the lower 6 * 16 * 4.
TINY = Settings(features=(4, 6), size=8, dtype="float32")
UPPER, LOWER, IMAGE, POOLED = 1024, 384, 768, 256


@pytest.mark.parametrize(
    ("implementation", "expected"),
    [
        # Each norm its input, each ReLU its output; the joined tensor; pooling its winners, of 8 bytes each.
        ("eager", {8: IMAGE + 8 * UPPER + 2 * UPPER, 4: 4 * LOWER + POOLED + 2 * POOLED}),
        # As torch does without us.
        ("aten", {8: IMAGE + 8 * UPPER + 2 * UPPER, 4: 4 * LOWER + POOLED + 2 * POOLED}),
        # Neither the joined tensor, nor the winners, nor an output of a norm.
        ("triton", {8: IMAGE + 4 * UPPER + UPPER, 4: 2 * LOWER + POOLED}),
    ],
)
def test_bytes_of_a_tiny_net(implementation: str, expected: dict[int, int]) -> None:
    assert kept_bytes(TINY, implementation) == expected


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_the_classic_net_keeps_less_than_three_fifths(norm: str) -> None:
    summary = counted(Settings(norm=norm))["summary"]
    assert summary["triton"]["of_eager"] <= 0.6


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kept.json"
    command = ["memory", "kept", "--features", "4", "6", "--size", "8", "--dtype", "float32", "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "| 8x8 | 0.0 | 0.0 | 0.0 |" in printed
    written = json.loads(out.read_text())
    assert written["by_height"]["triton"] == {"8": IMAGE + 5 * UPPER, "4": 2 * LOWER + POOLED}
    assert written["settings"]["features"] == [4, 6]
