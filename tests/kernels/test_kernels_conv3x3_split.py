"""Sums split among programs: equal to float64 like unsplit ones, the same at every run and in every batch."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conv3x3_checks import Shape, assert_forward, make_inputs
from fastunet.kernels import gpu
from fastunet.kernels.conv3x3 import config, split_k
from fastunet.kernels.epilogue import Epilogue
from injected_faults import check_tests, load
from kernel_device import DEVICE, MARK
from torch import Tensor

from fastunet.testing import assert_within, conv3x3_expected, random_input, random_integers

pytestmark = [MARK, pytest.mark.usefixtures("nan_in_fresh_memory")]
KERNELS = load()
HOPPER = gpu.known_target(90)


def split(variant: str = config.POINTER, splits: int = 2, block_n: int = 32) -> config.ConvConfig:
    return config.ConvConfig(8, 8, block_n, 16, 4, 2, variant, splits=splits)


def conv3x3(chosen: config.ConvConfig, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    with KERNELS.autotune.overriding("conv3x3", chosen):
        return KERNELS.conv3x3.pointer.conv3x3(x, weight, bias)[0]


def check(kernels: ModuleType, chosen: config.ConvConfig, shape: Shape) -> None:
    with kernels.autotune.overriding("conv3x3", chosen):
        assert_forward(kernels, *make_inputs(shape, torch.float16), negative_slope=0.0)


@pytest.mark.parametrize("variant", [config.POINTER, config.DESCRIPTOR])
def test_parity(variant: str) -> None:
    check(KERNELS, split(variant, 4), (2, 64, 0, 40, 9, 11))
    check(KERNELS, split(variant, 2), (1, 32, 64, 40, 9, 11))


def test_integers_are_exact_and_equal_to_unsplit_sums() -> None:
    options = {"dtype": torch.float32, "device": DEVICE}
    x, weight = random_integers((1, 64, 9, 11), seed=1, **options), random_integers((40, 64, 3, 3), seed=2, **options)
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    for splits in (1, 2, 4):
        assert torch.equal(conv3x3(split(splits=splits), x, weight).double(), expected)


def test_the_bits_depend_neither_on_the_run_nor_on_the_batch() -> None:
    x, _, weight, bias = make_inputs((2, 64, 0, 40, 9, 11), torch.float16)
    y = conv3x3(split(splits=4), x, weight, bias)
    for images in (slice(None), slice(1, 2), [1, 0]):
        assert torch.equal(conv3x3(split(splits=4), x[images], weight, bias), y[images])


def test_norm_head_and_statistics_follow_the_added_sums() -> None:
    x, _, weight, bias = make_inputs((2, 32, 0, 40, 9, 11), torch.float16)
    weight /= (9 * 32) ** 0.5
    mean, variance = (random_input((40,), seed=i, device=DEVICE) for i in (5, 6))
    norm = KERNELS.epilogue.Normalisation(mean, variance.abs() + 0.5, None, 1e-3)
    head_weight = random_input((2, 40, 1, 1), scale=40**-0.5, seed=7, device=DEVICE, dtype=x.dtype)
    head = KERNELS.epilogue.Head(head_weight, None, True)
    results = []
    for splits in (1, 2):
        # A block for all channels, as a fused head needs it.
        with KERNELS.autotune.overriding("conv3x3", split(splits=splits, block_n=64)):
            pointer = KERNELS.conv3x3.pointer
            probabilities = pointer.conv3x3_head(x, weight, bias, head, norm=norm, negative_slope=0.0)
            results.append((*pointer.conv3x3_with_statistics(x, weight), probabilities))
    (_, unsplit, expected), (y, statistics, probabilities) = results
    assert_within(y, *conv3x3_expected(x, weight))
    # What is added in another order differs by the roundings of float32, which the head's halves hardly show.
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=2**-10)
    assert torch.equal(statistics.count, unsplit.count)
    # Of values that differ by one of half's roundings at most, whose mean and M2 move by no more than two.
    torch.testing.assert_close(statistics.partial, unsplit.partial, rtol=2**-9, atol=2**-9)


def test_a_split_of_part_of_a_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected multiples of 32"):
        check(KERNELS, split(), (2, 32, 16, 40, 9, 11))


def test_offsets_beyond_32_bits() -> None:
    """From split to split the sums of a large batch are more than 2^31 values apart: no product of the kernel's."""
    x = torch.empty((1100, 64, 64, 512), dtype=torch.float16, device="meta").permute(0, 3, 1, 2)
    weight = torch.empty((512, 512, 3, 3), dtype=torch.float16, device="meta")
    first, last = split_k.launches(x, None, weight, split(), Epilogue(x), allow_tf32=False)
    assert last.arguments["stride"] == 1100 * 64 * 64 * 512 > 2**31
    assert first.arguments["sums_ptr"].shape == (2, 1100 * 64 * 64, 512)


def test_where_sums_may_be_split() -> None:
    deep = config.ConvShape(1024, 0, 1024, 32, 32)
    heuristic = config.heuristic_conv_config(deep, torch.bfloat16, HOPPER, False)
    assert heuristic.splits == 1, "which helps a batch of one image only, and is unmeasured"
    found = config.splittings(heuristic, deep, HOPPER)
    assert found
    programs = config.tiles_per_image(heuristic, 32, 32) * gpu.cdiv(1024, heuristic.block_n)
    assert all(programs * splits <= 2 * HOPPER.multiprocessors for splits in found)
    large = dataclasses.replace(deep, height=512, width=512)
    assert config.splittings(heuristic, large, HOPPER) == []
    assert config.splittings(heuristic, dataclasses.replace(deep, c1=heuristic.block_k * 3), HOPPER) == []
    assert config.splittings(heuristic, dataclasses.replace(deep, c_out2=64), HOPPER) == []


def two_splits_of_two_inputs(kernels: ModuleType) -> None:
    check(kernels, split(), (1, 32, 64, 40, 9, 11))


test_check, test_injected_fault_is_caught = check_tests({
    two_splits_of_two_inputs: [
        ("conv3x3.split_k", "tl.static_range(SPLITS)", "tl.static_range(1)"),
        ("conv3x3.pointer", "x_ptr + first1,", "x_ptr,"),
        ("conv3x3.pointer", "weight_ptr, first1, steps1", "weight_ptr, 0, steps1"),
        ("conv3x3.pointer", "up_ptr + first2,", "up_ptr,"),
        ("conv3x3.pointer", "split.to(tl.int64) * pixels + origin", "0 * pixels + origin"),
    ]
})  # fmt: skip
