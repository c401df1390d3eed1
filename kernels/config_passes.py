"""Launch configurations of passes over memory: pooling and activations, norms, the sums of losses. See config.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastunet.kernels.conv3x3.config import cover
from fastunet.kernels.gpu import Target, cdiv

# --- 2x2 windows ---


@dataclass(frozen=True)
class PointwiseConfig:
    """Blocks of an elementwise pass over 2x2 windows."""

    block_windows: int
    block_channels: int
    num_warps: int


def pointwise_config(channels: int) -> PointwiseConfig:
    """The blocks for an elementwise pass over windows of `channels` channels: about 1024 elements of each pixel."""
    block_channels = cover(channels, 1, 128)
    return PointwiseConfig(1024 // block_channels, block_channels, num_warps=4)


def pointwise_configs() -> dict[PointwiseConfig, int]:
    """Every config that pointwise_config can choose, each with the most channels that lead to it."""
    return {pointwise_config(channels): channels for channels in (1, 2, 4, 8, 16, 32, 64, 128)}


# --- norms ---


@dataclass(frozen=True)
class StatisticsConfig:
    """Blocks of the merging of partial statistics.

    block_rows, block_channels: statistics of one step. splits: parts the rows of a group fall into, merged apart at
    first, of rows_per_split each.
    """

    block_rows: int
    block_channels: int
    splits: int
    rows_per_split: int


@dataclass(frozen=True)
class NormGradConfig:
    """Blocks of the gradient of a norm: 2x2 windows and channels of one step, and parts the windows fall into."""

    block_windows: int
    block_channels: int
    num_warps: int
    splits: int


def statistics_config(rows: int, channels: int) -> StatisticsConfig:
    """The blocks for merging `rows` statistics of each group: in two rounds where one would be a long loop."""
    per_split = max(256, cover(math.isqrt(rows), 1, 1 << 20))
    return StatisticsConfig(32, cover(channels, 16, 32), cdiv(rows, per_split), per_split)


def norm_grad_config(windows: int, channels: int, target: Target) -> NormGradConfig:
    """The blocks for a group of `windows` 2x2 windows: two programs for every multiprocessor, of eight steps at least.

    `windows` counts those of one group, so that an image's instance norm is the same alone and in a batch. Unmeasured.
    """
    block_channels = cover(channels, 4, 64)
    block_windows = 512 // block_channels
    wanted = cdiv(2 * target.multiprocessors, cdiv(channels, block_channels))
    return NormGradConfig(block_windows, block_channels, 4, max(1, min(wanted, windows // (8 * block_windows))))


def norm_grad_configs(target: Target) -> dict[NormGradConfig, int]:
    """Every shape of block norm_grad_config can choose, each with the most channels that lead to it."""
    return {norm_grad_config(1, channels, target): channels for channels in (4, 8, 16, 32, 64)}


# --- the sums of segmentation_loss ---

# A program holds all channels of its pixels, 1024 elements: with more channels, ATen runs.
MOST_CHANNELS = 1024


@dataclass(frozen=True)
class PixelConfig:
    """Blocks of a pass over whole pixels: a program holds all channels of block_pixels of them."""

    block_pixels: int
    block_channels: int
    num_warps: int


def pixel_config(channels: int) -> PixelConfig:
    """1024 elements, eight a thread: the sums hold five float32 values for each."""
    block_channels = cover(channels, 1, MOST_CHANNELS)
    return PixelConfig(1024 // block_channels, block_channels, num_warps=4)


def pixel_configs() -> dict[PixelConfig, int]:
    """Every config that pixel_config can choose for up to MOST_CHANNELS, each with the most that lead to it."""
    return {pixel_config(1 << power): 1 << power for power in range(MOST_CHANNELS.bit_length())}


def pixel_splits(pixels: int, chosen: PixelConfig) -> int:
    """How many parts the pixels of one image fall into, each summed by a program of its own.

    At least four blocks to a part, and at most 64 parts, whose sums one program adds in turn. It depends on neither
    batch nor GPU: an image's sums have the same bits everywhere. Unmeasured.
    """
    return max(1, min(64, cdiv(pixels, chosen.block_pixels) // 4))
