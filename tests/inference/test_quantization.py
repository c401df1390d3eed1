"""The U-Net in 8 bits: the formula, what is quantised, the accuracy, and errors."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastunet
from fastunet.checks import ConfigError, DataError
from fastunet.inference.quantization import E4M3, LARGEST, QuantizedConv3x3
from fastunet.testing import assert_within, e4m3_sums_expected, stored

FEATURES = (32, 64)


def model(norm: str | None = "batch", **options: Any) -> fastunet.UNet:
    torch.manual_seed(0)
    net = fastunet.UNet(1, 2, features=FEATURES, norm=norm, **options)
    with torch.no_grad():
        net(images())  # Moves the running statistics.
    return net.eval()


def changed(path: str, other: nn.Module) -> fastunet.UNet:
    net = model()
    net.set_submodule(path, other)
    return net


def images(n: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(n, 1, 20, 22, generator=torch.Generator().manual_seed(seed))


def with_one_nan() -> Tensor:
    x = 50 * images()
    x[1, 0, 3, 4] = float("nan")
    return x


def quantised_layers(net: nn.Module) -> dict[str, QuantizedConv3x3]:
    return {name: each for name, each in net.named_modules() if isinstance(each, QuantizedConv3x3)}


def test_what_is_quantised() -> None:
    net = model()
    before = copy.deepcopy(net.state_dict())
    quantised = fastunet.quantize(net, images())
    assert list(quantised_layers(quantised)) == [
        *("inc.second", "down1.maxpool_conv.1.first", "down1.maxpool_conv.1.second"),
        *("up1.conv.first", "up1.conv.second"),
    ]
    assert all(layer.weight.dtype == E4M3 for layer in quantised_layers(quantised).values())
    assert not any(key for key, value in net.state_dict().items() if not torch.equal(value, before[key]))
    assert not quantised.training


def test_what_is_written_in_8_bits() -> None:
    """All that quantised convolutions alone read; and it is what they would have made of it themselves."""
    torch.manual_seed(0)
    net = fastunet.UNet(1, 2, features=(32, 64, 96)).eval()
    quantised = fastunet.quantize(net, images())
    layers = quantised_layers(quantised)
    assert {name for name, layer in layers.items() if layer.y_scale is not None} == {
        *(f"{name}.second" for name in ("inc", "down1.maxpool_conv.1")),
        *(f"{name}.first" for name in ("down1.maxpool_conv.1", "down2.maxpool_conv.1", "up1.conv", "up2.conv")),
    }
    assert {name for name, layer in layers.items() if layer.pooled_scale is not None} == {
        "inc.second",
        "down1.maxpool_conv.1.second",
    }
    for first, chained in (
        (quantised.inc.first, "inc.second"),
        *((quantised.ups[i].up, f"up{i + 1}.conv.first") for i in (0, 1)),
    ):
        assert torch.equal(first.y_scale, layers[chained].scale)
    x = images(seed=3)
    chained = quantised(x)
    for layer in layers.values():
        layer.y_scale = layer.pooled_scale = None
    assert torch.equal(chained, quantised(x))


@pytest.mark.parametrize("norm", ["batch", None])
def test_the_formula(norm: str | None) -> None:
    """Of the second convolution: e4m3 values times e4m3 weights in float64, then norm and activation in float64."""
    net = model(norm)
    quantised = fastunet.quantize(net, images())
    layer = quantised_layers(quantised)["down1.maxpool_conv.1.second"]
    conv, following, _ = list(net.down1.maxpool_conv[1].double_conv)[3:]
    x = torch.randn(2, 64, 9, 7, generator=torch.Generator().manual_seed(5)) * 3
    weight_scale = conv.weight.detach().abs().amax((1, 2, 3)) / LARGEST
    weight = (conv.weight.detach() / weight_scale[:, None, None, None]).to(E4M3)
    assert torch.equal(layer.weight.double(), weight.double())
    sums, error = e4m3_sums_expected((x / layer.scale).clamp(-LARGEST, LARGEST).to(E4M3), weight)
    bias = 0 if conv.bias is None else conv.bias.detach().double()[:, None, None]

    def affine(sums: Tensor) -> Tensor:
        return following.double()(sums * layer.scale.double() * weight_scale.double()[:, None, None] + bias).detach()

    y, pooled = layer(x, pool=True)
    # An affine function of the sums carries their error; its own is below that of so long a sum.
    error = 2 * (affine(sums + error) - affine(sums)).abs()
    assert_within(y, affine(sums).relu(), stored(affine(sums), error, torch.float32))
    assert torch.equal(pooled, F.max_pool2d(y, 2))


def test_values_beyond_the_range_are_held_to_it_and_nan_stays() -> None:
    layer = next(iter(quantised_layers(fastunet.quantize(model(), images())).values()))
    channels = layer.weight.shape[1]
    largest = float(layer.scale) * LARGEST
    x = torch.full((1, channels, 4, 4), largest)
    assert torch.equal(layer(x), layer(100 * x))
    x[0, 0, 0, 0] = float("nan")
    assert layer(x)[0, :, :2, :2].isnan().all()
    assert not layer(x)[0, :, 2:, 2:].isnan().any()


@pytest.mark.parametrize(
    "options", [{}, {"norm": None}, {"upsample": "bilinear"}, {"head": "sigmoid"}, {"activation": "leaky_relu"}]
)
def test_it_is_near_the_model_and_not_the_model(options: dict[str, Any]) -> None:
    net = model(**options)
    quantised = fastunet.quantize(net, (image for image in images(4).split(2)))
    x = images(seed=3)
    with torch.no_grad():
        y, near = net(x), quantised(x)
    error = float((y - near).norm() / y.norm())
    assert 1e-4 < error < 0.1, "e4m3 has four significant bits, and the errors of a layer's products are independent"


def test_a_quantised_model_is_kept_and_moved() -> None:
    quantised = fastunet.quantize(model(), images())
    x = images(seed=3)
    expected = quantised(x)
    other = fastunet.quantize(model(), 2 * images(seed=7))
    assert not torch.equal(other(x), expected)
    other.load_state_dict(quantised.state_dict())
    assert torch.equal(other(x), expected)
    half = copy.deepcopy(quantised).bfloat16()
    layer = quantised_layers(half)["up1.conv.first"]
    assert (layer.weight.dtype, layer.gamma.dtype) == (E4M3, torch.float32)
    scales = [t for name, t in half.named_buffers() if name.endswith("scale")]
    assert len(scales) == 5 + 4 + 2, "of images, of results, and those of the first and the transposed convolution"
    assert all(t.dtype == torch.float32 for t in scales)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert quantised(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("net", "batch", "error", "message"),
    [
        (lambda: model("instance"), images, ConfigError, "expected norms with running statistics, or none, got Inst"),
        (model, list, DataError, "expected some images for calibration, got none"),
        (model, lambda: images() * float("nan"), DataError, "expected finite values"),
        (model, lambda: [images(), with_one_nan()], DataError, "expected finite values"),
        (model, lambda: [with_one_nan(), images()], DataError, "expected finite values"),
        (lambda: fastunet.quantize(model(), images()), images, ConfigError, "UNet's forward, got QuantizedUNet's own"),
        (lambda: changed("inc.double_conv.2", nn.GELU()), images, ConfigError, "inc: .* got another DoubleConv"),
        (lambda: changed("down1.maxpool_conv.0", nn.AvgPool2d(2)), images, ConfigError, "down1: .* got another Down"),
        (lambda: changed("outc", nn.Identity()), images, ConfigError, "outc: .* got another Identity"),
    ],
)
def test_bad_input(net: Any, batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastunet.quantize(net(), batch())


def test_it_does_not_train() -> None:
    quantised = fastunet.quantize(model(), images())
    with pytest.raises(ConfigError, match="expected eval mode, got train mode"):
        quantised.train()(images())
    with pytest.raises(ConfigError, match="as built"):
        quantised.save_pretrained("nowhere")


def test_the_loss_of_a_run_is_reported(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastunet.benchmarks.__main__ import main
    from stopped_training import TINY

    from fastunet.train.loop import train

    train(data, tmp_path / "run", replace(TINY, steps=5, features=FEATURES))
    command = ["accuracy", data, "--quantised", tmp_path / "run", "--out", tmp_path, "--calibration", 3]
    assert main([*map(str, command)]) == 0
    found = json.loads((tmp_path / "quantization.json").read_text())
    assert found["loss"] == found["float"]["mean_dice"] - found["e4m3"]["mean_dice"]
    assert found["float"] != found["e4m3"]
    assert (len(found["images"]["calibration"]), len(found["images"]["judged"])) == (3, 2)
    assert not set(found["images"]["calibration"]) & set(found["images"]["judged"])
    assert "loss: " in capsys.readouterr().out


def test_explain_names_the_layers_in_8_bits() -> None:
    """One row for each, on this device and as on a GPU that is not there, and the others' as ever."""
    x = images()
    quantised = fastunet.quantize(model(), x)
    for device in ("cpu", "cuda"):
        rows = fastunet.explain(quantised, x, device=device).rows
        found = [(row.layer, row.input) for row in rows if row.op == "conv3x3 in e4m3"]
        assert found == [
            ("inc.second", "[2, 32, 20, 22] float32"),
            ("down1.maxpool_conv.1.first", "[2, 32, 10, 11] float8_e4m3fn"),
            ("down1.maxpool_conv.1.second", "[2, 64, 10, 11] float8_e4m3fn"),
            ("up1.conv.first", "[2, 32, 20, 22] float8_e4m3fn"),
            ("up1.conv.second", "[2, 32, 20, 22] float8_e4m3fn"),
        ]
        assert {row.op for row in rows} - {"conv3x3 in e4m3"} == {
            "conv3x3_batch_norm_relu",
            "conv_transpose2x2",
            "conv1x1",
        }
        assert all("emulated in float32" in row.reason for row in rows if row.op == "conv3x3 in e4m3")
    assert torch.equal(quantised(x), quantised(x)), "nothing of it stays"
