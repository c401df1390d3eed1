"""The choice of launch configurations: pure functions, so everything here runs without a GPU."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from fastunet.benchmarks import reachable
from fastunet.kernels import config_passes, config_pixels, gpu
from fastunet.kernels.conv3x3 import config, config_grad
from fastunet.kernels.conv3x3.config import ConvShape
from hypothesis import given, settings
from hypothesis import strategies as st

TARGETS = [*map(gpu.known_target, gpu.SHARED_MEMORY_LIMITS), gpu.INTERPRETER]
FORMATS = [(torch.bfloat16, False), (torch.float16, False), (torch.float32, False), (torch.float32, True)]

targets = st.sampled_from(TARGETS)
formats = st.sampled_from(FORMATS)
channel_counts = st.one_of(st.integers(1, 70), st.sampled_from([64, 96, 128, 160, 256, 512, 1000, 1024]))
sides = st.one_of(st.integers(1, 70), st.sampled_from([128, 512, 4096]))


def test_stages_follow_from_the_shared_memory() -> None:
    hopper, ada = gpu.known_target(90), gpu.known_target(89)
    # Two programs share 232448 bytes: three stages of 32 KiB each fit, a fourth does not.
    assert config.stages(32768, hopper) == 3
    assert config.stages(32768, hopper, programs=1) == 4
    assert config.stages(32768, ada, programs=1) == 3
    # Never fewer than two, or nothing would overlap, and never more than four.
    assert config.stages(10**6, hopper) == 2
    assert config.stages(1, hopper) == 4


def test_cover() -> None:
    assert [config.cover(n, 16, 64) for n in (1, 16, 17, 64, 65, 1000)] == [16, 16, 32, 64, 64, 64]


def assert_fits(chosen: Any, first: int, second: int, depth: int, dtype: torch.dtype, target: gpu.Target) -> None:
    """A step multiplies [first, depth] by [depth, second], of at least 16 each, whose stages shared memory holds."""
    assert min(first, second, depth) >= 16
    assert chosen.num_stages * (first + second) * depth * dtype.itemsize <= target.shared_memory


@settings(max_examples=300, derandomize=True, deadline=None)
@given(c1=channel_counts, c2=st.one_of(st.just(0), channel_counts), c_out=channel_counts, h=sides, w=sides,
       aligned=st.booleans(), format=formats, target=targets)  # fmt: skip
def test_conv_config(
    c1: int, c2: int, c_out: int, h: int, w: int, aligned: bool, format: tuple[torch.dtype, bool], target: gpu.Target
) -> None:
    dtype, allow_tf32 = format
    shape = ConvShape(c1, c2, c_out, h, w, aligned and gpu.row_unit(c1, c2, c_out) == 8)
    chosen = config.conv_config(shape, dtype, target, allow_tf32=allow_tf32)

    pixels = chosen.tile_h * chosen.tile_w
    assert all(block & (block - 1) == 0 for block in (pixels, chosen.block_n, chosen.block_k))
    # Pooling windows lie within a tile, from 2x2 on.
    assert chosen.tile_h % 2 == chosen.tile_w % 2 == 0
    assert_fits(chosen, pixels, chosen.block_n, chosen.block_k, dtype, target)
    # Every value of K is reached, and no step is without one.
    covered = config.conv_steps(chosen, c1) * chosen.block_k
    values = 9 * c1 if chosen.variant == config.FOLDED else 9 * -(-c1 // chosen.block_k) * chosen.block_k
    assert values <= covered < values + chosen.block_k
    # What runs is among what is compiled ahead of time.
    found = reachable.convolutions(dtype, target, allow_tf32=allow_tf32)
    assert (chosen, shape.aligned or chosen.variant == config.DESCRIPTOR) in found


@settings(max_examples=200, derandomize=True, deadline=None)
@given(c_in=channel_counts, c_out=channel_counts, h=sides, w=sides, format=formats, target=targets,
       tiles=st.integers(1, 10**6))  # fmt: skip
def test_weight_grad_config(
    c_in: int, c_out: int, h: int, w: int, format: tuple[torch.dtype, bool], target: gpu.Target, tiles: int
) -> None:
    dtype, allow_tf32 = format
    shape = ConvShape(c_in, 0, c_out, h, w, gpu.row_unit(c_in, c_out) == 8)
    chosen = config_grad.weight_grad_config(shape, dtype, target, allow_tf32=allow_tf32)
    assert_fits(chosen, chosen.block_out, chosen.block_in, chosen.tile_h * chosen.tile_w, dtype, target)
    if chosen.variant == config.FOLDED:
        assert chosen.block_in >= 9 * c_in
    splits = config_grad.weight_grad_splits(config_grad.weight_grad_programs(chosen, c_in, c_out), tiles, target)
    assert 1 <= splits <= max(1, tiles // 8)
    found = reachable.weight_grads(dtype, target, allow_tf32=allow_tf32)
    assert (chosen, shape.aligned or chosen.variant == config.DESCRIPTOR) in found


def test_programs_of_a_weight_gradient_fill_their_waves() -> None:
    """The last wave ends at most a tenth later than if the work could be divided at will."""
    for multiprocessors, programs, tiles in itertools.product(
        (108, 132, 148), (1, 9, 18, 36, 72, 144), (1024, 4096, 65536)
    ):
        target = dataclasses.replace(gpu.known_target(90), multiprocessors=multiprocessors)
        splits, slots = config_grad.weight_grad_splits(programs, tiles, target), 2 * multiprocessors
        steps = math.ceil(programs * splits / slots) * math.ceil(tiles / splits)
        assert steps <= 1.1 * max(programs * tiles / slots, 8 + 1)


@given(channels=st.integers(1, config_passes.MOST_CHANNELS))
def test_pass_configs_hold_as_many_elements(channels: int) -> None:
    windows, pixels, norm = (
        choose(channels)
        for choose in (config_passes.pointwise_config, config_passes.pixel_config, config_passes.norm_grad_config)
    )
    assert windows.block_p * windows.block_c == pixels.block_p * pixels.block_c == 1024
    assert norm.block_p * norm.block_c == (256 if channels % 2 else 512)
    assert windows.block_c < 2 * channels
    assert channels <= pixels.block_c < 2 * channels
    assert windows in reachable.pointwise()
    assert pixels in reachable.pixels()
    assert norm in reachable.norm_grads()
    assert config_passes.statistics_config(channels).block_c in (16, 32)


@given(count=st.integers(1, 10**7), channels=st.integers(1, 1000), target=targets)
def test_parts_of_passes(count: int, channels: int, target: gpu.Target) -> None:
    """Neither round of a merging is a long loop, and no part is short."""
    per_split = config_passes.statistics_per_split(count)
    assert max(per_split, -(-count // per_split)) <= 4096
    splits = config_passes.norm_grad_splits(count, channels, target)
    assert 1 <= splits <= max(1, count // (8 * config_passes.norm_grad_config(channels).block_p))
    chosen = config_passes.pixel_config(channels)
    splits = config_passes.pixel_splits(count, chosen)
    assert 1 <= splits <= 64
    assert splits == 1 or -(-count // chosen.block_p) // splits >= 4


def test_few_input_channels_fold_their_taps() -> None:
    target = gpu.known_target(90)
    for c1, variant in ((1, "folded"), (3, "folded"), (7, "folded"), (8, "pointer"), (64, "descriptor")):
        shape = ConvShape(c1, 0, 64, 64, 64, config.aligned(c1, 64))
        assert config.conv_config(shape, torch.bfloat16, target, allow_tf32=False).variant == variant
    with_up = ConvShape(3, 3, 64, 64, 64, aligned=False)
    assert config.conv_config(with_up, torch.bfloat16, target, allow_tf32=False).variant == config.POINTER


@pytest.mark.parametrize(("capability", "c_in"), [(80, 1), (90, 3), (80, 128), (86, 64), (89, 128)])
def test_two_programs_of_eight_warps_share_the_registers(capability: int, c_in: int) -> None:
    shape = ConvShape(c_in, 0, 128, 256, 256, config.aligned(c_in, 128))
    chosen = config.conv_config(shape, torch.bfloat16, gpu.known_target(capability), allow_tf32=False)
    assert chosen.num_warps == 8
    assert 2 * 32 * chosen.num_warps * (chosen.max_registers or 255) <= 65536


def test_deep_levels_get_smaller_tiles_than_wide_ones() -> None:
    target = gpu.known_target(90)
    deep, wide = (
        config.conv_config(ConvShape(1024, 0, 1024, side, side), torch.bfloat16, target, allow_tf32=False)
        for side in (32, 256)
    )
    assert (deep.tile_h, wide.tile_h) == (16, 32)


def test_targets() -> None:
    assert gpu.known_target(90).shared_memory == 232448
    with pytest.raises(KeyError):
        gpu.known_target(70)
    assert gpu.target(torch.device("cpu")) is gpu.INTERPRETER


# --- products at single pixels: conv_transpose2x2 and conv1x1 ---


@settings(max_examples=200, derandomize=True, deadline=None)
@given(c_in=channel_counts, c_out=channel_counts, format=formats, target=targets, softmax=st.booleans())
def test_pixel_product_configs(
    c_in: int, c_out: int, format: tuple[torch.dtype, bool], target: gpu.Target, softmax: bool
) -> None:
    dtype, allow_tf32 = format
    options = {"allow_tf32": allow_tf32}
    transpose = config_pixels.pixel_product_config(c_in, c_out, dtype, target, **options)
    head = config_pixels.head_config(c_in, c_out, dtype, target, softmax=softmax, **options)
    for chosen in (transpose, head, config_pixels.head_input_grad_config(dtype, **options)):
        assert_fits(chosen, chosen.block_p, chosen.block_n, chosen.block_k, dtype, target)
    if softmax and c_out <= config_pixels.LARGEST_SOFTMAX:
        assert head.block_n >= c_out
    # What runs is among what is compiled ahead of time.
    assert transpose in reachable.pixel_products(dtype, target, **options)
    heads = reachable.heads(dtype, target, **options)
    assert head in heads


@settings(max_examples=200, derandomize=True, deadline=None)
@given(c_in=channel_counts, c_out=channel_counts, format=formats, target=targets, blocks=st.integers(1, 10**6))
def test_pixel_weight_grad_configs(
    c_in: int, c_out: int, format: tuple[torch.dtype, bool], target: gpu.Target, blocks: int
) -> None:
    dtype, allow_tf32 = format
    transpose = config_pixels.pixel_weight_grad_config(c_in, c_out, dtype, target, allow_tf32=allow_tf32)
    head = config_pixels.head_weight_grad_config(c_out, dtype, allow_tf32=allow_tf32)
    for chosen, subpixels in ((transpose, 4), (head, 1)):
        assert_fits(chosen, chosen.block_in, chosen.block_out, chosen.block_p, dtype, target)
        programs = config_pixels.pixel_weight_grad_programs(chosen, c_in, c_out, subpixels)
        assert programs * chosen.block_in * chosen.block_out >= subpixels * c_in * c_out
        assert 1 <= config_grad.weight_grad_splits(programs, blocks, target) <= max(1, blocks // 8)
    assert transpose in reachable.pixel_weight_grads(dtype, target, allow_tf32=allow_tf32)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(c_in=channel_counts, c_out=channel_counts, format=formats, target=targets)
def test_subpixel_tile_config(c_in: int, c_out: int, format: tuple[torch.dtype, bool], target: gpu.Target) -> None:
    dtype, _ = format
    chosen = config_pixels.subpixel_tile_config(c_in, c_out, dtype, target)
    if target.capability < 90 or dtype == torch.float32 or c_in % 16 or c_out % 8:
        assert chosen is None
    elif c_out >= 64:
        assert chosen is not None
    if chosen is not None:
        assert chosen in reachable.subpixel_tiles(dtype, target)
        assert chosen.block_n >= 64
        assert_fits(chosen, chosen.tile_h * chosen.tile_w, chosen.block_n, chosen.block_k, dtype, target)
