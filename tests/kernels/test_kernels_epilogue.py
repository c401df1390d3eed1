"""What a convolution's kernel does after its sum: batch norm by given statistics, and the 1x1 head, against float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from conv3x3_checks import BFLOAT, HALF, Shape, make_inputs
from fastunet.kernels import gpu
from injected_faults import check_tests, load
from kernel_device import DEVICE, HOPPER, INTERPRETED, MARK, on
from torch import Tensor

from fastunet.testing import assert_within, conv3x3_expected, random_input
from fastunet.testing.bounds import Expected, bilinear

pytestmark = [MARK, pytest.mark.usefixtures("nan_in_fresh_memory")]
KERNELS = load()
EPS = 1e-3


def make(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """Tensors of a convolution with batch norm; parameters stay float32."""
    bias, mean, variance, gamma = (random_input(shape[3:4], seed=seed, device=DEVICE) for seed in range(4, 8))
    tensors = dict(zip(("x", "up", "weight"), make_inputs(shape, dtype)[:3], strict=True))
    return {**tensors, "bias": bias, "mean": mean, "variance": variance.square() + 0.1, "gamma": gamma}


def before_rounding(t: dict[str, Any], slope: float | None, *, norm: bool) -> Expected:
    """y in float64, and the error of the kernel's float32 y before it is rounded to its dtype."""
    x, up = (None if t[key] is None else t[key].float() for key in ("x", "up"))
    tensor_cores = t["x"].is_cuda and t["x"].dtype != torch.float32
    value = conv3x3_expected(x, t["weight"].float(), up=up, tensor_cores=tensor_cores, is_stored=False)
    parameters = ("bias", "mean", "variance", "gamma")
    bias, mean, variance, gamma = (Expected.exact(t[key][:, None, None]) for key in parameters)
    if norm:
        value = (value - mean) * (variance.inverse_root(EPS) * gamma)
    return (value + bias).activate(slope)


def assert_norm(kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, slope: float | None) -> None:
    t = make(shape, dtype)
    norm = kernels.epilogue.Normalisation(t["mean"], t["variance"], t["gamma"], EPS)
    options = {"up": t["up"], "norm": norm, "negative_slope": slope, "pool": True}
    y, pooled = kernels.conv3x3.pointer.conv3x3(t["x"], t["weight"], t["bias"], **options)
    expected = before_rounding(t, slope, norm=True).stored(dtype)
    assert_within(y, *expected)
    assert_within(pooled, *expected.pool())


def assert_head(
    kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, classes: int, *, sigmoid: bool, norm: bool
) -> None:
    """The head, with a bias where it has a sigmoid, reads y before it is rounded."""
    t = make(shape, dtype)
    weight = random_input((classes, shape[3], 1, 1), dtype=dtype, seed=8, device=DEVICE)
    bias = random_input((classes,), dtype=dtype, seed=9, device=DEVICE) if sigmoid else None
    statistics = kernels.epilogue.Normalisation(t["mean"], t["variance"], t["gamma"], EPS) if norm else None
    head, options = kernels.epilogue.Head(weight, bias, sigmoid), {"norm": statistics, "negative_slope": 0.1}
    out = kernels.conv3x3.pointer.conv3x3_head(t["x"], t["weight"], t["bias"], head, up=t["up"], **options)
    assert out.dtype == dtype

    def product(y: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("nchw,kc->nkhw", y, weight)

    y, flat = before_rounding(t, 0.1, norm=norm), weight.flatten(1)
    z = bilinear(product, y, flat, shape[3], bias=bias, dtype=torch.float32, is_stored=False)
    assert_within(out, *(z.sigmoid() if sigmoid else z).stored(dtype))


FOLDED, TWO_INPUTS = (2, 3, 0, 17, 5, 9), (1, 16, 16, 40, 9, 10)
CASES = [
    (FOLDED, torch.float32, None),
    (TWO_INPUTS, BFLOAT, None),
    (TWO_INPUTS, HALF, HOPPER),
    ((1, 16, 0, 72, 8, 8), BFLOAT, HOPPER),
]


@pytest.mark.parametrize(("shape", "dtype", "target"), CASES, ids=str)
def test_norm_and_head(shape: tuple[int, ...], dtype: torch.dtype, target: gpu.Target | None) -> None:
    with on(target, KERNELS):
        assert_norm(KERNELS, shape, dtype, 0.0)
        if shape[3] <= 64:
            assert_head(KERNELS, shape, dtype, 1, sigmoid=True, norm=True)
            assert_head(KERNELS, shape, dtype, 3, sigmoid=False, norm=False)


def test_no_head_where_one_program_cannot_hold_all_channels() -> None:
    for channels, classes in ((65, 1), (17, KERNELS.epilogue.HEAD_CLASSES + 1)):
        t = make((1, 3, 0, channels, 4, 4), torch.float32)
        head = KERNELS.epilogue.Head(random_input((classes, channels, 1, 1), device=DEVICE), None, True)
        assert KERNELS.conv3x3.pointer.conv3x3_head(t["x"], t["weight"], None, head) is None


def test_empty_batch() -> None:
    t = make((0, 3, 0, 17, 4, 4), torch.float32)
    head = KERNELS.epilogue.Head(random_input((2, 17, 1, 1), device=DEVICE), None, True)
    assert KERNELS.conv3x3.pointer.conv3x3_head(t["x"], t["weight"], None, head).shape == (0, 2, 4, 4)


# --- what catches the injected faults ---


def norm_by_pointers(kernels: ModuleType) -> None:
    assert_norm(kernels, FOLDED, HALF, 0.1)


def head_by_pointers(kernels: ModuleType) -> None:
    assert_head(kernels, FOLDED, HALF, 2, sigmoid=True, norm=True)


def norm_by_boxes(kernels: ModuleType) -> None:
    with on(HOPPER, kernels):
        assert_norm(kernels, TWO_INPUTS, HALF, 0.1)


BY_BOXES = {
    norm_by_boxes: [
        ("conv3x3.descriptor", "w0 + tap % 3 - 1, k0,", "w0 + tap % 3, k0,"),
        ("conv3x3.descriptor", "(8 - tap if FLIP else tap)", "(tap if FLIP else 8 - tap)"),
        ("conv3x3.descriptor", "if up_desc is not None:", "if False:"),
        ("conv3x3.descriptor", "h0 // 2, w0 // 2, n0", "h0 // 2, w0, n0"),
        ("conv3x3.descriptor", "weight_desc, begin2, C1,", "weight_desc, begin2, 0,"),
    ]
}
test_check, test_injected_fault_is_caught = check_tests({
    norm_by_pointers: [
        ("epilogue", "scale *= load_channels", "scale += 0 * load_channels"),
        ("epilogue", "acc = (acc - load_channels(mean_ptr, n, COUT, AXIS)) * scale",
         "acc = acc * scale - load_channels(mean_ptr, n, COUT, AXIS)"),
        ("epilogue", "COUT, AXIS) + eps)", "COUT, AXIS))"),
        ("epilogue", "return activate(acc, negative_slope, ACTIVATION)", "return acc"),
    ],
    head_by_pointers: [
        ("epilogue", "tl.load(bias_ptr + j)", "tl.load(bias_ptr)"),
        ("epilogue", "weight_ptr + j * COUT", "weight_ptr"),
    ],
    **(BY_BOXES if INTERPRETED else {}),  # Another GPU would not run them.
})  # fmt: skip
