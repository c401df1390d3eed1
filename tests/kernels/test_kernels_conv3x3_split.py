"""Sums split among programs: equal to float64 like unsplit ones, the same at every run and in every batch."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fastunet.kernels import gpu, tuning
from fastunet.kernels.conv3x3 import config, split_k
from fastunet.kernels.epilogue import Epilogue
from injected_faults import kernels_with
from kernel_device import DEVICE, MARK
from torch import Tensor

from fastunet.testing import assert_within, conv3x3_expected, pooled_expected, random_input, random_integers

pytestmark = [MARK, pytest.mark.usefixtures("nan_in_fresh_memory")]

HOPPER = gpu.known_target(90)


def load(package: str = "fastunet.kernels") -> SimpleNamespace:
    """The launchers of a kernels package, and the place of its pins."""
    conv3x3, epilogue, pins = (
        importlib.import_module(f"{package}.{name}") for name in ("conv3x3.pointer", "epilogue", "tuning")
    )
    return SimpleNamespace(
        conv3x3=conv3x3.conv3x3,
        with_head=conv3x3.conv3x3_head,
        with_statistics=conv3x3.conv3x3_with_statistics,
        Head=epilogue.Head,
        Normalisation=epilogue.Normalisation,
        pinned=pins.pinned,
    )


OPS = load()


def split(form: str = config.POINTER, splits: int = 2, block_n: int = 32) -> config.ConvConfig:
    return config.ConvConfig(8, 8, block_n, 16, 4, 2, form, splits=splits)


def tensors(c1: int, c2: int, c_out: int, *, n: int = 2, dtype: torch.dtype = torch.float16) -> tuple:
    """x, up (None where c2 is 0), weight, bias."""
    options = {"dtype": dtype, "device": DEVICE}
    x = random_input((n, c1, 9, 11), seed=1, **options)
    up = random_input((n, c2, 9, 11), seed=2, **options) if c2 else None
    weight = random_input((c_out, c1 + c2, 3, 3), scale=(9 * (c1 + c2)) ** -0.5, seed=3, **options)
    return x, up, weight, random_input((c_out,), seed=4, **options)


def check(
    ops: SimpleNamespace, chosen: config.ConvConfig, x: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor
) -> None:
    options = {"up": up, "negative_slope": 0.0}
    with ops.pinned("conv3x3", chosen):
        y, pooled = ops.conv3x3(x, weight, bias, pool=True, **options)
    expected = conv3x3_expected(x, weight, bias, **options)
    assert_within(y, *expected)
    assert_within(pooled, *pooled_expected(expected))
    assert torch.equal(pooled, F.max_pool2d(y, 2))


@pytest.mark.parametrize("form", [config.POINTER, config.DESCRIPTOR])
@pytest.mark.parametrize(("c1", "c2", "splits"), [(64, 0, 4), (32, 64, 2)])
def test_parity(form: str, c1: int, c2: int, splits: int) -> None:
    check(OPS, split(form, splits), *tensors(c1, c2, 40))


def test_integers_are_exact_and_equal_to_unsplit_sums() -> None:
    options = {"dtype": torch.float32, "device": DEVICE}
    x, weight = random_integers((2, 64, 9, 11), seed=1, **options), random_integers((40, 64, 3, 3), seed=2, **options)
    results = []
    for splits in (1, 2, 4):
        with tuning.pinned("conv3x3", split(splits=splits)):
            results.append(OPS.conv3x3(x, weight)[0])
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    for y in results:
        assert torch.equal(y.double(), expected)


def test_the_bits_depend_neither_on_the_run_nor_on_the_batch() -> None:
    x, _, weight, bias = tensors(64, 0, 40, n=3)
    with tuning.pinned("conv3x3", split(splits=4)):
        first, again = (OPS.conv3x3(x, weight, bias)[0] for _ in range(2))
        alone = OPS.conv3x3(x[1:2], weight, bias)[0]
        permuted = OPS.conv3x3(x[[2, 0, 1]], weight, bias)[0]
    assert torch.equal(first, again)
    assert torch.equal(first[1:2], alone)
    assert torch.equal(first[[2, 0, 1]], permuted)


def test_norm_head_and_statistics_follow_the_added_sums() -> None:
    x, _, weight, bias = tensors(32, 0, 40)
    mean, variance = (random_input((40,), seed=i, device=DEVICE) for i in (5, 6))
    norm = OPS.Normalisation(mean, variance.abs() + 0.5, None, 1e-3)
    head = OPS.Head(random_input((2, 40, 1, 1), scale=40**-0.5, seed=7, device=DEVICE, dtype=x.dtype), None, True)
    results = []
    for splits in (1, 2):
        # A block for all channels, as a joined head needs it.
        with tuning.pinned("conv3x3", split(splits=splits, block_n=64)):
            y, statistics = OPS.with_statistics(x, weight)
            results.append((OPS.with_head(x, weight, bias, head, norm=norm, negative_slope=0.0), statistics, y))
    (plain, counted, _), (added, also_counted, y) = results
    assert_within(y, *conv3x3_expected(x, weight))
    # What is added in another order differs by the roundings of float32, which the head's halves hardly show.
    torch.testing.assert_close(added, plain, rtol=0, atol=2**-10)
    assert torch.equal(counted.count, also_counted.count)
    # Of values that differ by one of half's roundings at most, whose mean and M2 move by no more than two.
    torch.testing.assert_close(also_counted.partial, counted.partial, rtol=2**-9, atol=2**-9)


def test_a_split_of_part_of_a_block_is_an_error() -> None:
    x, up, weight, bias = tensors(32, 16, 40)
    with tuning.pinned("conv3x3", split()), pytest.raises(ValueError, match="expected multiples of 32"):
        OPS.conv3x3(x, weight, bias, up=up)


def test_offsets_beyond_32_bits() -> None:
    """From split to split the sums of a large batch are more than 2^31 values apart: no product of the kernel's."""
    x = torch.empty((1100, 64, 64, 512), dtype=torch.float16, device="meta").permute(0, 3, 1, 2)
    weight = torch.empty((512, 512, 3, 3), dtype=torch.float16, device="meta")
    first, last = split_k.launches(x, None, weight, split(), Epilogue(x), allow_tf32=False)
    assert last.arguments["stride"] == 1100 * 64 * 64 * 512 > 2**31
    assert first.arguments["sums_ptr"].shape == (2, 1100 * 64 * 64, 512)


BUGS = {
    "first_split_only": ("conv3x3.split_k", "tl.static_range(SPLITS)", "tl.static_range(1)"),
    "every_split_the_first_channels": ("conv3x3.split_k", "x_ptr + first,", "x_ptr,"),
    "every_split_the_first_weights": ("conv3x3.split_k", "weight_ptr, first, steps1", "weight_ptr, 0, steps1"),
    "second_input_from_its_start": ("conv3x3.split_k", "up_ptr + first,", "up_ptr,"),
    "sums_over_each_other": ("conv3x3.split_k", "split.to(tl.int64) * pixels + origin", "0 * pixels + origin"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_injected_fault_is_caught(bug: str, tmp_path: Path) -> None:
    with kernels_with(BUGS[bug], tmp_path) as package, pytest.raises(AssertionError):
        check(load(package), split(), *tensors(32, 64, 40))


def test_where_sums_may_be_split() -> None:
    deep = config.ConvShape(1024, 0, 1024, 32, 32)
    derived = config.derived_conv_config(deep, torch.bfloat16, HOPPER, False)
    assert derived.splits == 1, "which helps a batch of one image only, and is unmeasured"
    found = config.splittings(derived, deep, HOPPER)
    assert found
    programs = config.tiles_per_image(derived, 32, 32) * gpu.cdiv(1024, derived.block_n)
    assert all(programs * splits <= 2 * HOPPER.multiprocessors for splits in found)
    large = dataclasses.replace(deep, height=512, width=512)
    assert config.splittings(derived, large, HOPPER) == []
    assert config.splittings(derived, dataclasses.replace(deep, c1=derived.block_k * 3), HOPPER) == []
    assert config.splittings(derived, dataclasses.replace(deep, c_out2=64), HOPPER) == []
