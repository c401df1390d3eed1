"""Bytes kept for the backward, beside those counted by hand; and those that inference moves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastunet.benchmarks.__main__ import main
from fastunet.benchmarks.cases import Layer, Settings, nnunet_layers, unet_layers
from fastunet.benchmarks.dropin_models import find_packages
from fastunet.benchmarks.memory import VOLUMES, kept, moved
from torch import Tensor, nn

from fastunet.reference import ReferenceUNet

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


def test_bytes_of_volumes_are_those_counted_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two stages, of 8 and 4 voxels a side, in 16 bits."""
    out = tmp_path / "volumes.json"
    assert main(["memory", "volumes", "--features", "4", "6", "--size", "8", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    upper, lower = 2 * 4 * 8**3, 2 * 6 * 4**3
    three = 3 * 2  # a bias, the norm's weight and its bias
    strided, joined = 2 * 6 * 4 * 27 + three * 6, 2 * 4 * 8 * 27 + three * 4
    for name, parameters, inputs, y, copies in (
        ("down1.c1", strided, upper, lower, 0),
        ("up1.c1", joined, 2 * upper, upper, 2 * 2 * upper),
    ):
        loaded = parameters + inputs + y
        # Eager: the norm reads twice and writes, the activation reads and writes.
        expected = {"eager": loaded + copies + 5 * y, "statistics": loaded + 2 * y, "on load": loaded}
        assert {net: layers[name] for net, layers in found["by_layer"].items()} == expected
    assert found["flops"]["down1.c1"] == 2 * 6 * 4 * 27 * 4**3
    assert found["flops"]["up1.up"] == 2 * 6 * 4 * 8 * 4**3
    assert "| of eager | 1.000 |" in capsys.readouterr().out


def of_nnunet() -> tuple[Any, Tensor, list[Layer]]:
    find_packages()
    unet: Any = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    stages = len(VOLUMES.features)
    net = unet.PlainConvUNet(
        1, stages, VOLUMES.features, nn.Conv3d, 3, (1, *[2] * (stages - 1)), 2, VOLUMES.out_channels, 2,
        conv_bias=True, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU,
    )  # fmt: skip
    layers = nnunet_layers(1, VOLUMES.out_channels, VOLUMES.features, 1, VOLUMES.size)
    assert sum("instance_norm" in layer.op for layer in layers) == sum(
        isinstance(module, nn.InstanceNorm3d) for module in set(net.modules())
    )
    return net, torch.empty(1, 1, *[VOLUMES.size] * 3), layers


def of_unet() -> tuple[Any, Tensor, list[Layer]]:
    layers = unet_layers(3, 2, (4, 8, 16), 2, 20, 12)
    assert [layer.name for layer in layers if not layer.input_has_grad] == ["inc.c1"]
    return ReferenceUNet(3, 2, features=(4, 8, 16), norm=None), torch.empty(2, 3, 20, 12), layers


@pytest.mark.parametrize("make", [of_unet, of_nnunet])
def test_layers_are_what_the_net_runs(make: Callable[[], tuple[Any, Tensor, list[Layer]]]) -> None:
    """Every convolution, and every pooling after one, with what it reads and writes."""
    with torch.device("meta"):
        net, x, layers = make()
    seen: list[list[torch.Size]] = []

    def note(module: Any, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        if isinstance(module, nn.MaxPool2d):
            seen[-1].append(y.shape)
        else:
            seen.append([inputs[0].shape, module.weight.shape, y.shape])

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Conv3d | nn.ConvTranspose3d | nn.MaxPool2d):
            module.register_forward_hook(note)
    net(x)

    def shapes(layer: Layer) -> list[tuple[int, ...]]:
        first, *second = layer.inputs.values()
        channels = first[1] + sum(shape[1] for shape in second)
        return [(first[0], channels, *first[2:]), layer.shapes["weight"], *layer.outputs.values()]

    assert [shapes(layer) for layer in layers] == [[tuple(each) for each in found] for found in seen]


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
