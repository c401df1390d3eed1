"""An upsampling composed with the convolution after it, as a kernel: equal to the two steps in float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv3x3_checks import upsampling_inputs
from fastunet.kernels.conv3x3 import config
from injected_faults import check_tests, load
from kernel_device import DEVICE, INTERPRETED, MARK
from torch import Tensor

from fastunet.cpu.folding import compose_upsampling, upsampled_bias
from fastunet.testing import assert_within, composed_sums_expected, random_input, random_integers
from fastunet.testing.bounds import Expected

pytestmark = [MARK, pytest.mark.usefixtures("nan_in_fresh_memory")]
if not INTERPRETED and torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("tensor descriptors need sm_90", allow_module_level=True)

KERNELS = load()
EPS = 1e-3


def chosen(tile_h: int = 8, block_k: int = 16) -> config.ConvConfig:
    return config.ConvConfig(tile_h, 8, 64, block_k, 4, 2, config.DESCRIPTOR)


def run(
    t: dict, *arguments: Any, kernels: ModuleType = KERNELS, config: config.ConvConfig | None = None, **options: Any
) -> Tensor:
    split = t["skip"].shape[1]
    of_up, up_weight = t["weight"][:, split:].double(), t["up_weight"].double()
    border = None if t["up_bias"] is None else upsampled_bias(t["up_bias"].double(), of_up)
    op = kernels.conv_transpose2x2_concat_conv3x3
    weights = op.arranged(t["weight"][:, :split], compose_upsampling(up_weight, of_up), border, torch.float16)
    with kernels.autotune.overriding("conv_transpose2x2_concat_conv3x3", config or chosen()):
        return op.conv_transpose2x2_concat_conv3x3(t["skip"], t["low"], weights, *arguments, **options)


# One pixel of low, less than a tile; a row or a column more, by which a tile more begins; several blocks of channels
# and steps; a last block that is not whole, whose boxes of the weights go on into the next sub-pixel's.
CASES = [
    (upsampling_inputs((2, 2), n=2), None),
    (upsampling_inputs((3, 3)), None),
    (upsampling_inputs((7, 18), n=2), None),
    (upsampling_inputs((17, 10)), None),
    (upsampling_inputs((19, 6), c1=32, c_low=48, c_out=128), chosen(16)),
    (upsampling_inputs((7, 6), c_out=40), None),
    (upsampling_inputs((7, 6), c_out=96), None),
]


@pytest.mark.parametrize(("t", "config"), CASES, ids=[str(tuple(t["skip"].shape)) for t, _ in CASES])
def test_parity(t: dict, config: config.ConvConfig | None) -> None:
    assert_within(run(t, config=config), *composed_sums_expected(**t).stored(torch.float16))


@pytest.mark.parametrize("up_bias", [True, False])
def test_norm_and_activation(up_bias: bool) -> None:
    t = upsampling_inputs((6, 11))
    t = t if up_bias else {**t, "up_bias": None}
    mean, variance, gamma, bias = (random_input((64,), seed=i, device=DEVICE) for i in range(6, 10))
    variance = variance.abs() + 0.5
    norm = KERNELS.epilogue.Normalisation(mean, variance, gamma, EPS)
    y = run(t, bias, norm=norm, negative_slope=0.1)
    mean, variance, gamma, bias = (Expected.exact(p[:, None, None]) for p in (mean, variance, gamma, bias))
    value = (composed_sums_expected(**t) - mean) * (variance.inverse_root(EPS) * gamma) + bias
    assert_within(y, *value.activate(0.1).stored(torch.float16))


def test_integers_are_exact() -> None:
    t = upsampling_inputs((9, 12), make=lambda *a, **k: random_integers(*a, largest=1, **k))
    up = F.conv_transpose2d(t["low"].double(), t["up_weight"].double(), t["up_bias"].double(), stride=2)
    expected = F.conv2d(torch.cat([t["skip"].double(), F.pad(up, [0, 0, 0, 1])], 1), t["weight"].double(), padding=1)
    assert expected.abs().max() < 2048  # Beyond, float16 has no longer every integer.
    assert torch.equal(run(t).double(), expected)


def test_an_image_alone_and_in_a_batch_has_the_same_bits() -> None:
    t = upsampling_inputs((7, 10), n=2)
    alone = {**t, "skip": t["skip"][1:], "low": t["low"][1:]}
    expected = run(t)[1:]
    assert torch.equal(run(alone), expected)
    for name in ("skip", "low"):  # Batch size 1 may have any stride to the next.
        each = alone[name].contiguous(memory_format=torch.channels_last)
        alone[name] = each.as_strided(each.shape, (1, *each.stride()[1:]))
    assert torch.equal(run(alone), expected)
    assert run({**t, "skip": t["skip"][:0], "low": t["low"][:0]}).shape == (0, 64, 7, 10)


def several_tiles_of_an_odd_image(kernels: ModuleType) -> None:
    t = upsampling_inputs((17, 19))
    assert_within(run(t, kernels=kernels), *composed_sums_expected(**t).stored(torch.float16))


MODULE, BOXES = "conv_transpose2x2_concat_conv3x3", "conv3x3.descriptor"
test_check, test_injected_fault_is_caught = check_tests({
    several_tiles_of_an_odd_image: [
        (BOXES, "row = tap // 3 + 1 + down", "row = tap // 3 + 1"),
        (BOXES, "if column % 2 == 1:", "if row % 2 == 1:"),
        (BOXES, "row // 2, w0 - 1", "(row + 1) // 2, w0 - 1"),
        (MODULE, "w0 - 1 + tap % 2 + right, k0", "w0 - 1 + tap % 2, k0"),
        (MODULE, "sub * COUT + n0, image", "n0, image"),
        (MODULE, "k0 = step // 4 * BLOCK_K", "k0 = 0"),
        (MODULE, "h = (h0 + tl", "h = (tl"),
        (MODULE, "== right * (W - 1)", "== right * W"),
        (MODULE, "near_row = _of_row(ptr + 3 * COUT", "near_row = _of_row(ptr"),
        (MODULE, "last_row * (h == H)", "last_row * (h == H - 1)"),
        (MODULE, "at_last = (w == W)", "at_last = (w == W - 1)"),
        (MODULE, "H + ODD_H, W + ODD_W, TILE_H", "H, W, TILE_H"),
        (MODULE, "y10_desc, y11_desc, down, right)", "y10_desc, y11_desc, right, down)"),
        (MODULE, "composed.flip(2, 3)", "composed"),
        (MODULE, "(t[0], t[4])", "(t[0], t[1])"),
        (MODULE, "(t[3], t[1])", "(t[4], t[1])"),
    ]
})  # fmt: skip
