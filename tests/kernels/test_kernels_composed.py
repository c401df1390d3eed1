"""An upsampling composed with the convolution after it, as a kernel: equal to the two steps in float64."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastunet.kernels.conv3x3 import config
from injected_faults import kernels_with
from kernel_device import DEVICE, INTERPRETED, MARK
from torch import Tensor

from fastunet.cpu.folding import compose_upsampling, upsampled_bias
from fastunet.testing import assert_within, composed_sums_expected, random_input, random_integers, stored

pytestmark = [MARK, pytest.mark.usefixtures("nan_in_fresh_memory")]
if not INTERPRETED and torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("tensor descriptors need sm_90", allow_module_level=True)

EPS = 1e-3
# Skip's height and width: one pixel of low, less than a tile, several tiles; and a row or a column more, by which a
# tile more begins.
SIZES = [(2, 2), (6, 10), (18, 22), (3, 3), (7, 10), (6, 11), (17, 33)]


def load(package: str = "fastunet.kernels") -> SimpleNamespace:
    """What the tests need of a kernels package."""
    names = ("conv_transpose2x2_concat_conv3x3", "epilogue", "tuning")
    kernels, epilogue, tuning = (importlib.import_module(f"{package}.{name}") for name in names)
    return SimpleNamespace(
        arranged=kernels.arranged,
        run=kernels.conv_transpose2x2_concat_conv3x3,
        Normalisation=epilogue.Normalisation,
        pinned=tuning.pinned,
    )


OPS = load()


def chosen(tile_h: int = 8, block_k: int = 16) -> config.ConvConfig:
    return config.ConvConfig(tile_h, 8, 64, block_k, 4, 2, config.DESCRIPTOR)


def tensors(size: tuple[int, int], *, c1: int = 16, c_low: int = 32, c_out: int = 64, make: Any = random_input) -> dict:
    """Tensors of a step up in float16; the convolution has as many channels of the upsampled image as of skip."""
    options = {"dtype": torch.float16, "device": DEVICE}
    scales = {"up_weight": c_low**-0.5, "weight": (18 * c1) ** -0.5} if make is random_input else {}
    shapes = {
        "skip": (2, c1, *size),
        "low": (2, c_low, size[0] // 2, size[1] // 2),
        "up_weight": (c_low, c1, 2, 2),
        "up_bias": (c1,),
        "weight": (c_out, 2 * c1, 3, 3),
    }
    return {
        name: make(shape, seed=i, **options, **({"scale": scales[name]} if name in scales else {}))
        for i, (name, shape) in enumerate(shapes.items())
    }


def run(
    ops: SimpleNamespace, t: dict, *arguments: Any, config: config.ConvConfig | None = None, **options: Any
) -> Tensor:
    split = t["skip"].shape[1]
    of_up, up_weight = t["weight"][:, split:].double(), t["up_weight"].double()
    border = None if t["up_bias"] is None else upsampled_bias(t["up_bias"].double(), of_up)
    weights = ops.arranged(t["weight"][:, :split], compose_upsampling(up_weight, of_up), border, torch.float16)
    with ops.pinned("conv_transpose2x2_concat_conv3x3", config or chosen()):
        return ops.run(t["skip"], t["low"], weights, *arguments, **options)


def check(ops: SimpleNamespace, t: dict, config: config.ConvConfig | None = None) -> None:
    value, error = composed_sums_expected(**t)
    assert_within(run(ops, t, config=config), value, stored(value, error, torch.float16))


def check_norm(ops: SimpleNamespace, t: dict) -> None:
    channels = t["weight"].shape[0]
    mean, variance, gamma, bias = (random_input((channels,), seed=i, device=DEVICE) for i in range(6, 10))
    variance = variance.abs() + 0.5
    y = run(ops, t, bias, norm=ops.Normalisation(mean, variance, gamma, EPS), negative_slope=0.1)
    mean, variance, gamma, bias = (p.double()[:, None, None] for p in (mean, variance, gamma, bias))
    value, error = composed_sums_expected(**t)
    scale = gamma / (variance + EPS).sqrt()
    # Eight roundings of float32: those of the norm and of its scale.
    error = error * scale.abs() + 2.0**-21 * ((value.abs() + mean.abs()) * scale.abs() + bias.abs())
    value = (value - mean) * scale + bias
    value = torch.where(value <= 0, 0.1 * value, value)
    assert_within(y, value, stored(value, error, torch.float16))


@pytest.mark.parametrize("size", SIZES)
def test_parity(size: tuple[int, int]) -> None:
    check(OPS, tensors(size))


@pytest.mark.parametrize("up_bias", [True, False])
def test_norm_and_activation(up_bias: bool) -> None:
    t = tensors((6, 11))
    check_norm(OPS, t if up_bias else {**t, "up_bias": None})


def test_several_blocks_of_channels_and_steps() -> None:
    check(OPS, tensors((19, 6), c1=32, c_low=48, c_out=128), chosen(16))


@pytest.mark.parametrize("channels", [40, 96])
def test_a_last_block_of_channels_that_is_not_whole(channels: int) -> None:
    """Its boxes of the weights go on into the next sub-pixel's."""
    check(OPS, tensors((7, 6), c_out=channels))


def test_integers_are_exact() -> None:
    t = tensors((9, 12), make=lambda *a, **k: random_integers(*a, largest=1, **k))
    up = F.conv_transpose2d(t["low"].double(), t["up_weight"].double(), t["up_bias"].double(), stride=2)
    expected = F.conv2d(torch.cat([t["skip"].double(), F.pad(up, [0, 0, 0, 1])], 1), t["weight"].double(), padding=1)
    assert expected.abs().max() < 2048  # Beyond, float16 has no longer every integer.
    assert torch.equal(run(OPS, t).double(), expected)


def test_an_image_alone_and_in_a_batch_has_the_same_bits() -> None:
    t = tensors((7, 10))
    assert torch.equal(run(OPS, t)[1:], run(OPS, {**t, "skip": t["skip"][1:], "low": t["low"][1:]}))


def test_a_lone_image_may_have_any_stride_to_the_next() -> None:
    t = {name: each[:1] if name in ("skip", "low") else each for name, each in tensors((7, 10)).items()}
    expected = run(OPS, t)
    for name in ("skip", "low"):
        each = t[name].contiguous(memory_format=torch.channels_last)
        t[name] = each.as_strided(each.shape, (1, *each.stride()[1:]))
    assert torch.equal(run(OPS, t), expected)


def test_an_empty_batch() -> None:
    t = tensors((6, 11))
    assert run(OPS, {**t, "skip": t["skip"][:0], "low": t["low"][:0]}).shape == (0, 64, 6, 11)


MODULE = "conv_transpose2x2_concat_conv3x3"
BUGS = [
    (MODULE, "row = tap // 3 + 1 + down", "row = tap // 3 + 1"),
    (MODULE, "if column % 2 == 1:", "if row % 2 == 1:"),
    (MODULE, "row // 2, w0 - 1", "(row + 1) // 2, w0 - 1"),
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


@pytest.mark.skipif(not INTERPRETED, reason="the copies of the kernels are for the interpreter")
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug[2])
def test_injected_faults_are_caught(bug: tuple[str, str, str], tmp_path: Path) -> None:
    with kernels_with(bug, tmp_path) as package:
        ops = load(package)
        with pytest.raises(AssertionError, match="outside the tolerance"):
            check(ops, tensors((17, 33), c_low=32))
