"""The kernels of 8 bits where they run: what they quantise, and the convolution, against the same values in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastunet.kernels import conv_transpose2x2, gpu
from fastunet.kernels.conv3x3 import config, fp8, pointer
from fastunet.kernels.epilogue import E4M3, Normalisation
from kernel_device import DEVICE, HOPPER, INTERPRETED, MARK, kernel_names, on

import fastunet
from fastunet.inference.quantization import QuantizedConv3x3
from fastunet.testing import Expected, assert_within, e4m3_sums_expected, random_input, stored

pytestmark = [MARK, pytest.mark.usefixtures("nan_in_fresh_memory")]
LARGEST = torch.finfo(E4M3).max
if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("8-bit products need sm_90", allow_module_level=True)


@pytest.fixture(autouse=True)
def hopper() -> Iterator[None]:
    with on(HOPPER):
        yield


def quantised(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() * (1 / scale)).clamp(-LARGEST, LARGEST).to(E4M3)


def assert_quantised(y: torch.Tensor, precise: torch.Tensor, scale: torch.Tensor) -> None:
    """y is of the same sums in another order: here and there another of e4m3's numbers, which are an eighth apart."""
    expected = quantised(precise, scale).float()
    torch.testing.assert_close(y.float(), expected, rtol=2**-3, atol=2**-9)
    assert (y.float() != expected).double().mean() < 1e-3


def sums_expected(images: list[torch.Tensor], weight: torch.Tensor) -> Expected:
    """Of images in e4m3, as concatenated."""
    shape = config.ConvShape(images[0].shape[1], sum(t.shape[1] for t in images[1:]), *weight.shape[:1], 1, 1)
    target = gpu.target(DEVICE)
    is_hopper = not INTERPRETED and target.capability == 90
    step = config.descriptor_config(shape, torch.float8_e4m3fn, target).block_k if is_hopper else None
    return e4m3_sums_expected(torch.cat([t.float() for t in images], 1), weight, step=step)


def test_quantising_rounds_and_holds_to_the_range() -> None:
    x = random_input((2, 32, 5, 7), scale=300.0, dtype=torch.float16, device=DEVICE, seed=1)
    x = x.contiguous(memory_format=torch.channels_last)
    x[0, :3, 0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    scale = torch.tensor([0.75], device=DEVICE)
    torch.testing.assert_close(
        fp8.quantised(x, scale).float(), quantised(x, scale).float(), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize(("channels_up", "chained"), [(0, False), (64, False), (64, True)])
def test_parity(channels_up: int, chained: bool) -> None:
    """chained: of inputs that are in e4m3 already, to results that are. Those are the others' before rounding."""
    options = {"dtype": torch.float16, "device": DEVICE}
    x = random_input((2, 32, 9, 11), seed=1, **options)
    up = random_input((2, channels_up, 9, 11), seed=2, **options) if channels_up else None
    weight = random_input((48, 32 + channels_up, 3, 3), scale=100.0, seed=3, device=DEVICE)
    weight = weight.clamp(-LARGEST, LARGEST).to(E4M3).contiguous(memory_format=torch.channels_last)
    scale = torch.tensor([4.0 / LARGEST], device=DEVICE)
    mean, variance, gamma, bias = (random_input((48,), seed=i, device=DEVICE) for i in range(4, 8))
    variance, gamma = variance.abs() + 0.5, gamma * 1e-4
    norm = Normalisation(mean, variance, gamma, 1e-3)
    arguments = (weight, scale, bias, norm, 0.0)
    y, pooled = fp8.conv3x3_fp8(x, up, *arguments, dtype=torch.float16, pool=True)
    sums, error = sums_expected([quantised(t, scale) for t in (x, up) if t is not None], weight)
    factor = (gamma.double() / (variance.double() + 1e-3).sqrt())[:, None, None]
    mean, bias = (t.double()[:, None, None] for t in (mean, bias))
    expected = ((sums - mean) * factor + bias).relu()
    # In units of 2^-24: a quotient 4, a root 2, six other operations, on values no larger than these.
    error = error * factor.abs() + 2.0**-24 * (12 * (sums.abs() + mean.abs()) * factor.abs() + bias.abs())
    assert_within(y, expected, stored(expected, error, torch.float16))
    assert torch.equal(pooled, F.max_pool2d(y, 2))
    if chained:
        assert up is not None
        scales = {"y_scale": torch.tensor([0.03], device=DEVICE), "pooled_scale": torch.tensor([0.05], device=DEVICE)}
        given = (quantised(x, scale), quantised(up, scale), *arguments)
        precise, _ = fp8.conv3x3_fp8(*given, dtype=torch.float32, pool=False)
        y, pooled = fp8.conv3x3_fp8(*given, dtype=torch.float16, pool=True, **scales)
        for result, exact, own in zip((y, pooled), (precise, F.max_pool2d(precise, 2)), scales.values(), strict=True):
            assert result.dtype == E4M3
            assert torch.equal(result.float(), quantised(exact, own).float())


@pytest.mark.parametrize("channels", [1, 3])
def test_the_first_convolution_writes_e4m3(channels: int) -> None:
    options = {"dtype": torch.float16, "device": DEVICE}
    x = random_input((2, channels, 9, 11), seed=1, **options)
    weight, bias = random_input((48, channels, 3, 3), seed=2, **options), random_input((48,), seed=3, **options)
    scale = torch.tensor([0.03], device=DEVICE)
    precise, _ = pointer.conv3x3(x.float(), weight.float(), bias, negative_slope=0.0)
    y, _ = pointer.conv3x3(x, weight, bias, negative_slope=0.0, y_scale=scale)
    assert_quantised(y, precise, scale)
    with pytest.raises(ValueError, match="fewer than 8 channels, got 16"):
        pointer.conv3x3(x.expand(2, channels, 9, 11)[:, :1].repeat(1, 16, 1, 1), weight, y_scale=scale)


def test_the_transposed_convolution_writes_e4m3() -> None:
    options = {"dtype": torch.float16, "device": DEVICE}
    x, weight = random_input((2, 32, 5, 7), seed=1, **options), random_input((32, 48, 2, 2), seed=2, **options)
    bias, scale = random_input((48,), seed=3, **options), torch.tensor([0.03], device=DEVICE)
    precise = F.conv_transpose2d(x.double(), weight.double(), bias.double(), stride=2).float()
    y = conv_transpose2x2.conv_transpose2x2(x, weight, bias, y_scale=scale)
    assert_quantised(y, precise, scale)
    with pytest.raises(ValueError, match="expected a shape and target of the descriptor variant"):
        conv_transpose2x2.conv_transpose2x2(x, weight[:, :24], y_scale=scale)


def float_model(dtype: torch.dtype, **options: Any) -> fastunet.UNet:
    torch.manual_seed(0)
    return fastunet.UNet(1, 2, features=(64, 128), **options).to(DEVICE, dtype).eval()


def quantised_model(dtype: torch.dtype, **options: Any) -> fastunet.UNet:
    return fastunet.quantize(float_model(dtype, **options), random_input((1, 1, 16, 16), dtype=dtype, device=DEVICE))


def assert_emulated(layer: QuantizedConv3x3, images: list[torch.Tensor | None], *, pool: bool) -> list[torch.Tensor]:
    """The results of a layer on tensor cores, which are the emulated ones', but for their sums' errors and for the next
    number of their dtype where these decide about it.
    """
    inputs = [t if t.dtype == E4M3 else quantised(t, layer.scale) for t in images if t is not None]
    error = 2 * sums_expected(inputs, layer.weight).tolerance
    error = error * (layer.gamma * (layer.variance + layer.eps).rsqrt()).abs()[:, None, None]
    errors = (error, F.max_pool2d(error, 2))
    results, emulated = layer._on_tensor_cores(*images, pool), layer._emulated(*images, pool)
    for y, expected, error, scale in zip(results, emulated, errors, (layer.y_scale, layer.pooled_scale), strict=True):
        if y is not None:
            step = 2**-3 if y.dtype == E4M3 else 2**-10
            carried = error / scale.double() if scale is not None else error
            assert_within(y.double(), expected.double(), carried + step * (expected.double().abs() + 1 / 64))
    return results


def test_a_quantised_layer_runs_on_the_kernel() -> None:
    layer = quantised_model(torch.float32).up1.conv.first
    layer.y_scale = None
    x, up = (random_input((1, 64, 9, 11), dtype=torch.float16, device=DEVICE, seed=i) for i in (1, 2))
    with fastunet.backend("triton"), gpu.recording() as launches:
        y, pooled = layer(x, up, pool=True)
    assert kernel_names(launches) == ["quantise_kernel"] * 2 + ["conv3x3_descriptor_kernel"]
    assert torch.equal(pooled, F.max_pool2d(y, 2))
    assert torch.equal(y, assert_emulated(layer, [x, up], pool=True)[0])


@pytest.mark.parametrize(
    ("options", "passes", "autocast"),
    [({}, 0, False), ({}, 0, True), ({"norm": None}, 0, False), ({"upsample": "bilinear"}, 1, True)],
)
def test_a_quantised_net_writes_e4m3(options: dict, passes: int, autocast: bool) -> None:
    """Every kernel does; what ATen upsamples is quantised by a pass."""
    model = quantised_model(torch.float32 if autocast else torch.float16, **options)
    x = random_input((1, 1, 8, 16), dtype=torch.float16, device=DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.float16, enabled=autocast), gpu.recording() as launches:
        with fastunet.backend("triton"):
            y = model(x)
        with fastunet.backend("aten"):
            emulated = model(x)
    assert kernel_names(launches).count("quantise_kernel") == passes
    assert y.dtype == emulated.dtype == torch.float16
    # A rounding to half before that to e4m3 decides about some values: less than 8 bits make of the model itself.
    with torch.no_grad(), fastunet.backend("aten"):
        exact = float_model(torch.float32, **options)(x.float())
    assert (y - emulated).double().norm() < (exact - emulated).double().norm()


def test_each_layer_of_a_quantised_net_is_the_emulated_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same inputs."""
    calls: list[tuple] = []
    run = QuantizedConv3x3.forward
    monkeypatch.setattr(
        QuantizedConv3x3, "forward", lambda *args, pool=False: (calls.append((*args, pool)), run(*args, pool=pool))[1]
    )
    model, x = quantised_model(torch.float16), random_input((1, 1, 8, 16), dtype=torch.float16, device=DEVICE)
    with torch.no_grad(), fastunet.backend("triton"):
        model(x)
        results = [assert_emulated(layer, images, pool=pool) for layer, *images, pool in calls]
    dtypes = [t.dtype for pair in results for t in pair if t is not None]
    assert (dtypes.count(E4M3), dtypes.count(torch.float16)) == (4, 2)
