"""Bytes kept for the backward, beside those counted by hand; and those that inference moves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastunet.benchmarks.__main__ import main
from fastunet.benchmarks.cases import Settings
from fastunet.benchmarks.memory import kept, moved

pytest.importorskip("triton", reason="asks what the Triton kernels would keep")

# Two levels, 8x8 and 4x4 pixels, in float32. A map of the upper one takes 4 * 64 * 4 bytes, of the lower 6 * 16 * 4.
UPPER, LOWER, IMAGE, POOLED = 1024, 384, 768, 256
# Each norm its input, each ReLU its output; the joined tensor; pooling its winners, of 8 bytes each.
EAGER = {"8": IMAGE + 8 * UPPER + 2 * UPPER, "4": 4 * LOWER + POOLED + 2 * POOLED}
# Neither the joined tensor, nor the winners, nor an output of a norm.
TRITON = {"8": IMAGE + 4 * UPPER + UPPER, "4": 2 * LOWER + POOLED}


def test_bytes_of_a_tiny_net_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kept.json"
    command = ["memory", "kept", "--features", "4", "6", "--size", "8", "--dtype", "float32", "--out", str(out)]
    assert main(command) == 0
    written = json.loads(out.read_text())
    found = {name: {h: n for h, n in of.items() if n} for name, of in written["by_height"].items()}
    assert found == {"eager": EAGER, "aten": EAGER, "triton": TRITON}
    assert f"| of eager | 1.000 | 1.000 | {sum(TRITON.values()) / sum(EAGER.values()):.3f} |" in capsys.readouterr().out
    assert written["settings"]["features"] == [4, 6]


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_the_classic_net_keeps_less_than_three_fifths(norm: str) -> None:
    assert kept(Settings(norm=norm))["summary"]["triton"]["of_eager"] <= 0.6


def test_the_kernels_move_less_than_a_quarter_of_what_eager_does(capsys: pytest.CaptureFixture[str]) -> None:
    """A head in the last convolution saves its image twice; so does a composed upsampling, with other weights."""
    found = moved(Settings())
    fused, joined = found["by_layer"]["fused"], found["by_layer"]["joined"]
    assert fused["up4.c2"] + fused["outc"] - joined["up4.c2+outc"] == 2 * (16 * 64 * 512 * 512 * 2)
    for i, (c, side) in enumerate(zip((512, 256, 128, 64), (64, 128, 256, 512), strict=True), 1):
        image, bias = 16 * side**2 * c * 2, 2 * c
        weights = 2 * (2 * c * c * 4 + 9 * 2 * c * c), 2 * (9 * c * c + 16 * 2 * c * c)
        saved = fused[f"up{i}.up"] + fused[f"up{i}.c1"] - joined[f"up{i}.c1"]
        assert saved == 2 * image + weights[0] - weights[1] + bias
    assert round(found["summary"]["joined"]["of_eager"], 2) == 0.23
    assert main(["memory", "moved"]) == 0
    assert "| total | 2141.4 | 675.5 | 483.2 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "8"], "expected size >= 16 and batch >= 1, got 8 and 16"),
        (["--features", "8"], "two or more numbers from 1, got (8,)"),
    ],
)
def test_the_command_refuses(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["memory", "moved", *arguments])
    assert said in capsys.readouterr().err
