"""max_pool2x2, conv_transpose2x2 and conv1x1 against float64 under the derived tolerance, on either device."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from fastunet.kernels import config_pixels, gpu
from fastunet.kernels.conv3x3 import config
from hypothesis import given, settings
from hypothesis import strategies as st
from injected_faults import kernels_with
from kernel_device import DEVICE, DTYPES, INTERPRETED, MARK
from torch import Tensor

from fastunet.testing import (
    LAYOUTS,
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
    max_pool2x2_grad_expected,
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

HOPPER = dataclasses.replace(gpu.known_target(90), multiprocessors=4)
BLACKWELL = dataclasses.replace(gpu.known_target(100), multiprocessors=4)
MANY_SPLITS = dataclasses.replace(gpu.INTERPRETER, multiprocessors=64)
ACTIVATIONS = (None, "sigmoid", "softmax")

# Configurations for other GPUs run in the interpreter only: a GPU runs its own.
elsewhere = pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the configurations chosen for itself")


def load_ops(package: str = "fastunet.kernels") -> SimpleNamespace:
    """The public launchers of a kernels package."""
    names = ("max_pool2x2", "activation_grad", "conv_transpose2x2", "conv1x1")
    pool, activation_grad, transpose, head = (importlib.import_module(f"{package}.{name}") for name in names)
    return SimpleNamespace(
        gpu=importlib.import_module(f"{package}.gpu"),
        pool=pool.max_pool2x2,
        unpool=lambda x, grad: activation_grad.activation_grad(x, None, grad, None),
        transpose=transpose.conv_transpose2x2,
        transpose_input_grad=transpose.conv_transpose2x2_input_grad,
        transpose_weight_grad=transpose.conv_transpose2x2_weight_grad,
        head=head.conv1x1,
        head_input_grad=head.conv1x1_input_grad,
        head_weight_grad=head.conv1x1_weight_grad,
    )


OPS = load_ops()


def make_inputs(
    n: int, c_in: int, c_out: int, h: int, w: int, dtype: torch.dtype, make: Any = random_input
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, the weights of the transposed and of the 1x1 convolution, and the bias."""
    options = {"dtype": dtype, "device": DEVICE}
    x, bias = make((n, c_in, h, w), seed=1, **options), make((c_out,), seed=4, **options)
    return x, make((c_in, c_out, 2, 2), seed=2, **options), make((c_out, c_in, 1, 1), seed=3, **options), bias


def is_packed(*tensors: Tensor) -> bool:
    return all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)


def check_pool(ops: Any, x: Tensor) -> None:
    """The maxima, bit for bit, and their gradient."""
    y = ops.pool(x)
    assert y.dtype == x.dtype
    assert is_packed(y)
    assert_within(y, F.max_pool2d(x, 2).double(), 0.0) if x.shape[0] else None
    grad = in_layout(random_cotangent(y), "contiguous")
    gx = ops.unpool(x, grad)
    assert is_packed(gx)
    if x.shape[0]:
        assert_within(gx, *max_pool2x2_grad_expected(x, grad))


def check_transpose(ops: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *, allow_tf32: bool = False) -> None:
    """Value and all gradients of the transposed convolution."""
    tf32, rounds = {"allow_tf32": allow_tf32}, {"allow_tf32": allow_tf32 and not INTERPRETED}
    y = ops.transpose(x, weight, bias, **tf32)
    assert_within(y, *conv_transpose2x2_expected(x, weight, bias, **rounds))
    grad = random_cotangent(y)
    gx = ops.transpose_input_grad(grad, weight, **tf32)
    assert_within(gx, *conv_transpose2x2_input_grad_expected(grad, weight, **rounds))
    gw, gb = ops.transpose_weight_grad(grad, x, with_bias=True, **tf32)
    assert y.dtype == gx.dtype == gw.dtype == gb.dtype == x.dtype
    assert is_packed(y, gx, gw)
    assert_within(gw, *conv_transpose2x2_weight_grad_expected(grad, x, **rounds))
    assert_within(gb, *bias_grad_expected(grad))


def check_head(
    ops: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    allow_tf32: bool = False,
) -> None:
    """Value and all gradients of the 1x1 convolution with its activation."""
    given = {"activation": activation, "allow_tf32": allow_tf32}
    rounds = {"activation": activation, "allow_tf32": allow_tf32 and not INTERPRETED}
    y = ops.head(x, weight, bias, **given)
    assert_within(y, *conv1x1_expected(x, weight, bias, **rounds))
    grad = random_cotangent(y)
    gx = ops.head_input_grad(grad, weight, y, **given)
    assert_within(gx, *conv1x1_input_grad_expected(grad, weight, y, **rounds))
    gw, gb = ops.head_weight_grad(grad, x, y, with_bias=True, **given)
    assert y.dtype == gx.dtype == gw.dtype == gb.dtype == x.dtype
    assert is_packed(y, gx, gw)
    assert_within(gw, *conv1x1_weight_grad_expected(grad, x, y, **rounds))
    assert_within(gb, *conv1x1_bias_grad_expected(grad, y, activation=activation))


# n, c_in, c_out, h, w: rows that no vector load fits, whole vectors, several blocks of channels, pixels, nothing.
SHAPES = (
    (1, 1, 1, 2, 3),
    (3, 3, 5, 5, 7),
    (2, 17, 3, 9, 8),
    (1, 5, 65, 33, 2),
    (1, 80, 16, 3, 5),
    (1, 16, 144, 2, 2),
    (2, 48, 80, 1, 33),
    (0, 3, 4, 4, 4),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transpose(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, _, bias = make_inputs(*shape, dtype)
    check_transpose(OPS, x, weight, bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_head(shape: tuple[int, ...], dtype: torch.dtype, activation: str | None) -> None:
    x, _, weight, bias = make_inputs(*shape, dtype)
    check_head(OPS, x, weight, bias, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (1, 1, 2, 2), (1, 130, 3, 4), (3, 16, 2, 33), (0, 3, 4, 4)], ids=str)
def test_pool(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # Few distinct values: windows are full of ties.
    check_pool(OPS, random_integers(shape, dtype=dtype, largest=2, device=DEVICE))


def check_every_window(ops: Any) -> None:
    """All windows of {-inf, 0, 1, NaN}^4, against torch."""
    values = list(itertools.product((-math.inf, 0.0, 1.0, math.nan), repeat=4))
    x = torch.tensor(values, device=DEVICE).view(1, len(values), 2, 2)
    check_pool(ops, x)


def test_every_window() -> None:
    check_every_window(OPS)


@elsewhere
@pytest.mark.parametrize("target", [HOPPER, BLACKWELL, MANY_SPLITS], ids=lambda target: f"{target.name}")
@pytest.mark.parametrize(("dtype", "allow_tf32"), [(torch.bfloat16, False), (torch.float32, True)], ids=str)
def test_other_configurations(
    target: gpu.Target, dtype: torch.dtype, allow_tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "target", lambda device: target)
    for shape in ((1, 80, 136, 5, 9), (2, 32, 40, 9, 1), (2, 16, 16, 19, 17)):
        x, weight, head_weight, bias = make_inputs(*shape, dtype)
        check_transpose(OPS, x, weight, bias, allow_tf32=allow_tf32)
        check_head(OPS, x, head_weight, bias, "sigmoid", allow_tf32=allow_tf32)


@elsewhere
def test_which_configurations_these_are() -> None:
    assert config_pixels.subpixel_tile_config(80, 136, torch.bfloat16, HOPPER) is not None
    assert config_pixels.subpixel_tile_config(32, 40, torch.bfloat16, BLACKWELL) is not None
    assert config_pixels.subpixel_tile_config(80, 136, torch.float32, HOPPER) is None
    chosen = config_pixels.pixel_weight_grad_config(16, 16, torch.bfloat16, MANY_SPLITS, allow_tf32=False)
    programs = config_pixels.pixel_weight_grad_programs(chosen, 16, 16, 4)
    assert config.weight_grad_splits(programs, 2 * 19 * 17 // chosen.block_p, MANY_SPLITS) > 1


channels = st.one_of(st.sampled_from([1, 3, 5, 17]), st.integers(1, 40))


@settings(max_examples=8, derandomize=True, deadline=None)
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
    check_transpose(OPS, x, weight, bias if with_bias else None)
    check_head(OPS, x, head_weight, bias if with_bias else None, activation)
    if min(shape[3:]) >= 2:
        check_pool(OPS, x)


@pytest.mark.parametrize("target", ["here", pytest.param("hopper", marks=elsewhere)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_every_tensor(layout: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if target == "hopper":
        monkeypatch.setattr(gpu, "target", lambda device: HOPPER)
    x, weight, head_weight, bias = make_inputs(2, 16, 40, 3, 4, torch.float16)
    x, weight, head_weight = (in_layout(t, layout) for t in (x, weight, head_weight))
    bias = bias.repeat_interleave(2)[::2]
    check_transpose(OPS, x, weight, bias)
    check_head(OPS, x, head_weight, bias, "softmax")
    y = OPS.transpose(x, weight, bias)
    grad = in_layout(random_cotangent(y), layout)
    assert_within(OPS.transpose_input_grad(grad, weight), *conv_transpose2x2_input_grad_expected(grad, weight))
    gw, gb = OPS.transpose_weight_grad(grad, x)
    assert gb is None
    assert_within(gw, *conv_transpose2x2_weight_grad_expected(grad, x))
    y = in_layout(OPS.head(x, head_weight, bias, activation="softmax"), layout)
    grad = in_layout(random_cotangent(y), layout)
    gx = OPS.head_input_grad(grad, head_weight, y, activation="softmax")
    assert_within(gx, *conv1x1_input_grad_expected(grad, head_weight, y, activation="softmax"))
    gw, gb = OPS.head_weight_grad(grad, x, y, activation="softmax")
    assert gb is None
    assert_within(gw, *conv1x1_weight_grad_expected(grad, x, y, activation="softmax"))


def check_large_logits(ops: Any) -> None:
    """Activations neither overflow nor drop what is not a number."""
    x = torch.tensor([-1e4, -300.0, -90.0, -20.0, 20.0, 90.0, 300.0, 1e4, math.inf, -math.inf, math.nan], device=DEVICE)
    x = x.view(1, 1, 1, -1)
    weight = torch.tensor([1.0, 0.5, -1.0], device=DEVICE).view(3, 1, 1, 1)
    for activation in ("sigmoid", "softmax"):
        y = ops.head(x, weight, activation=activation)
        assert_within(y[..., :8], *conv1x1_expected(x[..., :8], weight, activation=activation))
        v = F.conv2d(x, weight)
        expected = v.sigmoid() if activation == "sigmoid" else v.softmax(1)
        assert_within(y[..., 8:], expected[..., 8:], 0.0)


def test_large_logits() -> None:
    check_large_logits(OPS)


def check_integers_are_exact(ops: Any) -> None:
    """Sums of small integers have no rounding: every result must be equal, not close."""
    x, weight, head_weight, bias = make_inputs(2, 17, 5, 5, 9, torch.float32, random_integers)
    y = ops.transpose(x, weight, bias)
    assert_within(y, conv_transpose2x2_expected(x, weight, bias).value, 0.0)
    grad = random_integers(y.shape, seed=7, device=DEVICE)
    gw, gb = ops.transpose_weight_grad(grad, x, with_bias=True)
    gx = ops.transpose_input_grad(grad, weight)
    assert_within(gx, conv_transpose2x2_input_grad_expected(grad, weight).value, 0.0)
    assert_within(gw, conv_transpose2x2_weight_grad_expected(grad, x).value, 0.0)
    assert_within(gb, grad.double().sum((0, 2, 3)), 0.0)
    y = ops.head(x, head_weight, bias)
    assert_within(y, conv1x1_expected(x, head_weight, bias).value, 0.0)
    grad = random_integers(y.shape, seed=7, device=DEVICE)
    gw, gb = ops.head_weight_grad(grad, x, with_bias=True)
    assert_within(ops.head_input_grad(grad, head_weight), conv1x1_input_grad_expected(grad, head_weight).value, 0.0)
    assert_within(gw, conv1x1_weight_grad_expected(grad, x).value, 0.0)
    assert_within(gb, grad.double().sum((0, 2, 3)), 0.0)


def test_integers_are_exact() -> None:
    check_integers_are_exact(OPS)


@pytest.mark.parametrize("target", ["here", pytest.param("hopper", marks=elsewhere)])
def test_what_must_not_change_a_bit(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if target == "hopper":
        monkeypatch.setattr(gpu, "target", lambda device: HOPPER)
    x, weight, head_weight, bias = make_inputs(3, 24, 40, 9, 5, torch.bfloat16)
    images, permuted = torch.tensor([2, 0, 1]), torch.randperm(40, generator=torch.Generator().manual_seed(0))

    y = OPS.transpose(x, weight, bias)
    assert torch.equal(OPS.transpose(x, weight, bias), y)
    assert torch.equal(OPS.transpose(x[images], weight, bias), y[images])
    assert torch.equal(OPS.transpose(x[1:2], weight, bias), y[1:2])
    assert torch.equal(OPS.transpose(x, weight[:, permuted], bias[permuted]), y[:, permuted])
    assert torch.equal(OPS.transpose(x * 4, weight / 2, bias * 2), y * 2)
    gx = OPS.transpose_input_grad(y, weight)
    assert torch.equal(OPS.transpose_input_grad(y[images], weight), gx[images])
    assert torch.equal(OPS.transpose_input_grad(y[1:2], weight), gx[1:2])

    for activation in ACTIVATIONS:
        z = OPS.head(x, head_weight, bias, activation=activation)
        assert torch.equal(OPS.head(x[images], head_weight, bias, activation=activation), z[images])
        assert torch.equal(OPS.head(x[1:2], head_weight, bias, activation=activation), z[1:2])
        gz = OPS.head_input_grad(z, head_weight, z, activation=activation)
        assert torch.equal(OPS.head_input_grad(z[1:2], head_weight, z[1:2], activation=activation), gz[1:2])
        if activation != "softmax":  # Whose sum runs over the channels in order.
            shuffled = OPS.head(x, head_weight[permuted], bias[permuted], activation=activation)
            assert torch.equal(shuffled, z[:, permuted])
        first, second = (OPS.head_weight_grad(z, x, z, activation=activation, with_bias=True) for _ in range(2))
        assert all(map(torch.equal, first, second))
    first, second = (OPS.transpose_weight_grad(y, x, with_bias=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def check_boxes(ops: Any) -> None:
    """The descriptor form, which the interpreter runs as if it were a Hopper GPU."""
    x, weight, _, bias = make_inputs(1, 80, 40, 3, 9, torch.float16)
    target = (lambda device: HOPPER) if INTERPRETED else gpu.target
    with mock.patch.object(ops.gpu, "target", target):
        assert_within(ops.transpose(x, weight, bias), *conv_transpose2x2_expected(x, weight, bias))


def parity_suite(ops: Any) -> None:
    """A short run over everything the kernels do, for the injected faults below."""
    check_boxes(ops)
    check_integers_are_exact(ops)
    check_large_logits(ops)
    check_every_window(ops)
    check_pool(ops, random_input((2, 3, 7, 5), device=DEVICE))
    x, weight, head_weight, bias = make_inputs(1, 3, 17, 17, 19, torch.float32)
    check_transpose(ops, x, weight, bias)
    for activation in ("sigmoid", "softmax"):
        check_head(ops, x, head_weight, bias, activation)


# A file of the kernels package, a fragment of it, and its mutation.
BUGS = {
    "minimum_for_maximum": ("tiles", "tl.maximum(", "tl.minimum("),
    "odd_height_forgotten": ("max_pool2x2", " + row // (H // 2) * (H % 2)", ""),
    "second_row_lost": ("max_pool2x2", "pointers += W.to(tl.int64) * C", "pointers += C"),
    "odd_windows_wrap": ("max_pool2x2", "w = window % (W // 2)", "w = window % ((W + 1) // 2)"),
    "rows_and_columns_of_subpixels_swapped": ("pixels", "sub // 2 * 2 * W + sub % 2", "sub % 2 * 2 * W + sub // 2"),
    "subpixel_rows_not_doubled": ("pixels", "4 * rows - 2 * (rows % W)", "4 * rows - 2 * (rows % (W + 1))"),
    "last_step_lost": ("pixels", "tl.cdiv(C, BLOCK_K) * SUBPIXELS", "(C // BLOCK_K) * SUBPIXELS"),
    "sigmoid_grad_without_y": ("pixels", "g * y * (1.0 - y)", "g * (1.0 - y)"),
    "softmax_grad_without_sum": ("pixels", "y * (g - dots[:, None])", "y * g"),
    "transpose_weight_of_one_subpixel": ("conv_transpose2x2", "weight_ptr + sub * stride_sub", "weight_ptr"),
    "transpose_bias_lost": (
        "conv_transpose2x2",
        "if bias_ptr is not None:\n        acc +=",
        "if False:\n        acc +=",
    ),
    "softmax_keeps_its_maximum": ("conv1x1", "v - tl.reduce(v, 1, nan_max)[:, None]", "v"),
    "softmax_counts_padding": ("conv1x1", 'mask_n[None, :], v, -float("inf")', "mask_n[None, :], v, 0.0"),
    "logits_rounded_to_half": ("conv1x1", "tl.sigmoid(acc)", "tl.sigmoid(acc.to(tl.float16).to(tl.float32))"),
    "last_block_of_splits_lost": ("pixel_weight_grad", "+ blocks_per_split,", "+ blocks_per_split - 1,"),
    "bias_of_the_last_block_only": ("pixel_weight_grad", "totals += g.to", "totals = g.to"),
    "bias_of_one_subpixel": ("pixel_weight_grad", "(split * SUBPIXELS + sub) * COUT", "split * SUBPIXELS * COUT"),
    "first_split_only": ("reduction", "in range(rows)", "in range(1)"),
}
if INTERPRETED or gpu.target(DEVICE).capability >= 90:
    BUGS |= {
        "box_of_the_first_subpixel": ("conv_transpose2x2", "[sub * COUT + n0, ", "[n0, "),
        "boxes_rows_and_columns_swapped": ("conv_transpose2x2", "sub // 2, w0, sub % 2", "sub % 2, w0, sub // 2"),
        "last_box_of_channels_lost": ("conv_transpose2x2", "gpu.cdiv(channels, block_k)", "channels // block_k"),
    }


def test_parity_suite_passes_on_the_kernels_as_they_are() -> None:
    parity_suite(OPS)


@pytest.mark.parametrize("bug", BUGS)
def test_injected_fault_is_caught(bug: str, tmp_path: Path) -> None:
    with kernels_with(BUGS[bug], tmp_path) as package, pytest.raises(AssertionError):
        parity_suite(load_ops(package))
