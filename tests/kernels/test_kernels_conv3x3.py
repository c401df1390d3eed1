"""The conv3x3 kernels, run by Triton's interpreter, against float64 under the derived tolerance."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conv3x3_checks import BFLOAT, HALF, Shape, assert_forward, assert_gradients, make_inputs
from fastunet.kernels import gpu
from fastunet.kernels.conv3x3 import config, config_grad
from hypothesis import given, settings
from hypothesis import strategies as st
from injected_faults import check_tests, load
from kernel_device import DEVICE, DTYPES, HOPPER, INTERPRETED, MANY_SPLITS, MARK, on
from torch import Tensor

from fastunet.testing import (
    LAYOUTS,
    assert_within,
    conv3x3_activation_grad_expected,
    conv3x3_input_grad_expected,
    conv3x3_weight_grad_expected,
    in_layout,
    random_cotangent,
    random_input,
    random_integers,
)

pytestmark = [MARK, pytest.mark.usefixtures("nan_in_fresh_memory")]
KERNELS = load()

# n, c1, c2, c_out, h, w: folded taps, rows that no vector load fits, whole vectors; inner tiles, and cut by every edge.
FOLDED, UNALIGNED, ALIGNED = (1, 3, 0, 5, 33, 17), (2, 5, 3, 17, 6, 10), (1, 32, 16, 48, 9, 10)
CASES = [
    *((FOLDED, dtype, None) for dtype in DTYPES),
    (UNALIGNED, torch.float32, None),
    (UNALIGNED, HALF, None),
    (ALIGNED, BFLOAT, None),
    ((1, 1, 0, 1, 2, 33), BFLOAT, None),
    ((2, 33, 0, 5, 1, 1), torch.float32, None),
    ((0, 3, 0, 4, 4, 4), torch.float32, None),
    ((2, 16, 0, 16, 16, 17), BFLOAT, MANY_SPLITS),
    # Boxes: channels that do not fill a block, tiles cut by every edge, whole tiles; runs of 64 pixels, 32 and 16.
    ((2, 48, 0, 72, 9, 7), HALF, HOPPER),
    ((1, 16, 16, 136, 1, 10), BFLOAT, HOPPER),
    ((1, 64, 16, 64, 33, 9), BFLOAT, HOPPER),
    ((1, 32, 16, 40, 8, 8), HALF, HOPPER),
    ((1, 16, 0, 40, 1, 64), BFLOAT, HOPPER),
    ((2, 16, 0, 40, 1, 96), BFLOAT, HOPPER),
    ((1, 16, 0, 40, 3, 48), HALF, HOPPER),
    ((0, 16, 0, 40, 4, 4), HALF, HOPPER),
]


@pytest.mark.parametrize(("shape", "dtype", "target"), CASES, ids=str)
def test_parity(shape: Shape, dtype: torch.dtype, target: gpu.Target | None) -> None:
    x, up, weight, bias = make_inputs(shape, dtype)
    with on(target, KERNELS):
        assert_forward(KERNELS, x, up, weight, bias, negative_slope=0.0)
        assert_gradients(KERNELS, x, up, weight)
        if up is not None:
            assert_gradients(KERNELS, x, None, weight[:, : shape[1]])


def test_tf32() -> None:
    x, up, weight, bias = make_inputs((1, 32, 16, 64, 5, 9), torch.float32)
    assert_forward(KERNELS, x, up, weight, bias, negative_slope=0.0, allow_tf32=True)
    assert_gradients(KERNELS, x, up, weight, allow_tf32=True)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the configurations chosen for itself")
def test_which_variants_these_are() -> None:
    for (_, c1, c2, c_out, h, w), dtype, target in CASES:
        shape = config.ConvShape(c1, c2, c_out, h, w, config.aligned(c1, c2, c_out))
        chosen = config.conv_config(shape, dtype, target or gpu.INTERPRETER, allow_tf32=False)
        assert (chosen.variant == config.DESCRIPTOR) == (target is HOPPER)
    of_weight = [
        config_grad.weight_grad_config(config.ConvShape(48, 0, 40, *image), HALF, HOPPER, allow_tf32=False)
        for image in ((8, 8), (1, 96), (3, 48), (9, 8))
    ]
    assert [each.tile_h * each.tile_w for each in of_weight if each.variant == config.DESCRIPTOR] == [64, 32, 16]
    assert of_weight[-1].variant == config.POINTER
    chosen = config_grad.weight_grad_config(config.ConvShape(16, 0, 16, 16, 17), BFLOAT, MANY_SPLITS, allow_tf32=False)
    tiles = 2 * config.tiles_per_image(chosen, 16, 17)
    assert config_grad.weight_grad_splits(config_grad.weight_grad_programs(chosen, 16, 16), tiles, MANY_SPLITS) > 2


@pytest.mark.parametrize("slope", [None, 0.1, 1.5])
def test_activations_without_bias(slope: float | None) -> None:
    x, _, weight, _ = make_inputs((1, 3, 0, 5, 6, 7), BFLOAT)
    assert_forward(KERNELS, x, None, weight, None, negative_slope=slope)


@pytest.mark.parametrize("target", [None, HOPPER])
def test_input_gradients_through_an_activation(target: gpu.Target | None) -> None:
    for slope in (0.0, 0.1):
        x, _, weight, _ = make_inputs((1, 40, 0, 48, 9, 10), BFLOAT)
        x = F.leaky_relu(x, slope)
        grad = random_input((1, 48, 9, 10), dtype=BFLOAT, device=DEVICE, seed=9)
        value, tolerance = conv3x3_input_grad_expected(grad, weight)
        passed = torch.where(x > 0, 1.0, slope).double()
        with on(target, KERNELS):
            (actual,) = KERNELS.conv3x3.grad.conv3x3_input_grads(grad, weight, [40], x=x, negative_slope=slope)
        assert_within(actual, value * passed, tolerance)


@pytest.mark.parametrize(
    ("layout", "target"), [*((layout, None) for layout in LAYOUTS), ("contiguous", HOPPER), ("unaligned", HOPPER)]
)
def test_layouts_of_every_tensor(layout: str, target: gpu.Target | None) -> None:
    c1 = 3 if target is None else 16
    x, up, weight, bias = make_inputs((2, c1, 16, 40, 4, 6), HALF)
    x, up, weight = in_layout(x, layout), in_layout(up, layout), in_layout(weight, layout)
    with on(target, KERNELS):
        assert_forward(KERNELS, x, up, weight, bias.repeat_interleave(2)[::2], negative_slope=0.0)
        assert_gradients(KERNELS, x, None, weight[:, :c1], layout=layout)
        assert KERNELS.conv3x3.grad.conv3x3_weight_grad(x, up)[1] is None
    y, pooled = (in_layout(t, layout) for t in (x, F.max_pool2d(x, 2)))
    actual = KERNELS.norm_grad.activation_grad(y, x, pooled, 0.0)
    assert_within(actual, *conv3x3_activation_grad_expected(y, x, pooled, 0.0))


@pytest.mark.slow
@settings(max_examples=80, derandomize=True, deadline=None)
@given(
    shape=st.tuples(*(st.integers(low, high) for low, high in ((0, 3), (1, 20), (0, 18), (1, 34), (1, 33), (1, 33)))),
    dtype=st.sampled_from(DTYPES),
    slope=st.sampled_from([None, 0.0, 0.2]),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(shape: Shape, dtype: torch.dtype, slope: float | None, layout: str) -> None:
    x, up, weight, bias = make_inputs(shape, dtype)
    assert_forward(KERNELS, in_layout(x, layout), up, weight, bias, negative_slope=slope)
    assert_gradients(KERNELS, in_layout(x, layout), up, weight)


SLOPES = (None, 0.0, 0.1)
# All pairs of a dtype and a slope, of a slope and which outputs have gradients, and of those and a dtype.
PAIRS = [(dtype, slope, (i + j) % 3) for i, dtype in enumerate(DTYPES) for j, slope in enumerate(SLOPES)]


@pytest.mark.parametrize(("dtype", "slope", "which"), PAIRS, ids=str)
def test_activation_grad(dtype: torch.dtype, slope: float | None, which: int) -> None:
    # Few distinct values: windows are full of ties, and a ReLU's zeros are among them.
    y = random_integers((2, 5, 7, 5), dtype=dtype, largest=2, seed=5, device=DEVICE)
    assert_activation_grad(KERNELS, y.clamp(min=0) if slope == 0 else y, slope, which)


def assert_activation_grad(kernels: ModuleType, y: Tensor, slope: float | None, which: int = 0) -> None:
    """which: 0 for gradients of both outputs, 1 and 2 for one alone."""
    grad_y = random_cotangent(y) if which != 1 else None
    grad_pooled = random_cotangent(F.max_pool2d(y, 2), seed=6) if which != 2 else None
    actual = kernels.norm_grad.activation_grad(y, grad_y, grad_pooled, slope)
    assert actual.dtype == y.dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_within(actual, *conv3x3_activation_grad_expected(y, grad_y, grad_pooled, slope))


def test_infinity_next_to_a_tile_of_the_weight_grad() -> None:
    # Pixels past the image's edge multiply no neighbour: zero times infinity would be NaN.
    grad, x = random_input((1, 3, 5, 5), device=DEVICE), random_input((1, 16, 5, 5), device=DEVICE)
    x[0, 0, 4, 4] = math.inf
    gw, _ = KERNELS.conv3x3.grad.conv3x3_weight_grad(grad, x)
    assert_within(gw.isnan().float(), conv3x3_weight_grad_expected(grad, x).value.isnan().float(), 0.0)


# --- what catches the injected faults ---


def leaky_sums_of_one_and_two_inputs(kernels: ModuleType) -> None:
    for shape in ((2, 3, 0, 17, 5, 9), (1, 5, 3, 17, 6, 10)):
        assert_forward(kernels, *make_inputs(shape, torch.float32), negative_slope=0.1)


def gradients_tap_by_tap(kernels: ModuleType) -> None:
    assert_gradients(kernels, *make_inputs((2, 9, 0, 8, 5, 9), torch.float32)[:3])


def gradients_of_several_parts(kernels: ModuleType) -> None:
    assert_gradients(kernels, *make_inputs((1, 3, 0, 5, 33, 33), torch.float32)[:3])


def gradients_of_two_inputs_in_one_block(kernels: ModuleType) -> None:
    for target, channels in ((None, 16), (HOPPER, 32)):
        _, _, weight, _ = make_inputs((1, channels, channels, 16, 1, 1), HALF, random_integers)
        grad = random_integers((2, 16, 9, 10), dtype=HALF, device=DEVICE)
        with on(target, kernels), kernels.gpu.recording() as launches:
            actual = kernels.conv3x3.grad.conv3x3_input_grads(grad, weight, [channels, channels])
        for each, share in zip(actual, weight.split(channels, dim=1), strict=True):
            assert_within(each, *conv3x3_input_grad_expected(grad, share))
        (launch,) = launches
        assert launch.grid == 2 * -(-9 // launch.arguments["TILE_H"]) * 2


def integers_are_exact(kernels: ModuleType) -> None:
    """Sums of small integers have no rounding: every result must be equal, not close."""
    x, up, weight, bias = make_inputs((2, 17, 3, 5, 9, 9), torch.float32, random_integers)
    y, pooled = kernels.conv3x3.pointer.conv3x3(x, weight, bias, up=up, pool=True)
    reference = F.conv2d(torch.cat([x, up], 1).double(), weight.double(), bias.double(), padding=1)
    assert_within(y, reference, 0.0)
    assert_within(pooled, F.max_pool2d(reference, 2), 0.0)
    grad, of_up = random_integers((2, 5, 9, 9), seed=7, device=DEVICE), weight[:, 17:]
    (gx,) = kernels.conv3x3.grad.conv3x3_input_grads(grad, of_up, [3])
    assert_within(gx, conv3x3_input_grad_expected(grad, of_up).value, 0.0)
    for image in (x, up):
        gw, gb = kernels.conv3x3.grad.conv3x3_weight_grad(grad, image, with_bias=True)
        assert_within(gw, conv3x3_weight_grad_expected(grad, image).value, 0.0)
        assert_within(gb, grad.double().sum((0, 2, 3)), 0.0)


def nan_and_infinity_as_in_torch(kernels: ModuleType) -> None:
    """They reach, and stop, exactly where they do there."""
    for slope in SLOPES:
        x, _, weight, bias = make_inputs((1, 3, 0, 5, 12, 12), torch.float32)
        x[0, 0, 2, 2], x[0, 1, 2, 9], x[0, 2, 9, 2] = math.nan, math.inf, -math.inf
        y, pooled = kernels.conv3x3.pointer.conv3x3(x, weight, bias, negative_slope=slope, pool=True)
        v = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
        expected = v if slope is None else F.leaky_relu(v, slope) if slope else F.relu(v)
        for actual, reference in ((y, expected), (pooled, F.max_pool2d(expected, 2))):
            for state in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(state(actual), state(reference))


def gradients_through_relu_and_pooling(kernels: ModuleType) -> None:
    assert_activation_grad(kernels, random_integers((1, 5, 7, 5), largest=2, device=DEVICE).clamp(min=0), 0.0)


test_check, test_injected_fault_is_caught = check_tests({
    leaky_sums_of_one_and_two_inputs: [
        ("tiles", "inside = (h >= 0)", "inside = (h > 0)"),
        ("tiles", "dw = tap % 3 - 1", "dw = 1 - tap % 3"),
        ("tiles", "tl.maximum(", "tl.minimum("),
        ("tiles", "tl.where(v > 0.0, v, v *", "tl.where(v < 0.0, v, v *"),
        ("conv3x3.pointer", "weight_ptr, C1 + first2, steps2", "weight_ptr, first2, steps2"),
        ("conv3x3.pointer", "for step in range(steps)", "for step in range(steps - 1)"),
        ("conv3x3.pointer", "w0 // 2, H // 2, W // 2,", "w0 // 2, H // 2, W // 2 - 1,"),
        ("epilogue", "return activate(acc,", "return activate(acc.to(tl.float16).to(tl.float32),"),
    ],
    gradients_tap_by_tap: [
        ("conv3x3.pointer", "8 - tap if FLIP else tap", "tap"),
        ("tiles", "tl.where(h0 < H, h0, 0)", "h0"),
    ],
    gradients_of_several_parts: [
        ("conv3x3.grad", "first + tiles_per_split,", "first + tiles_per_split - 1,"),
        ("tiles", "tl.where(w0 < W, h0, h0 + TILE_H)", "h0"),
        ("conv3x3.grad", "totals += g.to", "totals = g.to"),
        ("reduction", "tl.sum(sums, 0)", "tl.sum(tl.where(row > 0, sums, 0.0), 0)"),
    ],
    gradients_of_two_inputs_in_one_block: [
        ("tiles", "tl.where(n < N // 2, first_ptr, second_ptr)", "tl.where(n < N // 2, second_ptr, first_ptr)"),
        ("conv3x3.grad", "C = C1 + C2 if JOINED", "C = C1 if JOINED"),
        ("conv3x3.descriptor", "(pixels * (BLOCK_N", "(pixels // 2 * (BLOCK_N"),
    ],
    integers_are_exact: [],
    nan_and_infinity_as_in_torch: [("tiles", "tl.where(v <= 0.0, 0.0, v)", "tl.where(v > 0.0, v, 0.0)")],
    gradients_through_relu_and_pooling: [
        ("tiles", "tl.where(y <= 0.0, 0.0, g)", "tl.where(y < 0.0, 0.0, g)"),
        ("norm_grad", "tl.where(winner == 3, routed", "tl.where(winner == 2, routed"),
    ],
})  # fmt: skip
