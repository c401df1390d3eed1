"""The conv3x3 kernels by stride 2, run by Triton's interpreter, against float64 under the derived tolerance."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conv3x3_checks import BFLOAT, HALF, Shape, assert_forward, assert_gradients, make_inputs
from fastunet.kernels import autotune, gpu
from fastunet.kernels.conv3x3 import config, config_grad, config_search
from fastunet.kernels.epilogue import Normalisation
from injected_faults import check_tests, load
from kernel_device import DEVICE, DTYPES, HOPPER, MANY_SPLITS, MARK, on

from fastunet.testing import assert_within, random_integers

pytestmark = [MARK, pytest.mark.usefixtures("nan_in_fresh_memory")]
KERNELS = load()


def assert_right(shape: Shape, dtype: torch.dtype, kernels: ModuleType = KERNELS, **options: bool) -> None:
    x, up, weight, bias = make_inputs(shape, dtype)
    assert_forward(kernels, x, up, weight, bias, stride=2, negative_slope=0.0, **options)
    assert_gradients(kernels, x, up, weight, stride=2, **options)


# n, c1, c2, c_out, h, w: folded taps, rows that no vector load fits, whole vectors; inner tiles, and cut by every edge;
# every parity of the sides, sides of one pixel and of two.
FOLDED, UNALIGNED, ALIGNED = (1, 3, 0, 5, 35, 18), (2, 5, 3, 17, 6, 13), (1, 32, 16, 48, 19, 34)
CASES = [
    *((FOLDED, dtype, None) for dtype in DTYPES),
    (UNALIGNED, torch.float32, None),
    (UNALIGNED, HALF, None),
    (ALIGNED, BFLOAT, None),
    ((1, 16, 16, 16, 18, 17), torch.float32, None),
    ((1, 1, 0, 1, 2, 33), BFLOAT, None),
    ((2, 33, 0, 5, 1, 1), torch.float32, None),
    ((1, 8, 0, 8, 2, 2), HALF, None),
    ((0, 3, 0, 4, 4, 4), torch.float32, None),
    ((2, 16, 0, 16, 32, 33), BFLOAT, MANY_SPLITS),
    # Through descriptors; sides of one pixel have no odd one.
    ((1, 64, 16, 64, 17, 34), BFLOAT, HOPPER),
    ((2, 16, 48, 40, 16, 32), HALF, HOPPER),
    ((2, 64, 0, 64, 1, 32), HALF, HOPPER),
    ((1, 48, 0, 48, 15, 1), BFLOAT, HOPPER),
]


@pytest.mark.parametrize(("shape", "dtype", "target"), CASES, ids=str)
def test_parity(shape: Shape, dtype: torch.dtype, target: gpu.Target | None) -> None:
    with on(target, KERNELS):
        assert_right(shape, dtype)


def test_tf32() -> None:
    assert_right((1, 32, 16, 64, 9, 18), torch.float32, allow_tf32=True)


def exact_on_integers(
    kernels: ModuleType, h: int, w: int, channels: tuple[int, int, int] = (4, 3, 6), dtype: torch.dtype = torch.float32
) -> None:
    """By norm, too, of statistics that change nothing, and as raw sums with statistics of their own."""
    c1, c2, c_out = channels
    options = {"device": DEVICE, "dtype": dtype, **({"largest": 1} if dtype == HALF else {})}
    x, up = (random_integers((2, c, h, w), seed=c, **options) for c in (c1, c2))
    weight, bias = (random_integers(of, seed=len(of), **options) for of in ((c_out, c1 + c2, 3, 3), (c_out,)))
    leaves = [t.double().requires_grad_() for t in (x, up, weight)]
    exact = F.conv2d(torch.cat(leaves[:2], 1), leaves[2], stride=2, padding=1)
    one = torch.ones(c_out, device=DEVICE)
    norm = Normalisation(0 * one, one, None, 0.0)
    y, pooled = kernels.conv3x3.pointer.conv3x3(x, weight, bias, up=up, norm=norm, pool=True, stride=2)
    assert_within(y, (exact + bias.double()[:, None, None]).detach(), 0.0)
    assert torch.equal(pooled, F.max_pool2d(y, 2))
    raw, statistics = kernels.conv3x3.pointer.conv3x3_with_statistics(x, weight, up=up, stride=2)
    assert_within(raw, exact.detach(), 0.0)
    assert float(statistics.count.sum()) == exact[:, 0].numel()
    sums = (statistics.partial[0] * statistics.count[:, None]).sum(0) / statistics.count.sum()
    torch.testing.assert_close(sums.double(), exact.detach().mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    grad = random_integers(tuple(exact.shape), seed=3, **options)
    expected = torch.autograd.grad(exact, leaves, grad.double())
    actual = kernels.conv3x3.grad.conv3x3_input_grads(grad, weight, [c1, c2], stride=2, size=(h, w))
    weights = [kernels.conv3x3.grad.conv3x3_weight_grad(grad, t, stride=2)[0] for t in (x, up)]
    for a, b in zip([*actual, torch.cat(weights, 1)], expected, strict=True):
        assert dtype != HALF or b.abs().max() <= 2048  # Beyond, float16 has no longer every integer.
        assert_within(a, b, 0.0)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_configurations_come_from_the_table(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No halos or split sums, whatever stride 1 has; a measured one stands in the heuristic's place."""
    target, shape = gpu.known_target(capability), config.ConvShape(64, 0, 64, 64, 64)
    choose = {
        config.CONV3X3: config.conv_config,
        config.INPUT_GRAD: config.conv_config,
        config.WEIGHT_GRAD: config_grad.weight_grad_config,
    }
    for base, chosen_by in choose.items():
        op, options = base + autotune.STRIDE2, {"allow_tf32": False}
        heuristic = chosen_by(shape, BFLOAT, target, **options, op=op)
        found = config_search.feasible_configs(op, shape, BFLOAT, target, **options)
        assert found[0] == heuristic
        assert len(found) > 1
        both = {config.POINTER, config.DESCRIPTOR} if base != config.WEIGHT_GRAD else {config.DESCRIPTOR}
        assert {each.variant for each in found} == (both if capability >= 90 else {config.POINTER})
        assert {getattr(each, "splits", 1) for each in found} == {1}
        row = autotune.config_row(op, shape, BFLOAT, False, found[-1])
        monkeypatch.setattr(autotune, "_tables", {target.name: autotune.by_key([row])})
        autotune._config.cache_clear()
        assert chosen_by(shape, BFLOAT, target, **options, op=op) == found[-1]
        assert chosen_by(shape, BFLOAT, target, **options, op=base) != found[-1]
        autotune._config.cache_clear()


def gathers(kernels: ModuleType) -> None:
    for h, w in ((7, 10), (18, 35), (7, 9), (8, 10)):
        exact_on_integers(kernels, h, w)


def reads_boxes(kernels: ModuleType) -> None:
    """Several tiles, blocks and steps, in images of which the odd rows or columns are as many as the even, or one less;
    of the first, whole runs of pixels for the weight gradient.
    """
    with on(HOPPER, kernels):
        for h, w in ((32, 32), (19, 18), (18, 19)):
            exact_on_integers(kernels, h, w, (32, 48, 80), HALF)


def folds(kernels: ModuleType) -> None:
    assert_right((1, 3, 0, 5, 19, 18), torch.float32, kernels)


TILES, POINTERS, GRAD, PHASES = "tiles", "conv3x3.pointer", "conv3x3.grad", "conv3x3.strided"
BOXES = "conv3x3.descriptor"
test_check, test_injected_fault_is_caught = check_tests(
    {
        gathers: [
            (TILES, "else (H + 1) // 2", "else H // 2"),
            (TILES, "else (W + 1) // 2", "else W // 2"),
            (TILES, "(image * H + h0 * STRIDE) * W", "(image * H + h0) * W"),
            (TILES, "* W + w0 * STRIDE", "* W + w0"),
            (TILES, "return rows * STRIDE, columns * STRIDE", "return rows, columns * STRIDE"),
            (TILES, "return rows * STRIDE, columns * STRIDE", "return rows * STRIDE, columns"),
            (TILES, "TILE_W) * STRIDE", "TILE_W)"),
            (GRAD, "next_tile(image, h0, w0, HO, WO", "next_tile(image, h0, w0, H, W"),
            (GRAD, "origin = (image * HO + h0) * WO + w0\n        g", "origin = (image * H + h0) * W + w0\n        g"),
            (PHASES, "odd_h * (1 - i)", "odd_h * i"),
            (PHASES, "odd_w * (1 - j)", "odd_w * j"),
            (PHASES, "(1 + down) * 3 + 1 + right", "(1 + right) * 3 + 1 + down"),
            (PHASES, "(1 - odd_h + 2 * i)", "(1 + odd_h - 2 * i)"),
            (PHASES, "1 - odd_w + 2 * j", "1 + odd_w - 2 * j"),
            (PHASES, "taps = (1 + odd_h) * (1 + odd_w)", "taps = 1 + odd_h + odd_w"),
            (PHASES, "(H + 1 - odd_h) // 2", "(H - odd_h) // 2"),
            (PHASES, "(W + 1 - odd_w) // 2", "(W - odd_w) // 2"),
            (PHASES, "2 * h0 + odd_h", "2 * h0"),
            (PHASES, "2 * w0 + odd_w", "2 * w0"),
            (PHASES, "weight_ptr += tl.cast(C1, tl.int64) * stride_in", "weight_ptr += 0"),
            (PHASES, "(k0 + k < COUT)[:, None]", "(k0 + k < COUT - 1)[:, None]"),
        ],
        reads_boxes: [
            (BOXES, "W = strided_size(H, W, STRIDE)  #", "W = strided_size(H, W, 1)  #"),
            (BOXES, "if column % 2 == 1:", "if row % 2 == 1:"),
            (BOXES, "[:, row::2, column::2]", "[:, column::2, row::2]"),
            (BOXES, "row // 2, w0 - 1", "(row + 1) // 2, w0 - 1"),
            (BOXES, "column // 2, k0, TILE", "(column + 1) // 2, k0, TILE"),
            (BOXES, "tap * C + first + k0", "tap * C + k0"),
            (BOXES, "up11_desc, weight_desc, begin2, C1,", "up11_desc, weight_desc, begin2, 0,"),
            (BOXES, "row + 2, column + 2)", "row, column + 1)"),
            (BOXES, "row = (row + 2) // 2 - 1", "row = (row + 2) // 2"),
            (BOXES, "column = (column + 2) // 2 - 1", "column = (column + 1) // 2 - 1"),
            (BOXES, "next_tile(image, h0, w0, HO, WO", "next_tile(image, h0, w0, HO, 2 * WO"),
            (PHASES, "h0 + down, w0 + right", "h0 + right, w0 + down"),
            (PHASES, "weight_tap * COUT + k0", "weight_tap * COUT"),
            (PHASES, "weight_row = tl.where(is_first, 0, C1)", "weight_row = tl.where(is_first, 0, 0)"),
            (PHASES, "block - blocks1) * BLOCK_N", "block) * BLOCK_N"),
            (PHASES, "out_up10_desc, out_up11_desc, odd_h, odd_w", "out_up10_desc, out_up11_desc, odd_w, odd_h"),
        ],
        folds: [
            (POINTERS, "steps1, n, rows_in, columns_in, origin_in", "steps1, n, rows, columns_in, origin_in"),
            (
                GRAD,
                "load_folded_taps(x_ptr, i, rows, columns, origin, offsets_in",
                "load_folded_taps(x_ptr, i, rows, columns, origin, offsets",
            ),
        ],
    }
)
