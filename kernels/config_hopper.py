"""Launch configurations of the forms for sm_90 that are written in Gluon: where each fits, and its blocks."""

from __future__ import annotations

from dataclasses import replace

import torch
from fastunet.kernels.config import HALO, HALO_W, ONE_HALO, RESIDENT, TILE_W, ConvConfig, ConvShape
from fastunet.kernels.gpu import Target, cdiv


def fits_halo(shape: ConvShape, dtype: torch.dtype, target: Target) -> bool:
    """Whether a convolution can run in the halo form: whole steps of 64 channels of each input, one output."""
    whole = shape.c1 % 64 == 0 and shape.c2 % 64 == 0 and shape.c_out % 8 == 0 and shape.c_out > 32
    return target.capability == 90 and dtype.itemsize == 2 and whole and shape.c_out2 == 0


def halo_config(shape: ConvShape, target: Target) -> ConvConfig:
    """The halo form's blocks, where `fits_halo`: large tiles but for a small image, and all stages there is room for.

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


def fits_resident(shape: ConvShape, dtype: torch.dtype, target: Target) -> bool:
    """Whether a convolution can run in the resident form: as the halo form, 64 to 128 channels to 64 at most."""
    return fits_halo(shape, dtype, target) and shape.c_out <= 64 and shape.c1 + shape.c2 <= 128


def resident_config(shape: ConvShape) -> ConvConfig:
    """The resident form's blocks, where `fits_resident`: what shared memory there is beside the weights. Unmeasured."""
    channels = shape.c1 + shape.c2
    tile_h = 32 if channels == 64 else 16
    return ConvConfig(tile_h, TILE_W, 64, 64, 4, 3, RESIDENT, weight_stages=9 * channels // 64, swapped=True)


def fits_one_halo(shape: ConvShape, dtype: torch.dtype, target: Target) -> bool:
    """Whether a convolution can run in the form of one halo: as the resident form, of 64 channels, beside whose weights
    there is room for slots.
    """
    return fits_resident(shape, dtype, target) and shape.c1 + shape.c2 == 64


def one_halo_config(shape: ConvShape) -> ConvConfig:
    """The blocks of the form of one halo, where `fits_one_halo`. Unmeasured."""
    return replace(resident_config(shape), tile_h=16, form=ONE_HALO)


def shared_memory(chosen: ConvConfig) -> int:
    """Bytes of the forms for sm_90: both rings, y and its pooled half on their way, 16 bits each. Barriers aside."""
    pixels, block_n = chosen.tile_h * chosen.tile_w, chosen.block_n
    width = HALO_W if chosen.form == ONE_HALO else TILE_W
    rings = chosen.num_stages * (chosen.tile_h + 2) * width + chosen.weight_stages * block_n
    return 2 * (rings * chosen.block_k + pixels * block_n + pixels // 4 * block_n)
