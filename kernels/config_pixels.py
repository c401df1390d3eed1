"""Launch configurations of products at single pixels: conv_transpose2x2 and conv1x1. See config.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from fastunet.kernels.conv3x3.config import (
    ALL_REGISTERS,
    DESCRIPTOR,
    TILE_W,
    ConvConfig,
    channel_block,
    fits_descriptors,
    stages,
)
from fastunet.kernels.gpu import Config, Target, cdiv, row_unit

T = TypeVar("T")


@dataclass(frozen=True)
class PixelProductConfig(Config):
    """Blocks of a product of pixels with a weight: pixels, output channels, and input channels of one step."""

    block_p: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True)
class PixelWeightGradConfig(Config):
    """Blocks of such a product's weight gradient: pixels of one step, its K dimension, and channels."""

    block_p: int
    block_in: int
    block_out: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


# The most channels that a block of softmax holds; of more, a program's sums and exponentials would not fit registers.
LARGEST_SOFTMAX = 256


def pixel_product_config(
    c_in: int, c_out: int, dtype: torch.dtype, target: Target, *, allow_tf32: bool
) -> PixelProductConfig:
    """Return the blocks for conv_transpose2x2, one sub-pixel a program, and for its input gradient."""
    half = dtype.itemsize == 2
    tensor_cores = half or allow_tf32
    block_p = 128 if tensor_cores else 64
    if row_unit(c_in, c_out) < 8:  # Loads go element by element: small steps and many threads hold the addresses.
        return PixelProductConfig(block_p, 32, 16, 8, num_stages=1, max_registers=ALL_REGISTERS)
    # Rows of channels are cut by masks: a step may be wider than they are.
    block_k = 16 if not tensor_cores else 64 if half and target.capability >= 90 else 32
    block_n = channel_block(c_out, 128 if half else 64)
    num_stages = stages((block_p + block_n) * block_k * dtype.itemsize, target)
    limit = None if half and block_n > 32 else ALL_REGISTERS
    return PixelProductConfig(block_p, block_n, block_k, 8 if block_n == 128 else 4, num_stages, limit)


def subpixel_tile_config(c_in: int, c_out: int, dtype: torch.dtype, target: Target) -> ConvConfig | None:
    """Return the blocks for conv_transpose2x2 through tensor descriptors, None where it does not suit them. Unmeasured.

    The rows of a tile count through all images.
    """
    if not fits_descriptors(dtype, target, (c_in,), (c_out,)):
        return None
    block_n, tile_h = channel_block(c_out, 128), 16
    num_stages = stages((tile_h * TILE_W + block_n) * 64 * dtype.itemsize, target)
    limit = ALL_REGISTERS if target.capability >= 100 else None
    return ConvConfig(tile_h, TILE_W, block_n, 64, 8 if block_n == 128 else 4, num_stages, DESCRIPTOR, limit)


def head_config(
    c_in: int, c_out: int, dtype: torch.dtype, target: Target, *, allow_tf32: bool, softmax: bool
) -> PixelProductConfig:
    """Return the blocks for conv1x1; softmax wants all output channels, LARGEST_SOFTMAX at most, in one block."""
    half = dtype.itemsize == 2
    tensor_cores = half or allow_tf32
    block_n = 16 if c_out <= 16 else 64 if c_out <= 64 or not softmax else 256
    block_p = 128 if tensor_cores and block_n < 256 else 64 if tensor_cores or block_n < 256 else 16
    block_k = 32 if tensor_cores and row_unit(c_in) == 8 else 16
    num_stages = stages((block_p + block_n) * block_k * dtype.itemsize, target)
    return PixelProductConfig(block_p, block_n, block_k, 8, num_stages, ALL_REGISTERS)


def head_input_grad_config(dtype: torch.dtype, *, allow_tf32: bool) -> PixelProductConfig:
    """Return the blocks for conv1x1's input gradient: there are few channels to sum over, one step as a rule."""
    block_p = 128 if dtype.itemsize == 2 or allow_tf32 else 64
    return PixelProductConfig(block_p, 64, 16, 8, num_stages=1, max_registers=ALL_REGISTERS)


def head_weight_grad_config(c_out: int, dtype: torch.dtype, *, allow_tf32: bool) -> PixelWeightGradConfig:
    """Return blocks for the gradient of conv1x1's weight, and of any whose rows of channels load element by element."""
    tensor_cores = dtype.itemsize == 2 or allow_tf32
    block_out = 16 if c_out <= 16 else 64 if tensor_cores else 32
    return PixelWeightGradConfig(32 if tensor_cores else 16, 64, block_out, 8, 2, ALL_REGISTERS)


def pixel_weight_grad_config(
    c_in: int, c_out: int, dtype: torch.dtype, target: Target, *, allow_tf32: bool
) -> PixelWeightGradConfig:
    """Return the blocks for the gradient of conv_transpose2x2's weight, c_in by c_out."""
    half = dtype.itemsize == 2
    tensor_cores = half or allow_tf32
    if row_unit(c_in, c_out) < 8:
        return head_weight_grad_config(c_out, dtype, allow_tf32=allow_tf32)
    block_in = 128 if half and c_in % 128 == 0 else 64
    block_out = 128 if block_in == 128 and c_out % 128 == 0 else 64
    block_p = 64 if half and target.capability >= 90 else 32
    num_stages = stages(block_p * (block_in + block_out) * dtype.itemsize, target)
    wide = block_out == 128 or not tensor_cores
    limit = None if half and target.capability < 100 else ALL_REGISTERS
    return PixelWeightGradConfig(block_p, block_in, block_out, 8 if wide else 4, num_stages, limit)


def pixel_weight_grad_programs(chosen: PixelWeightGradConfig, c_in: int, c_out: int, subpixels: int) -> int:
    """Return the programs that together cover one weight gradient: channel blocks, times the sub-pixels."""
    return subpixels * cdiv(c_in, chosen.block_in) * cdiv(c_out, chosen.block_out)


def writes_e4m3(c_in: int, c_out: int, dtype: torch.dtype, target: Target) -> bool:
    """Return whether conv_transpose2x2 can leave its result in e4m3: by descriptors, whole 16-byte vectors of it."""
    return subpixel_tile_config(c_in, c_out, dtype, target) is not None and c_out % 16 == 0
