"""The conv3x3 kernels, run by Triton's interpreter, against float64 under the derived tolerance."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastunet.kernels import gpu
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
    conv3x3_activation_grad_expected,
    conv3x3_expected,
    conv3x3_input_grad_expected,
    conv3x3_weight_grad_expected,
    in_layout,
    pooled_expected,
    random_cotangent,
    random_input,
    random_integers,
)

pytestmark = [MARK, pytest.mark.usefixtures("nan_in_fresh_memory")]

HOPPER = dataclasses.replace(gpu.known_target(90), multiprocessors=4)
BLACKWELL = dataclasses.replace(gpu.known_target(100), multiprocessors=4)
MANY_SPLITS = dataclasses.replace(gpu.INTERPRETER, multiprocessors=32)


def load_ops(package: str = "fastunet.kernels") -> SimpleNamespace:
    """The public launchers of a kernels package."""
    modules = ("conv3x3.pointer", "conv3x3.grad", "activation_grad", "epilogue", "gpu")
    conv3x3, grad, activation_grad, epilogue, gpu = (importlib.import_module(f"{package}.{name}") for name in modules)
    return SimpleNamespace(
        conv3x3=conv3x3.conv3x3,
        with_head=conv3x3.conv3x3_head,
        with_statistics=conv3x3.conv3x3_with_statistics,
        Head=epilogue.Head,
        Normalisation=epilogue.Normalisation,
        activation_grad=activation_grad.activation_grad,
        input_grad=grad.conv3x3_input_grad,
        two_input_grads=grad.conv3x3_two_input_grads,
        weight_grad=grad.conv3x3_weight_grad,
        gpu=gpu,
    )


OPS = load_ops()


def make_inputs(
    n: int, c1: int, c2: int, c_out: int, h: int, w: int, dtype: torch.dtype, make: Any = random_input
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """x, up (None where c2 is 0), weight and bias."""
    options = {"dtype": dtype, "device": DEVICE}
    x = make((n, c1, h, w), seed=1, **options)
    up = make((n, c2, h, w), seed=2, **options) if c2 else None
    return x, up, make((c_out, c1 + c2, 3, 3), seed=3, **options), make((c_out,), seed=4, **options)


def check_forward(ops: Any, x: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None, **options: Any) -> None:
    """Value, dtype, shape and memory format of both outputs."""
    pool = min(x.shape[2:]) >= 2
    y, pooled = ops.conv3x3(x, weight, bias, up=up, pool=pool, **options)
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    if INTERPRETED:  # It knows no TF32, and computes such products in float32.
        options.pop("allow_tf32", None)
    expected = conv3x3_expected(x, weight, bias, up=up, **options)
    assert_within(y, *expected)
    assert (pooled is not None) == pool
    if pooled is not None:
        assert pooled.is_contiguous(memory_format=torch.channels_last)
        assert_within(pooled, *pooled_expected(expected))
        if x.shape[0]:
            assert torch.equal(pooled, F.max_pool2d(y, 2))


def check_gradients(ops: Any, x: Tensor, weight: Tensor, *, allow_tf32: bool = False) -> None:
    """The gradients of input, weight and bias."""
    grad = random_cotangent(x.new_empty((x.shape[0], weight.shape[0], *x.shape[2:])))
    gx = ops.input_grad(grad, weight, allow_tf32=allow_tf32)
    assert gx.dtype == x.dtype
    assert gx.is_contiguous(memory_format=torch.channels_last)
    rounds = {"allow_tf32": allow_tf32 and not INTERPRETED}
    assert_within(gx, *conv3x3_input_grad_expected(grad, weight, **rounds))
    gw, gb = ops.weight_grad(grad, x, with_bias=True, allow_tf32=allow_tf32)
    assert gw.dtype == gb.dtype == x.dtype
    assert_within(gw, *conv3x3_weight_grad_expected(grad, x, **rounds))
    assert_within(gb, *bias_grad_expected(grad))


# n, c1, c2, c_out, h, w: folded taps, rows that no vector load fits, whole vectors; tiles cut by every edge.
SHAPES = (
    (1, 1, 0, 5, 9, 7),
    (3, 3, 0, 17, 5, 33),
    (1, 5, 0, 1, 33, 2),
    (1, 5, 3, 17, 6, 10),
    (1, 17, 0, 3, 9, 9),
    (1, 16, 0, 32, 8, 9),
    (1, 32, 16, 48, 3, 9),
    (2, 33, 0, 5, 1, 1),
    (0, 3, 0, 4, 4, 4),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, up, weight, bias = make_inputs(*shape, dtype)
    check_forward(OPS, x, up, weight, bias, negative_slope=0.0)


@pytest.mark.parametrize("slope", [None, 0.1, 1.5])
@pytest.mark.parametrize("with_bias", [True, False])
def test_activations_and_bias(slope: float | None, with_bias: bool) -> None:
    x, _, weight, bias = make_inputs(1, 3, 0, 5, 6, 7, torch.bfloat16)
    check_forward(OPS, x, None, weight, bias if with_bias else None, negative_slope=slope)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] == 0], ids=str)
def test_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, _, weight, _ = make_inputs(*shape, dtype)
    check_gradients(OPS, x, weight)


# Configurations for other GPUs run in the interpreter only: a GPU runs its own.
elsewhere = pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the configurations chosen for itself")


@elsewhere
@pytest.mark.parametrize("target", [HOPPER, MANY_SPLITS], ids=["hopper", "many_splits"])
@pytest.mark.parametrize(("dtype", "allow_tf32"), [(torch.bfloat16, False), (torch.float32, True)], ids=str)
def test_other_configurations(
    target: gpu.Target, dtype: torch.dtype, allow_tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "target", lambda device: target)
    x, up, weight, bias = make_inputs(1, 64, 16, 64, 5, 9, dtype)
    check_forward(OPS, x, up, weight, bias, negative_slope=0.0, allow_tf32=allow_tf32)
    x, _, weight, _ = make_inputs(2, 16, 0, 16, 19, 17, dtype)
    check_gradients(OPS, x, weight, allow_tf32=allow_tf32)


TARGETS = {"here": None, **({"hopper": HOPPER, "blackwell": BLACKWELL} if INTERPRETED else {})}


@pytest.fixture(params=TARGETS.values(), ids=TARGETS)
def any_target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> gpu.Target | None:
    """The target as it is, and, in the interpreter, those that get the descriptor form."""
    if request.param is not None:
        monkeypatch.setattr(gpu, "target", lambda device: request.param)
    return request.param


# n, c1, c2, c_out, h, w: channels that do not fill a block, tiles cut by every edge, whole tiles.
DESCRIPTOR_SHAPES = (
    (2, 48, 0, 72, 9, 7),
    (1, 32, 16, 40, 8, 8),
    (1, 16, 16, 136, 1, 10),
    (1, 64, 0, 64, 33, 9),
    (1, 16, 0, 40, 4, 32),
    (1, 16, 0, 40, 1, 64),
    (0, 16, 0, 40, 4, 4),
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", DESCRIPTOR_SHAPES, ids=str)
@pytest.mark.usefixtures("any_target")
def test_descriptor_form(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, up, weight, bias = make_inputs(*shape, dtype)
    check_forward(OPS, x, up, weight, bias, negative_slope=0.0)
    check_gradients(OPS, x, weight[:, : shape[1]])


@elsewhere
def test_descriptors_are_chosen_for_hopper() -> None:
    for n, c1, c2, c_out, h, w in DESCRIPTOR_SHAPES:
        shape = config.ConvShape(c1, c2, c_out, h, w, config.aligned(c1, c2, c_out))
        assert config.conv_config(shape, torch.float16, HOPPER, allow_tf32=False).form == config.DESCRIPTOR, n
    whole, cut = (config.ConvShape(48, 0, 40, side, 8) for side in (8, 9))
    forms = [config.weight_grad_config(s, torch.float16, HOPPER, allow_tf32=False).form for s in (whole, cut)]
    assert forms == [config.DESCRIPTOR, config.POINTER]


@pytest.mark.usefixtures("any_target")
def test_two_inputs_get_two_gradients() -> None:
    for c1, c2, c_out, dtype in ((40, 48, 16, torch.bfloat16), (3, 17, 5, torch.float32), (24, 40, 48, torch.float16)):
        _, _, weight, _ = make_inputs(1, c1, c2, c_out, 1, 1, dtype)
        grad = random_input((2, c_out, 9, 10), dtype=dtype, device=DEVICE)
        for actual, share in zip(OPS.two_input_grads(grad, weight, c1), weight.split([c1, c2], dim=1), strict=True):
            assert actual.is_contiguous(memory_format=torch.channels_last)
            assert_within(actual, *conv3x3_input_grad_expected(grad, share))


@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.usefixtures("any_target")
def test_input_grad_through_the_producers_activation(slope: float) -> None:
    x, _, weight, _ = make_inputs(1, 40, 0, 48, 9, 10, torch.bfloat16)
    x = F.leaky_relu(x, slope)
    grad = random_input((1, 48, 9, 10), dtype=torch.bfloat16, device=DEVICE, seed=9)
    value, tolerance = conv3x3_input_grad_expected(grad, weight)
    passed = torch.where(x > 0, 1.0, slope).double()
    assert_within(OPS.input_grad(grad, weight, x=x, negative_slope=slope), value * passed, tolerance)


@pytest.mark.usefixtures("any_target")
def test_two_forms_of_the_weight_in_memory() -> None:
    x, up, weight, bias = make_inputs(1, 32, 16, 48, 8, 8, torch.float16)
    for layout in LAYOUTS:
        w = in_layout(weight, layout)
        check_forward(OPS, in_layout(x, layout), in_layout(up, layout), w, bias, negative_slope=0.0)
        check_gradients(OPS, in_layout(x, layout), w[:, :32])


def test_weight_grad_runs_in_several_splits() -> None:
    shape = config.ConvShape(16, 0, 16, 19, 17)
    chosen = config.weight_grad_config(shape, torch.bfloat16, MANY_SPLITS, allow_tf32=False)
    tiles = 2 * math.ceil(19 / chosen.tile_h) * math.ceil(17 / chosen.tile_w)
    programs = config.weight_grad_programs(chosen, 16, 16)
    assert config.weight_grad_splits(programs, tiles, MANY_SPLITS) > 2


any_shape = given(
    shape=st.tuples(*(st.integers(low, high) for low, high in ((0, 3), (1, 20), (0, 18), (1, 34), (1, 33), (1, 33)))),
    dtype=st.sampled_from(DTYPES),
    slope=st.sampled_from([None, 0.0, 0.2]),
    layout=st.sampled_from(LAYOUTS),
)


def check_any_shape(shape: tuple[int, ...], dtype: torch.dtype, slope: float | None, layout: str) -> None:
    x, up, weight, bias = make_inputs(*shape, dtype)
    check_forward(OPS, in_layout(x, layout), up, weight, bias, negative_slope=slope)
    check_gradients(OPS, in_layout(x, layout), weight[:, : shape[1]])


test_any_shape = settings(max_examples=8, derandomize=True, deadline=None)(any_shape(check_any_shape))
test_many_shapes = pytest.mark.slow(
    settings(max_examples=80, derandomize=True, deadline=None)(any_shape(check_any_shape))
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 16])
def test_layouts_of_every_tensor(layout: str, channels: int) -> None:
    x, up, weight, bias = make_inputs(2, channels, 16, 17, 5, 6, torch.float16)
    x, up, weight = in_layout(x, layout), in_layout(up, layout), in_layout(weight, layout)
    check_forward(OPS, x, up, weight, bias.repeat_interleave(2)[::2], negative_slope=0.0)
    y, _ = OPS.conv3x3(x, weight, bias, up=up)
    grad = in_layout(random_cotangent(y), layout)
    for inputs, channel_slice in ((x, weight[:, :channels]), (up, weight[:, channels:])):
        assert_within(OPS.input_grad(grad, channel_slice), *conv3x3_input_grad_expected(grad, channel_slice))
        gw, gb = OPS.weight_grad(grad, inputs)
        assert gb is None
        assert_within(gw, *conv3x3_weight_grad_expected(grad, inputs))
    pooled = in_layout(random_cotangent(F.max_pool2d(y, 2)), layout)
    y = in_layout(y, layout)
    assert_within(OPS.activation_grad(y, grad, pooled, 0.0), *conv3x3_activation_grad_expected(y, grad, pooled, 0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slope", [None, 0.0, 0.1])
@pytest.mark.parametrize("given_gradients", ["both", "y", "pooled"])
def test_activation_grad(dtype: torch.dtype, slope: float | None, given_gradients: str) -> None:
    # Few distinct values: windows are full of ties, and a ReLU's zeros are among them.
    y = random_integers((2, 5, 7, 5), dtype=dtype, largest=2, seed=5, device=DEVICE)
    y = y.clamp(min=0) if slope == 0 else y
    check_activation_grad(OPS, y, slope, given_gradients)


def check_activation_grad(ops: Any, y: Tensor, slope: float | None, given_gradients: str = "both") -> None:
    grad_y = random_cotangent(y) if given_gradients != "pooled" else None
    grad_pooled = random_cotangent(F.max_pool2d(y, 2), seed=6) if given_gradients != "y" else None
    actual = ops.activation_grad(y, grad_y, grad_pooled, slope)
    assert actual.dtype == y.dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_within(actual, *conv3x3_activation_grad_expected(y, grad_y, grad_pooled, slope))


def check_pool_grad_of_every_window(ops: Any) -> None:
    """All windows of {-inf, 0, 1, NaN}^4, against torch's own backward."""
    values = list(itertools.product((-math.inf, 0.0, 1.0, math.nan), repeat=4))
    y = torch.tensor(values, device=DEVICE).view(1, len(values), 2, 2)
    leaf = y.clone().requires_grad_()
    cotangent = random_cotangent(y.new_zeros(1, len(values), 1, 1))
    F.max_pool2d(leaf, 2).backward(cotangent)
    assert_within(ops.activation_grad(y, None, cotangent, None), leaf.grad, 0.0)


def test_pool_grad_of_every_window() -> None:
    check_pool_grad_of_every_window(OPS)


def check_extremes(ops: Any, slope: float | None) -> None:
    """NaN and infinities in the input reach, and stop, exactly where they do in torch."""
    x, _, weight, bias = make_inputs(1, 3, 0, 5, 12, 12, torch.float32)
    x[0, 0, 2, 2], x[0, 1, 2, 9], x[0, 2, 9, 2] = math.nan, math.inf, -math.inf
    y, pooled = ops.conv3x3(x, weight, bias, negative_slope=slope, pool=True)
    v = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    expected = v if slope is None else F.leaky_relu(v, slope) if slope else F.relu(v)
    for actual, reference in ((y, expected), (pooled, F.max_pool2d(expected, 2))):
        assert torch.equal(actual.isnan(), reference.isnan())
        assert torch.equal(actual.isposinf(), reference.isposinf())
        assert torch.equal(actual.isneginf(), reference.isneginf())


@pytest.mark.parametrize("slope", [None, 0.0, 0.1])
def test_nan_and_infinity(slope: float | None) -> None:
    check_extremes(OPS, slope)


def test_infinity_next_to_a_tile_of_the_weight_grad() -> None:
    # Pixels past the image's edge multiply no neighbour: zero times infinity would be NaN.
    grad, x = random_input((1, 3, 5, 5), device=DEVICE), random_input((1, 16, 5, 5), device=DEVICE)
    x[0, 0, 4, 4] = math.inf
    gw, _ = OPS.weight_grad(grad, x)
    assert_within(gw.isnan().float(), conv3x3_weight_grad_expected(grad, x).value.isnan().float(), 0.0)


def check_integers_are_exact(ops: Any) -> None:
    """Sums of small integers have no rounding: every result must be equal, not close."""
    x, up, weight, bias = make_inputs(2, 17, 3, 5, 9, 9, torch.float32, random_integers)
    y, pooled = ops.conv3x3(x, weight, bias, up=up, pool=True)
    reference = F.conv2d(torch.cat([x, up], 1).double(), weight.double(), bias.double(), padding=1)
    assert_within(y, reference, 0.0)
    assert_within(pooled, F.max_pool2d(reference, 2), 0.0)
    grad = random_integers((2, 5, 9, 9), seed=7, device=DEVICE)
    assert_within(ops.input_grad(grad, weight[:, 17:]), conv3x3_input_grad_expected(grad, weight[:, 17:]).value, 0.0)
    for inputs in (x, up):
        gw, gb = ops.weight_grad(grad, inputs, with_bias=True)
        assert_within(gw, conv3x3_weight_grad_expected(grad, inputs).value, 0.0)
        assert_within(gb, grad.double().sum((0, 2, 3)), 0.0)


def test_integers_are_exact() -> None:
    check_integers_are_exact(OPS)


def test_what_must_not_change_a_bit() -> None:
    x, _, weight, bias = make_inputs(3, 17, 0, 35, 9, 5, torch.bfloat16)
    y, _ = OPS.conv3x3(x, weight, bias, negative_slope=0.0)
    gx = OPS.input_grad(y, weight)
    gw, gb = OPS.weight_grad(y, x, with_bias=True)

    again, _ = OPS.conv3x3(x, weight, bias, negative_slope=0.0)
    assert torch.equal(again, y)
    gw_again, gb_again = OPS.weight_grad(y, x, with_bias=True)
    assert torch.equal(gw_again, gw)
    assert torch.equal(gb_again, gb)

    images = torch.tensor([2, 0, 1])
    assert torch.equal(OPS.conv3x3(x[images], weight, bias, negative_slope=0.0)[0], y[images])
    assert torch.equal(OPS.conv3x3(x[1:2], weight, bias, negative_slope=0.0)[0], y[1:2])
    assert torch.equal(OPS.input_grad(y[1:2], weight), gx[1:2])

    channels = torch.randperm(35, generator=torch.Generator().manual_seed(0))
    assert torch.equal(OPS.conv3x3(x, weight[channels], bias[channels], negative_slope=0.0)[0], y[:, channels])

    scaled, _ = OPS.conv3x3(x * 4, weight / 2, bias * 2, negative_slope=0.0)
    assert torch.equal(scaled, y * 2)


def test_empty_batch_has_zero_weight_gradient() -> None:
    gw, gb = OPS.weight_grad(
        torch.zeros(0, 5, 4, 4, device=DEVICE), torch.zeros(0, 3, 4, 4, device=DEVICE), with_bias=True
    )
    assert torch.equal(gw.cpu(), torch.zeros(5, 3, 3, 3))
    assert torch.equal(gb.cpu(), torch.zeros(5))


def parity_suite(ops: Any) -> None:
    """A short run over everything the kernels do, for the injected faults below."""
    for shape in ((2, 3, 0, 17, 5, 9), (1, 5, 3, 17, 6, 10)):
        x, up, weight, bias = make_inputs(*shape, torch.float32)
        check_forward(ops, x, up, weight, bias, negative_slope=0.1)
    x, _, weight, _ = make_inputs(2, 9, 0, 8, 9, 9, torch.float32)
    check_gradients(ops, x, weight)
    check_gradients(ops, *make_inputs(1, 3, 0, 5, 33, 33, torch.float32)[::2])
    check_extremes(ops, 0.0)
    check_pool_grad_of_every_window(ops)
    check_activation_grad(ops, random_integers((1, 5, 7, 5), largest=2, device=DEVICE).clamp(min=0), 0.0)


# A file of the kernels package, a fragment of it, and its mutation.
BUGS = {
    "first_row_lost": ("tiles", "inside = (h >= 0)", "inside = (h > 0)"),
    "taps_mirrored": ("tiles", "dw = tap % 3 - 1", "dw = 1 - tap % 3"),
    "minimum_for_maximum": ("tiles", "tl.maximum(", "tl.minimum("),
    "relu_drops_nan": ("tiles", "tl.where(v <= 0.0, 0.0, v)", "tl.where(v > 0.0, v, 0.0)"),
    "slope_of_the_other_side": ("tiles", "tl.where(v > 0.0, v, v *", "tl.where(v < 0.0, v, v *"),
    "gradient_through_zero": ("tiles", "tl.where(y <= 0.0, 0.0, g)", "tl.where(y < 0.0, 0.0, g)"),
    "input_grad_not_flipped": ("conv3x3.pointer", "8 - tap if FLIP else tap", "tap"),
    "up_reads_the_first_weights": ("conv3x3.pointer", "weight_ptr, C1, steps2", "weight_ptr, 0, steps2"),
    "last_step_lost": ("conv3x3.pointer", "for step in range(steps)", "for step in range(steps - 1)"),
    "last_pooled_column_lost": ("conv3x3.pointer", "w0 // 2, H // 2, W // 2,", "w0 // 2, H // 2, W // 2 - 1,"),
    "sum_rounded_to_half": ("epilogue", "return activate(acc,", "return activate(acc.to(tl.float16).to(tl.float32),"),
    "last_of_equals_wins": ("windows", "(v > best)", "(v >= best)"),
    "nan_does_not_win": ("windows", " | (v != v)", ""),
    "edge_windows_routed": ("activation_grad", "tl.where(winner == 3, routed", "tl.where(winner == 2, routed"),
    "last_tile_of_splits_lost": ("conv3x3.grad", "first + tiles_per_split,", "first + tiles_per_split - 1,"),
    "bias_of_the_last_tile_only": ("conv3x3.grad", "totals += g.to", "totals = g.to"),
    "first_split_only": ("reduction", "in range(rows)", "in range(1)"),
}


def test_parity_suite_passes_on_the_kernels_as_they_are() -> None:
    parity_suite(OPS)


@pytest.mark.parametrize("bug", BUGS)
def test_injected_fault_is_caught(bug: str, tmp_path: Path) -> None:
    with kernels_with(BUGS[bug], tmp_path) as package, pytest.raises(AssertionError):
        parity_suite(load_ops(package))
