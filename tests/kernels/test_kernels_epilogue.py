"""What a convolution's kernel does after its sum: batch norm by given statistics, and the 1x1 head, against float64."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastunet.kernels import gpu
from injected_faults import kernels_with
from kernel_device import DEVICE, DTYPES, INTERPRETED, MARK
from torch import Tensor

from fastunet.testing import UNIT_ROUNDOFF, Expected, assert_within, conv3x3_expected, pooled_expected, random_input

pytestmark = [MARK, pytest.mark.usefixtures("nan_in_fresh_memory")]

U = UNIT_ROUNDOFF[torch.float32]
EPS = 1e-3
HOPPER = dataclasses.replace(gpu.known_target(90), multiprocessors=4)
TARGETS = {"here": None, **({"hopper": HOPPER} if INTERPRETED else {})}


def load_ops(package: str = "fastunet.kernels") -> SimpleNamespace:
    """The public launchers of a kernels package."""
    conv3x3, epilogue, gpu = (
        importlib.import_module(f"{package}.{name}") for name in ("conv3x3.pointer", "epilogue", "gpu")
    )
    return SimpleNamespace(
        conv3x3=conv3x3.conv3x3,
        with_head=conv3x3.conv3x3_head,
        Head=epilogue.Head,
        Normalisation=epilogue.Normalisation,
        HEAD_CLASSES=epilogue.HEAD_CLASSES,
        gpu=gpu,
    )


OPS = load_ops()


@pytest.fixture(params=TARGETS.values(), ids=TARGETS)
def any_target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target as it is, and, in the interpreter, one whose convolution has the descriptor form."""
    if request.param is not None:
        monkeypatch.setattr(gpu, "target", lambda device: request.param)


def make(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Tensors of a convolution n, c1, c2, c_out, h, w with batch norm; parameters stay float32."""
    n, c1, c2, c_out, h, w = shape
    options = {"dtype": dtype, "device": DEVICE}
    return {
        "x": random_input((n, c1, h, w), seed=1, **options),
        "up": random_input((n, c2, h, w), seed=2, **options) if c2 else None,
        "weight": random_input((c_out, c1 + c2, 3, 3), seed=3, **options),
        "bias": random_input((c_out,), seed=4, device=DEVICE),
        "mean": random_input((c_out,), seed=5, device=DEVICE),
        "variance": random_input((c_out,), seed=6, device=DEVICE).square() + 0.1,
        "gamma": random_input((c_out,), seed=7, device=DEVICE),
    }


def before_rounding(t: dict[str, Any], slope: float | None, *, norm: bool) -> Expected:
    """y in float64, and the error of the kernel's float32 y before it is rounded to its dtype.

    The error of the sum is that of a float32 convolution less its last rounding, which the first of the epilogue's four
    takes the place of; 1 / sqrt(variance + eps) adds three.
    """
    x, up, weight = (None if t[key] is None else t[key].float() for key in ("x", "up", "weight"))
    tensor_cores = t["x"].is_cuda and t["x"].dtype != torch.float32
    value, error = conv3x3_expected(x, weight, up=up, tensor_cores=tensor_cores)
    size = value.abs()
    shift = t["bias"].double()[:, None, None]
    if norm:
        mean, variance, gamma = (t[key].double()[:, None, None] for key in ("mean", "variance", "gamma"))
        scale = gamma / (variance + EPS).sqrt()
        value, size, error = (value - mean) * scale, (size + mean.abs()) * scale.abs(), error * scale.abs()
    value, size = value + shift, size + shift.abs()
    error = error + 8 * U * size
    if slope is not None:
        value = torch.where(value <= 0, value * slope if slope else 0.0, value)
    return Expected(value, error)


def rounded(expected: Expected, dtype: torch.dtype) -> Expected:
    value, error = expected
    underflow = 2.0**-25 if dtype == torch.float16 else 0.0
    return Expected(value, error + UNIT_ROUNDOFF[dtype] * (value.abs() + error) + underflow)


def check_norm(ops: Any, shape: tuple[int, ...], dtype: torch.dtype, slope: float | None) -> None:
    t = make(shape, dtype)
    norm = ops.Normalisation(t["mean"], t["variance"], t["gamma"], EPS)
    y, pooled = ops.conv3x3(t["x"], t["weight"], t["bias"], up=t["up"], norm=norm, negative_slope=slope, pool=True)
    expected = rounded(before_rounding(t, slope, norm=True), dtype)
    assert_within(y, *expected)
    assert_within(pooled, *pooled_expected(expected))


def check_head(
    ops: Any, shape: tuple[int, ...], dtype: torch.dtype, classes: int, *, sigmoid: bool, norm: bool, bias: bool = True
) -> None:
    """The head reads y before it is rounded."""
    t = make(shape, dtype)
    weight = random_input((classes, shape[3], 1, 1), dtype=dtype, seed=8, device=DEVICE)
    head_bias = random_input((classes,), dtype=dtype, seed=9, device=DEVICE) if bias else None
    given = ops.Normalisation(t["mean"], t["variance"], t["gamma"], EPS) if norm else None
    head = ops.Head(weight, head_bias, sigmoid)
    out = ops.with_head(t["x"], t["weight"], t["bias"], head, up=t["up"], norm=given, negative_slope=0.1)
    assert out.dtype == dtype
    value, error = before_rounding(t, 0.1, norm=norm)
    w = weight.double().flatten(1)
    z, size, z_error = (
        torch.einsum("nchw,kc->nkhw", a, b) for a, b in ((value, w), (value.abs(), w.abs()), (error, w.abs()))
    )
    if head_bias is not None:
        z, size = z + head_bias.double()[:, None, None], size + head_bias.double().abs()[:, None, None]
    z_error = z_error + 6 * (shape[3] + 1) ** 0.5 * U * size
    if sigmoid:  # Its slope is at most a quarter; exp, the sum and the division round once each.
        z, z_error = z.sigmoid(), z_error / 4 + 4 * U
    assert_within(out, *rounded(Expected(z, z_error), dtype))


SHAPES = ((2, 3, 0, 17, 5, 9), (1, 32, 16, 40, 9, 10), (1, 48, 0, 72, 8, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("any_target")
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_norm(OPS, shape, dtype, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("classes", "sigmoid", "norm", "bias"), [(1, True, True, True), (3, False, False, False)])
@pytest.mark.usefixtures("any_target")
def test_head(dtype: torch.dtype, classes: int, sigmoid: bool, norm: bool, bias: bool) -> None:
    for shape in ((2, 3, 0, 17, 5, 9), (1, 32, 16, 40, 9, 10)):
        check_head(OPS, shape, dtype, classes, sigmoid=sigmoid, norm=norm, bias=bias)


def test_no_head_where_one_program_cannot_hold_all_channels() -> None:
    t = make((1, 3, 0, 65, 4, 4), torch.float32)
    head = OPS.Head(random_input((1, 65, 1, 1), device=DEVICE), None, True)
    assert OPS.with_head(t["x"], t["weight"], None, head) is None
    many = OPS.Head(random_input((OPS.HEAD_CLASSES + 1, 17, 1, 1), device=DEVICE), None, True)
    t = make((1, 3, 0, 17, 4, 4), torch.float32)
    assert OPS.with_head(t["x"], t["weight"], None, many) is None


def test_empty_batch() -> None:
    t = make((0, 3, 0, 17, 4, 4), torch.float32)
    head = OPS.Head(random_input((2, 17, 1, 1), device=DEVICE), None, True)
    assert OPS.with_head(t["x"], t["weight"], None, head).shape == (0, 2, 4, 4)


def parity_suite(ops: Any) -> None:
    """A short run over both forms."""
    before = ops.gpu.target
    try:
        for target in (None, HOPPER) if INTERPRETED else (None,):
            if target is not None:
                ops.gpu.target = lambda device: HOPPER
            for shape in ((2, 3, 0, 17, 5, 9), (1, 32, 16, 40, 9, 10)):
                check_norm(ops, shape, torch.float16, 0.1)
                check_head(ops, shape, torch.float16, 2, sigmoid=True, norm=True)
    finally:
        ops.gpu.target = before


BUGS = {
    "gamma_lost": ("epilogue", "scale *= load_channels", "scale += 0 * load_channels"),
    "mean_after_scale": ("epilogue", "acc = (acc - load_channels(mean_ptr, n, COUT, AXIS)) * scale",
                         "acc = acc * scale - load_channels(mean_ptr, n, COUT, AXIS)"),
    "eps_lost": ("epilogue", "COUT, AXIS) + eps)", "COUT, AXIS))"),
    "head_bias_of_the_first_class": ("epilogue", "tl.load(bias_ptr + j)", "tl.load(bias_ptr)"),
    "head_weight_of_the_first_class": ("epilogue", "weight_ptr + j * COUT", "weight_ptr"),
    "no_activation": ("epilogue", "return activate(acc, negative_slope, ACTIVATION)", "return acc"),
    "box_beside_the_tap": ("conv3x3.descriptor", "w0 + tap % 3 - 1, k0,", "w0 + tap % 3, k0,"),
    "weights_of_the_mirrored_tap": ("conv3x3.descriptor", "(8 - tap if FLIP else tap)", "(tap if FLIP else 8 - tap)"),
    "up_lost": ("conv3x3.descriptor", "if up_desc is not None:", "if False:"),
    "pooled_box_misplaced": ("conv3x3.descriptor", "h0 // 2, w0 // 2, n0", "h0 // 2, w0, n0"),
    "up_reads_the_first_weights": ("conv3x3.descriptor", "weight_desc, 0, C1, C1 + C2", "weight_desc, 0, 0, C1 + C2"),
}  # fmt: skip


def test_parity_suite_passes_on_the_kernels_as_they_are() -> None:
    parity_suite(OPS)


@pytest.mark.skipif(not INTERPRETED, reason="the bugs lie in forms that another GPU would run")
@pytest.mark.parametrize("bug", BUGS)
def test_injected_fault_is_caught(bug: str, tmp_path: Path) -> None:
    with kernels_with(BUGS[bug], tmp_path) as package, pytest.raises(AssertionError):
        parity_suite(load_ops(package))
