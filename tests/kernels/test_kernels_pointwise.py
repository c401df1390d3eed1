"""max_pool2x2, conv_transpose2x2 and conv1x1 against float64 under the derived tolerance, on either device."""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastunet.kernels import config_pixels, gpu
from fastunet.kernels.conv3x3 import config_grad
from hypothesis import given, settings
from hypothesis import strategies as st
from injected_faults import check_tests, load
from kernel_device import DEVICE, DTYPES, HOPPER, INTERPRETED, MANY_SPLITS, MARK, on
from torch import Tensor

from fastunet.testing import (
    LAYOUTS,
    Expected,
    assert_within,
    bias_grad_expected,
    conv1x1_bias_grad_expected,
    conv1x1_expected,
    conv1x1_input_grad_expected,
    conv1x1_weight_grad_expected,
    conv_transpose2x2_expected,
    conv_transpose2x2_input_grad_expected,
    conv_transpose2x2_weight_grad_expected,
    in_layout,
    pool_grad,
    random_cotangent,
    random_input,
    random_integers,
)

# Overflow and NaN are among the inputs; the interpreter's numpy remarks on them.
pytestmark = [
    MARK,
    pytest.mark.usefixtures("nan_in_fresh_memory"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
KERNELS = load()
ACTIVATIONS = (None, "sigmoid", "softmax")
HALF, BFLOAT = torch.float16, torch.bfloat16


def make_inputs(
    n: int, c_in: int, c_out: int, h: int, w: int, dtype: torch.dtype, make: Any = random_input
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, the weights of the transposed and of the 1x1 convolution, and the bias."""
    options = {"dtype": dtype, "device": DEVICE}
    x, bias = make((n, c_in, h, w), seed=1, **options), make((c_out,), seed=4, **options)
    return x, make((c_in, c_out, 2, 2), seed=2, **options), make((c_out, c_in, 1, 1), seed=3, **options), bias


def is_packed(*tensors: Tensor) -> bool:
    return all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)


def assert_pool(kernels: ModuleType, x: Tensor) -> None:
    """The maxima, bit for bit, and their gradient."""
    y = kernels.max_pool2x2.max_pool2x2(x)
    assert y.dtype == x.dtype
    assert is_packed(y)
    assert_within(y, F.max_pool2d(x, 2).double(), 0.0) if x.shape[0] else None
    grad = in_layout(random_cotangent(y), "contiguous")
    gx = kernels.norm_grad.activation_grad(x, None, grad, None)
    assert is_packed(gx)
    if x.shape[0]:
        assert_within(gx, *pool_grad(grad, Expected.exact(x)))


def assert_transpose(
    kernels: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    layout: str = "channels_last",
    allow_tf32: bool = False,
) -> None:
    """Value and all gradients of the transposed convolution."""
    tf32, rounds = {"allow_tf32": allow_tf32}, {"allow_tf32": allow_tf32 and not INTERPRETED}
    y = kernels.conv_transpose2x2.conv_transpose2x2(x, weight, bias, **tf32)
    assert_within(y, *conv_transpose2x2_expected(x, weight, bias, **rounds))
    assert is_packed(y)
    grad = in_layout(random_cotangent(y), layout)
    gx = kernels.conv_transpose2x2.conv_transpose2x2_input_grad(grad, weight, **tf32)
    assert_within(gx, *conv_transpose2x2_input_grad_expected(grad, weight, **rounds))
    gw, gb = kernels.pixel_weight_grad.pixel_weight_grad(grad, x, with_bias=True, **tf32)
    assert y.dtype == gx.dtype == gw.dtype == gb.dtype == x.dtype
    assert is_packed(gx, gw)
    assert_within(gw, *conv_transpose2x2_weight_grad_expected(grad, x, **rounds))
    assert_within(gb, *bias_grad_expected(grad))


def assert_head(
    kernels: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    layout: str = "channels_last",
    allow_tf32: bool = False,
) -> None:
    """Value and all gradients of the 1x1 convolution with its activation."""
    options = {"activation": activation, "allow_tf32": allow_tf32}
    rounds = {"activation": activation, "allow_tf32": allow_tf32 and not INTERPRETED}
    y = kernels.conv1x1.conv1x1(x, weight, bias, **options)
    assert is_packed(y)
    assert_within(y, *conv1x1_expected(x, weight, bias, **rounds))
    y, grad = in_layout(y, layout), in_layout(random_cotangent(y), layout)
    gx = kernels.conv1x1.conv1x1_input_grad(grad, weight, y, **options)
    assert_within(gx, *conv1x1_input_grad_expected(grad, weight, y, **rounds))
    gw, gb = kernels.pixel_weight_grad.pixel_weight_grad(grad, x, y, with_bias=True, **options)
    assert y.dtype == gx.dtype == gw.dtype == gb.dtype == x.dtype
    assert is_packed(gx, gw)
    assert_within(gw, *conv1x1_weight_grad_expected(grad, x, y, **rounds))
    assert_within(gb, *conv1x1_bias_grad_expected(grad, y, activation=activation))


# n, c_in, c_out, h, w: rows that no vector load fits, whole vectors, several blocks of channels, pixels, nothing.
ODD, WHOLE = (2, 17, 3, 9, 8), (1, 80, 16, 3, 7)
SHAPES = [
    *((shape, dtype, None) for shape in (ODD, WHOLE) for dtype in DTYPES),
    ((1, 1, 1, 2, 3), torch.float32, None),
    ((1, 5, 65, 33, 2), BFLOAT, None),
    ((1, 16, 144, 2, 2), HALF, None),
    ((0, 3, 4, 4, 4), torch.float32, None),
    ((2, 16, 16, 19, 17), BFLOAT, MANY_SPLITS),
    ((1, 80, 136, 5, 9), BFLOAT, HOPPER),
    ((2, 32, 40, 9, 1), HALF, HOPPER),
]


@pytest.mark.parametrize(("shape", "dtype", "target"), SHAPES, ids=str)
def test_parity(shape: tuple[int, ...], dtype: torch.dtype, target: gpu.Target | None) -> None:
    x, weight, head_weight, bias = make_inputs(*shape, dtype)
    with on(target, KERNELS):
        assert_transpose(KERNELS, x, weight, bias)
        for activation in ACTIVATIONS:
            assert_head(KERNELS, x, head_weight, bias, activation)


def test_tf32() -> None:
    x, weight, head_weight, bias = make_inputs(1, 32, 40, 9, 9, torch.float32)
    assert_transpose(KERNELS, x, weight, bias, allow_tf32=True)
    assert_head(KERNELS, x, head_weight, bias, "sigmoid", allow_tf32=True)


POOLS = [((2, 5, 7, 9), torch.float32), ((1, 130, 3, 4), HALF), ((3, 16, 2, 33), BFLOAT), ((0, 3, 4, 4), torch.float32)]


@pytest.mark.parametrize(("shape", "dtype"), POOLS, ids=str)
def test_pool(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # Few distinct values: windows are full of ties.
    assert_pool(KERNELS, random_integers(shape, dtype=dtype, largest=2, device=DEVICE))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the configurations chosen for itself")
def test_which_configurations_these_are() -> None:
    for (_, c_in, c_out, _, _), dtype, target in SHAPES:
        by_boxes = config_pixels.subpixel_tile_config(c_in, c_out, dtype, target or gpu.INTERPRETER)
        assert (by_boxes is not None) == (target is HOPPER)
    chosen = config_pixels.pixel_weight_grad_config(16, 16, BFLOAT, MANY_SPLITS, allow_tf32=False)
    programs = config_pixels.pixel_weight_grad_programs(chosen, 16, 16, 4)
    assert config_grad.weight_grad_splits(programs, 2 * 19 * 17 // chosen.block_p, MANY_SPLITS) > 1


channels = st.one_of(st.sampled_from([1, 3, 5, 17]), st.integers(1, 40))


@pytest.mark.slow
@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), channels, channels, st.integers(1, 33), st.integers(1, 33)),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    layout=st.sampled_from(LAYOUTS),
    with_bias=st.booleans(),
)
def test_any_shape(
    shape: tuple[int, ...], dtype: torch.dtype, activation: str | None, layout: str, with_bias: bool
) -> None:
    x, weight, head_weight, bias = make_inputs(*shape, dtype)
    x = in_layout(x, layout)
    assert_transpose(KERNELS, x, weight, bias if with_bias else None)
    assert_head(KERNELS, x, head_weight, bias if with_bias else None, activation)
    if min(shape[3:]) >= 2:
        assert_pool(KERNELS, x)


@pytest.mark.parametrize(
    ("layout", "target"), [*((layout, None) for layout in LAYOUTS), ("contiguous", HOPPER), ("unaligned", HOPPER)]
)
def test_layouts_of_every_tensor(layout: str, target: gpu.Target | None) -> None:
    x, weight, head_weight, bias = make_inputs(2, 16, 40, 3, 4, HALF)
    x, weight, head_weight = (in_layout(t, layout) for t in (x, weight, head_weight))
    bias = bias.repeat_interleave(2)[::2]
    with on(target, KERNELS):
        assert_transpose(KERNELS, x, weight, bias, layout=layout)
        assert_head(KERNELS, x, head_weight, bias, "softmax", layout=layout)
        y = KERNELS.conv_transpose2x2.conv_transpose2x2(x, weight)
        assert KERNELS.pixel_weight_grad.pixel_weight_grad(y, x)[1] is None


# --- what catches the injected faults ---


def every_window(kernels: ModuleType) -> None:
    """All windows of {-inf, 0, 1, NaN}^4, against torch."""
    values = list(itertools.product((-math.inf, 0.0, 1.0, math.nan), repeat=4))
    assert_pool(kernels, torch.tensor(values, device=DEVICE).view(1, len(values), 2, 2))


def windows_of_odd_images(kernels: ModuleType) -> None:
    assert_pool(kernels, random_input((2, 3, 7, 5), device=DEVICE))


def large_logits(kernels: ModuleType) -> None:
    """Activations neither overflow nor drop what is not a number."""
    x = torch.tensor([-1e4, -300.0, -90.0, -20.0, 20.0, 90.0, 300.0, 1e4, math.inf, -math.inf, math.nan], device=DEVICE)
    x = x.view(1, 1, 1, -1)
    weight = torch.tensor([1.0, 0.5, -1.0], device=DEVICE).view(3, 1, 1, 1)
    for activation in ("sigmoid", "softmax"):
        y = kernels.conv1x1.conv1x1(x, weight, activation=activation)
        assert_within(y[..., :8], *conv1x1_expected(x[..., :8], weight, activation=activation))
        v = F.conv2d(x, weight)
        expected = v.sigmoid() if activation == "sigmoid" else v.softmax(1)
        assert_within(y[..., 8:], expected[..., 8:], 0.0)


def transpose_of_several_parts(kernels: ModuleType) -> None:
    x, weight, _, bias = make_inputs(1, 3, 17, 17, 19, torch.float32)
    assert_transpose(kernels, x, weight, bias)


def transpose_of_several_steps(kernels: ModuleType) -> None:
    """Sums of small integers have no rounding: every result must be equal, not close."""
    x, weight, _, bias = make_inputs(2, 17, 5, 5, 9, torch.float32, random_integers)
    weight_grad, kernels = kernels.pixel_weight_grad.pixel_weight_grad, kernels.conv_transpose2x2
    y = kernels.conv_transpose2x2(x, weight, bias)
    assert_within(y, conv_transpose2x2_expected(x, weight, bias).value, 0.0)
    grad = random_integers(y.shape, seed=7, device=DEVICE)
    gx = kernels.conv_transpose2x2_input_grad(grad, weight)
    assert_within(gx, conv_transpose2x2_input_grad_expected(grad, weight).value, 0.0)
    gw, gb = weight_grad(grad, x, with_bias=True)
    assert_within(gw, conv_transpose2x2_weight_grad_expected(grad, x).value, 0.0)
    assert_within(gb, grad.double().sum((0, 2, 3)), 0.0)


def transpose_by_boxes(kernels: ModuleType) -> None:
    x, weight, _, bias = make_inputs(1, 80, 40, 3, 9, HALF)
    with on(HOPPER, kernels):
        y = kernels.conv_transpose2x2.conv_transpose2x2(x, weight, bias)
    assert_within(y, *conv_transpose2x2_expected(x, weight, bias))


def head_with_sigmoid(kernels: ModuleType) -> None:
    x, _, weight, bias = make_inputs(1, 3, 17, 17, 19, torch.float32)
    assert_head(kernels, x, weight, bias, "sigmoid")


def head_with_softmax(kernels: ModuleType) -> None:
    x, _, weight, bias = make_inputs(1, 3, 17, 5, 7, torch.float32)
    assert_head(kernels, x, weight, bias, "softmax")


BY_BOXES = {
    transpose_by_boxes: [
        ("conv_transpose2x2", "[sub * COUT + n0, ", "[n0, "),
        ("conv_transpose2x2", "sub // 2, w0, sub % 2", "sub % 2, w0, sub // 2"),
        ("conv_transpose2x2", "gpu.cdiv(channels, block_k)", "channels // block_k"),
    ]
}


def rows_of_partial_sums(kernels: ModuleType) -> None:
    for rows in (1, 8, 21):
        partial = random_integers((rows, 150), seed=rows, device=DEVICE)
        first, second = torch.empty(143, device=DEVICE), torch.empty(7, device=DEVICE)
        kernels.reduction.sum_rows(partial, first, second)
        assert torch.equal(torch.cat([first, second]), partial.sum(0))


test_check, test_injected_fault_is_caught = check_tests({
    every_window: [
        ("tiles", "tl.maximum(", "tl.minimum("),
        ("windows", "(v > best)", "(v >= best)"),
        ("windows", " | (v != v)", ""),
    ],
    windows_of_odd_images: [
        ("max_pool2x2", " + row // (H // 2) * (H % 2)", ""),
        ("max_pool2x2", "pointers += W.to(tl.int64) * C", "pointers += C"),
        ("max_pool2x2", "w = window % (W // 2)", "w = window % ((W + 1) // 2)"),
    ],
    transpose_of_several_steps: [
        ("pixels", "sub // 2 * 2 * W + sub % 2", "sub % 2 * 2 * W + sub // 2"),
        ("pixels", "4 * rows - 2 * (rows % W)", "4 * rows - 2 * (rows % (W + 1))"),
        ("pixels", "tl.cdiv(C, BLOCK_K) * SUBPIXELS", "(C // BLOCK_K) * SUBPIXELS"),
        ("conv_transpose2x2", "weight_ptr + sub * COUT", "weight_ptr"),
        ("conv_transpose2x2", "if bias_ptr is not None:\n        acc +=", "if False:\n        acc +="),
        ("pixel_weight_grad", "(split * SUBPIXELS + sub) * COUT", "split * SUBPIXELS * COUT"),
    ],
    transpose_of_several_parts: [
        ("pixel_weight_grad", "+ blocks_per_split,", "+ blocks_per_split - 1,"),
        ("pixel_weight_grad", "totals += g.to", "totals = g.to"),
        ("reduction", "tl.sum(sums, 0)", "tl.sum(tl.where(row > 0, sums, 0.0), 0)"),
    ],
    rows_of_partial_sums: [
        ("reduction", "pointers += tl.cast(total, tl.int64) * BLOCK_R", "pointers += 0"),
        ("reduction", "mask=at < split", "mask=at < split - 1"),
    ],
    head_with_sigmoid: [
        ("pixels", "g * y * (1.0 - y)", "g * (1.0 - y)"),
        ("conv1x1", "tl.sigmoid(acc)", "tl.sigmoid(acc.to(tl.float16).to(tl.float32))"),
    ],
    head_with_softmax: [
        ("pixels", "y * (g - dots[:, None])", "y * g"),
        ("conv1x1", 'mask_n[None, :], v, -float("inf")', "mask_n[None, :], v, 0.0"),
    ],
    large_logits: [("conv1x1", "v - tl.reduce(v, 1, nan_max)[:, None]", "v")],
    **(BY_BOXES if INTERPRETED or gpu.target(DEVICE).capability >= 90 else {}),
})  # fmt: skip
