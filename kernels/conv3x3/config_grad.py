"""Launch configurations of the weight gradient of a 3x3 convolution: pure functions of its sizes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from fastunet.kernels import autotune
from fastunet.kernels.conv3x3.config import (
    ALL_REGISTERS,
    DESCRIPTOR,
    FOLDED,
    FOLDED_BELOW,
    POINTER,
    REMEMBERED,
    TILE_W,
    WEIGHT_GRAD,
    ConvShape,
    channel_block,
    cover,
    fits_descriptors,
    gathering,
    stages,
)
from fastunet.kernels.gpu import Config, Target, cdiv, row_unit


@dataclass(frozen=True)
class WeightGradConfig(Config):
    """Blocks of the weight gradient.

    tile_h, tile_w: pixels of one step, its K dimension. block_out: output channels. block_in: input channels, or all
    9*C values where folded. variant: as in ConvConfig.
    """

    tile_h: int
    tile_w: int
    block_out: int
    block_in: int
    num_warps: int
    num_stages: int
    variant: str
    max_registers: int | None = None


def weight_grad_config(
    shape: ConvShape, dtype: torch.dtype, target: Target, *, allow_tf32: bool, op: str = WEIGHT_GRAD
) -> WeightGradConfig:
    """Return the blocks for the gradient of a weight [c_out, c1, 3, 3]; `allow_tf32` matters for float32 only. op:
    WEIGHT_GRAD, by stride 2 with autotune.STRIDE2.
    """
    found = autotune.config_for(op, shape, dtype, allow_tf32, target.name, WeightGradConfig)
    heuristic = weight_grad_by_stride_2 if op.endswith(autotune.STRIDE2) else heuristic_weight_grad_config
    return found or heuristic(shape, dtype, target, allow_tf32)


def weight_grad_by_stride_2(shape: ConvShape, dtype: torch.dtype, target: Target, allow_tf32: bool) -> WeightGradConfig:
    """Return heuristic_weight_grad_config for stride 2."""
    chosen = heuristic_weight_grad_config(shape, dtype, target, allow_tf32)
    if chosen.variant == DESCRIPTOR:
        return chosen
    chosen = heuristic_weight_grad_config(shape, dtype, gathering(target), allow_tf32)
    # Of 128 x 128 channels on sm_90, Triton 3.6 has the products wait for each other.
    return replace(chosen, block_in=min(chosen.block_in, 64)) if target.capability == 90 else chosen


@functools.lru_cache(REMEMBERED)
def heuristic_weight_grad_config(
    shape: ConvShape, dtype: torch.dtype, target: Target, allow_tf32: bool
) -> WeightGradConfig:
    """As weight_grad_config, whatever was measured."""
    half = dtype.itemsize == 2
    c_in, c_out = shape.c1, shape.c_out
    tile = _run_of_pixels(shape.height, shape.width)
    if tile is not None and fits_descriptors(dtype, target, (c_in,), (c_out,)):
        return _descriptor_weight_grad_config(c_in, c_out, tile, dtype, target)
    tile_h, widest = (4, 64) if half or allow_tf32 else (2, 32)
    if c_in < FOLDED_BELOW:
        return WeightGradConfig(tile_h, TILE_W, widest, cover(9 * c_in, 32, 64), 8, 2, FOLDED, ALL_REGISTERS)
    if row_unit(c_in, c_out) < 8:
        block_out, block_in = cover(c_out, 32, widest), cover(c_in, 32, 64)
        return WeightGradConfig(tile_h, TILE_W, block_out, block_in, 8, 2, POINTER, ALL_REGISTERS)
    block_out = channel_block(c_out, 128 if half else 64)
    block_in = channel_block(c_in, 128 if block_out == 128 else 64)
    tile_h = 8 if half and target.capability >= 90 else 4
    wide = block_out == 128 or (not half and not allow_tf32 and block_out == block_in == 64)
    num_stages = stages(tile_h * TILE_W * (block_out + block_in) * dtype.itemsize, target)
    limit = None if half and block_out > 32 else ALL_REGISTERS
    return WeightGradConfig(tile_h, TILE_W, block_out, block_in, 8 if wide else 4, num_stages, POINTER, limit)


def _run_of_pixels(height: int, width: int) -> tuple[int, int] | None:
    """Return height and width of tiles whose 64, 32 or 16 pixels are neighbours in memory and which fill the image, or
    None.

    A tile past the image's edge would be filled with zeros, which beside an infinite neighbour make NaN.
    """
    for pixels in (64, 32, 16):
        tile_w = pixels if width % pixels == 0 else width
        if tile_w in (8, 16, 32, 64) and tile_w <= pixels and height % (pixels // tile_w) == 0:
            return pixels // tile_w, tile_w
    return None


def _descriptor_weight_grad_config(
    c_in: int, c_out: int, tile: tuple[int, int], dtype: torch.dtype, target: Target
) -> WeightGradConfig:
    block_out = channel_block(c_out, 128)
    block_in = cover(c_in, 16, 128 if block_out == 128 else 64)
    num_stages = stages(tile[0] * tile[1] * (block_out + block_in) * dtype.itemsize, target)
    warps = 8 if block_out == block_in == 128 else 4
    limit = ALL_REGISTERS if target.capability >= 100 else None
    return WeightGradConfig(*tile, block_out, block_in, warps, num_stages, DESCRIPTOR, limit)


def weight_grad_programs(chosen: WeightGradConfig, c_in: int, c_out: int) -> int:
    """Return the programs that together cover one weight gradient: channel blocks, times the taps unless folded."""
    taps_and_inputs = 1 if chosen.variant == FOLDED else 9 * cdiv(c_in, chosen.block_in)
    return taps_and_inputs * cdiv(c_out, chosen.block_out)


# Waves of programs that are looked at; what a program costs beside its steps, in steps; and what fewer parts may cost,
# since then fewer sums are written and read. Unmeasured.
_MOST_WAVES, _STEPS_OF_ENDS, _FOR_FEWER_PARTS = 4, 2, 1.02


@functools.lru_cache(REMEMBERED)
def weight_grad_splits(programs: int, tiles: int, target: Target) -> int:
    """Return how many parts the pixel tiles fall into, each summed by `programs` of its own.

    Two programs run on a multiprocessor at a time, and their waves are to be full. Of the numbers of parts of at least
    eight tiles, whose sums are written and read again, that is taken by which the last wave ends first.
    """
    slots = 2 * target.multiprocessors

    def steps(splits: int) -> int:
        per_split = cdiv(tiles, splits)
        return cdiv(programs * cdiv(tiles, per_split), slots) * (per_split + _STEPS_OF_ENDS)

    most = min(tiles // 8, max(1, _MOST_WAVES * slots // programs))
    candidates = range(1, max(1, most) + 1)
    limit = _FOR_FEWER_PARTS * min(map(steps, candidates))
    return next(splits for splits in candidates if steps(splits) <= limit)
