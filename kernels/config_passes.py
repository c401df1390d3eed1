"""Launch configurations of passes over memory: pooling and activations, norms, the sums of losses. See config.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastunet.kernels.conv3x3.config import cover
from fastunet.kernels.gpu import Config, Target, cdiv

# A program of the sums of segmentation_loss holds all channels of its pixels, 1024 elements: with more channels, ATen
# runs.
MOST_CHANNELS = 1024


@dataclass(frozen=True)
class PassConfig(Config):
    """Blocks of a pass: pixels, 2x2 windows or rows of partial statistics, by channels."""

    block_p: int
    block_c: int
    num_warps: int = 4
    num_stages: int = 1
    max_registers: int | None = None


# --- 2x2 windows ---


def pointwise_config(channels: int) -> PassConfig:
    """Return blocks for an elementwise pass over windows of `channels` channels: about 1024 elements of each pixel."""
    block_c = cover(channels, 1, 128)
    return PassConfig(1024 // block_c, block_c)


# --- norms ---

# Programs that a multiprocessor runs at a time of a norm's gradient, whose loads wait for memory.
_NORM_GRAD_PROGRAMS = 5


def statistics_config(channels: int) -> PassConfig:
    """Return the blocks for merging partial statistics, rows by channels."""
    return PassConfig(32, cover(channels, 16, 32))


def statistics_per_split(rows: int) -> int:
    """Return how many rows of statistics a program merges, where `rows` in one round would be a long loop."""
    return max(256, cover(math.isqrt(rows), 1, 1 << 20))


def norm_grad_config(channels: int) -> PassConfig:
    """Return the blocks of windows for the gradient of a norm, such that registers suffice for _NORM_GRAD_PROGRAMS.

    Of an odd number of channels each value has an address of its own.
    """
    block_c = cover(channels, 4, 64)
    return PassConfig((512 if channels % 2 == 0 else 256) // block_c, block_c)


def norm_grad_splits(windows: int, channels: int, target: Target) -> int:
    """Return the parts of a group of `windows` windows: programs to fill the multiprocessors, of eight steps at least.

    `windows` counts those of one group, so that an image's instance norm is the same alone and in a batch. Unmeasured.
    """
    chosen = norm_grad_config(channels)
    most = cdiv(_NORM_GRAD_PROGRAMS * target.multiprocessors, cdiv(channels, chosen.block_c))
    return max(1, min(most, windows // (8 * chosen.block_p)))


# --- the sums of segmentation_loss ---


def pixel_config(channels: int) -> PassConfig:
    """Return blocks for a pass over whole pixels: 1024 elements, eight a thread; the sums hold five values for each."""
    block_c = cover(channels, 1, MOST_CHANNELS)
    return PassConfig(1024 // block_c, block_c)


def pixel_splits(pixels: int, chosen: PassConfig) -> int:
    """Return how many parts the pixels of one image fall into, each summed by a program of its own.

    At least four blocks to a part, and at most 64 parts, whose sums one program adds in turn. It depends on neither
    batch nor GPU: an image's sums have the same bits everywhere. Unmeasured.
    """
    return max(1, min(64, cdiv(pixels, chosen.block_p) // 4))
