"""Launch configurations of the halo variant, written in Gluon for sm_90: where it fits, and its blocks."""

from __future__ import annotations

import torch
from fastunet.kernels.conv3x3.config import HALO, TILE_W, ConvConfig, ConvShape
from fastunet.kernels.gpu import Target, cdiv


def fits_halo(shape: ConvShape, dtype: torch.dtype, target: Target) -> bool:
    """Return whether a convolution fits the halo variant: whole steps of 64 channels of each input, one output."""
    whole = shape.c1 % 64 == 0 and shape.c2 % 64 == 0 and shape.c_out % 8 == 0 and shape.c_out > 32
    return target.capability == 90 and dtype.itemsize == 2 and whole and shape.c_out2 == 0


def halo_config(shape: ConvShape, target: Target) -> ConvConfig:
    """Return the halo variant's blocks, where `fits_halo`: large tiles but for a small image, and all stages that fit.

    The swapped product, which for 64 channels reads less shared memory, and whose threads hold fewer channels of a
    norm. Unmeasured.
    """
    if shape.c_out <= 64:
        tile_h, block_n, slots, weights = 32, 64, 3, 6
    elif cdiv(shape.width, TILE_W) * cdiv(shape.height, 32) * cdiv(shape.c_out, 128) >= target.multiprocessors:
        tile_h, block_n, slots, weights = 32, 128, 2, 4
    else:
        tile_h, block_n, slots, weights = 16, 64, 4, 8
    return ConvConfig(tile_h, TILE_W, block_n, 64, 4, slots, HALO, weight_stages=weights, swapped=True)


def shared_memory(chosen: ConvConfig) -> int:
    """Return the bytes of the halo variant: both rings, y and its pooled half on their way, 16 bits each. Barriers
    aside.
    """
    pixels, block_n = chosen.tile_h * chosen.tile_w, chosen.block_n
    rings = chosen.num_stages * (chosen.tile_h + 2) * chosen.tile_w + chosen.weight_stages * block_n
    return 2 * (rings * chosen.block_k + pixels * block_n + pixels // 4 * block_n)
