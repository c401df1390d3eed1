"""The configurations that a convolution could run with, for measuring which is fastest: pure enumeration.

The heuristic configuration comes first, then those of the other variants, then the rest by how many fields they differ
in from their variant's, so that a search which is cut short has seen the likeliest. All are correct by construction and
fit shared memory; whether one compiles without spills, or at all, is for the search to find out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from typing import TypeVar

import torch
from fastunet.kernels import autotune
from fastunet.kernels.conv3x3 import config, config_grad, config_hopper
from fastunet.kernels.conv3x3.config import (
    ALL_REGISTERS,
    DESCRIPTOR,
    FOLDED,
    HALO,
    POINTER,
    TILE_W,
    ConvConfig,
    ConvShape,
)
from fastunet.kernels.gpu import Target

# Sums, of 32 bits, that one thread can hold beside its addresses and operands.
_MOST_SUMS = 128
_WARPS = (4, 8)
_STAGES = (2, 3, 4)

T = TypeVar("T", ConvConfig, config_grad.WeightGradConfig)


def feasible_configs(
    op: str, shape: ConvShape, dtype: torch.dtype, target: Target, *, allow_tf32: bool
) -> Sequence[ConvConfig | config_grad.WeightGradConfig]:
    """Return the configs to try for an op by one of `config`'s names, the heuristic one first; `allow_tf32` matters for
    float32.
    """
    if op == config.WEIGHT_GRAD:
        heuristic = config_grad.heuristic_weight_grad_config(shape, dtype, target, allow_tf32)
        return _weight_grad_configs(heuristic, shape, dtype, target)
    if op == config.WEIGHT_GRAD + autotune.STRIDE2:
        heuristic = config_grad.weight_grad_by_stride_2(shape, dtype, target, allow_tf32)
        return _weight_grad_configs(heuristic, shape, dtype, target)
    if op == config.COMPOSED:
        composed = config.heuristic_composed_config(shape, dtype, target)
        return _nearest_first({composed.variant: composed}, _candidates(composed, shape, dtype, target))
    if op.endswith(autotune.STRIDE2):
        variants = _variants_by_stride_2(shape, dtype, target, allow_tf32)
    else:
        variants = conv_variants(shape, dtype, target, allow_tf32=allow_tf32)
    found = [candidate for each in variants.values() for candidate in _candidates(each, shape, dtype, target)]
    if op == config.CONV3X3:  # An input gradient is one too, but its kernels split no sums.
        for each in variants.values():
            found += [replace(each, splits=count) for count in config.splittings(each, shape, target)]
    return _nearest_first(variants, found)


def conv_variants(shape: ConvShape, dtype: torch.dtype, target: Target, *, allow_tf32: bool) -> dict[str, ConvConfig]:
    """Return the heuristic config of each variant that `shape` can run in on the target, the one chosen first."""
    heuristic = config.heuristic_conv_config(shape, dtype, target, allow_tf32)
    variants = {heuristic.variant: heuristic}
    if config_hopper.fits_halo(shape, dtype, target):
        variants[HALO] = config_hopper.halo_config(shape, target)
    if heuristic.variant == DESCRIPTOR:
        variants[POINTER] = config.heuristic_conv_config(shape, dtype, config.gathering(target), allow_tf32)
    return variants


def _variants_by_stride_2(
    shape: ConvShape, dtype: torch.dtype, target: Target, allow_tf32: bool
) -> dict[str, ConvConfig]:
    chosen, gathers = (config.by_stride_2(shape, dtype, target, allow_tf32, gathers=each) for each in (False, True))
    return {chosen.variant: chosen, gathers.variant: gathers}


def _candidates(heuristic: ConvConfig, shape: ConvShape, dtype: torch.dtype, target: Target) -> list[ConvConfig]:
    """Return the configs of heuristic's variant."""
    if heuristic.variant == HALO:
        return _halo_configs(heuristic, shape.c_out, target)
    channels = max(shape.c_out, shape.c_out2)
    heights = [h for h in (8, 16, 32) if h <= heuristic.tile_h or dtype.itemsize == 2]
    # Where the heuristic block holds all output channels, so does every other: a joined head needs it.
    blocks_n = [n for n in (32, 64, 128) if _covers(n, channels, heuristic.block_n)]
    blocks_k = _step_blocks(heuristic, shape)
    # Loads that go element by element are not pipelined.
    stages = _STAGES if heuristic.num_stages > 1 else (1,)
    found = []
    for tile_h, block_n, block_k, warps, depth in itertools.product(heights, blocks_n, blocks_k, _WARPS, stages):
        limit = _register_limit(heuristic.variant, block_n, dtype, target)
        candidate = ConvConfig(tile_h, TILE_W, block_n, block_k, warps, depth, heuristic.variant, limit)
        per_stage = (tile_h * TILE_W + block_n) * block_k * dtype.itemsize
        if _fits(tile_h * TILE_W * block_n, warps, depth * per_stage, target):
            found.append(candidate)
    return found


def _halo_configs(heuristic: ConvConfig, channels: int, target: Target) -> list[ConvConfig]:
    blocks = (64, 128) if channels > 64 else (64,)
    found = [
        replace(heuristic, tile_h=tile_h, block_n=block_n, num_stages=depth, weight_stages=weights)
        for tile_h, block_n, depth, weights in itertools.product((16, 32), blocks, (2, 3, 4), (4, 6, 8))
    ]
    # Half a kilobyte is for the barriers.
    return [c for c in found if config_hopper.shared_memory(c) + 512 <= target.shared_memory]


def _covers(block: int, channels: int, heuristic_block: int) -> bool:
    if heuristic_block >= channels:
        return channels <= block <= max(heuristic_block, 64)
    # A product of the descriptor variant has the block's rows, and tensor cores take 64 at least.
    return block >= 64 and block <= config.cover(channels, 32, 128)


def _step_blocks(heuristic: ConvConfig, shape: ConvShape) -> list[int]:
    if heuristic.variant == FOLDED or not shape.aligned:
        return [heuristic.block_k]
    deepest = config.step_block(shape.c1, shape.c2, 64)
    return [k for k in (16, 32, 64) if k <= deepest]


def _register_limit(variant: str, block_n: int, dtype: torch.dtype, target: Target) -> int | None:
    """As heuristic configs have it."""
    if variant == DESCRIPTOR:
        return ALL_REGISTERS if target.capability >= 100 else None
    return None if variant == POINTER and dtype.itemsize == 2 and block_n > 32 else ALL_REGISTERS


def _weight_grad_configs(
    heuristic: config_grad.WeightGradConfig, shape: ConvShape, dtype: torch.dtype, target: Target
) -> list[config_grad.WeightGradConfig]:
    """Return the configs of heuristic's variant for the gradient of a weight [c_out, c1, 3, 3]."""
    # The descriptor variant's tile is a run of neighbours in memory; the folded variant's block holds all taps.
    heights = (heuristic.tile_h,) if heuristic.variant == DESCRIPTOR else (2, 4, 8)
    blocks_out = [n for n in (32, 64, 128) if n <= config.cover(shape.c_out, 32, 128)]
    blocks_in = [n for n in (16, 32, 64, 128) if n <= config.cover(shape.c1, 16, 128)]
    if heuristic.variant == FOLDED:
        blocks_in = [heuristic.block_in]
    if heuristic.variant == DESCRIPTOR:  # Its product has block_out rows.
        blocks_out = [n for n in blocks_out if n >= 64]
    found = []
    for tile_h, block_out, block_in, warps, depth in itertools.product(heights, blocks_out, blocks_in, _WARPS, _STAGES):
        candidate = replace(
            heuristic, tile_h=tile_h, block_out=block_out, block_in=block_in, num_warps=warps, num_stages=depth
        )
        per_stage = tile_h * heuristic.tile_w * (block_out + block_in) * dtype.itemsize
        if _fits(block_out * block_in, warps, depth * per_stage, target):
            found.append(candidate)
    return _nearest_first({heuristic.variant: heuristic}, found)


def _fits(sums: int, warps: int, shared_memory: int, target: Target) -> bool:
    return sums <= _MOST_SUMS * 32 * warps and shared_memory <= target.shared_memory


def _nearest_first(heuristic: Mapping[str, T], found: list[T]) -> list[T]:
    """heuristic: by variant, first the one that is chosen unmeasured."""

    def distance(candidate: T) -> tuple[int, float]:
        """Return fields that differ, and how many times blocks, warps and stages are doubled or halved."""
        pairs = zip(astuple(candidate), astuple(heuristic[candidate.variant]), strict=True)
        changed = [(a, b) for a, b in pairs if a != b]
        return len(changed), sum(abs(math.log2(a / b)) for a, b in changed if a and b and type(a) is type(b) is int)

    first: list[T] = list(heuristic.values())
    return [*first, *sorted((candidate for candidate in found if candidate not in first), key=distance)]
