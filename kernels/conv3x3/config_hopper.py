"""Launch configurations of the halo variant, written in Gluon for sm_90: where it fits, and its blocks."""

from __future__ import annotations

import functools

import torch
from fastunet.kernels import autotune, gpu, self_test
from fastunet.kernels.conv3x3.config import HALO, TILE_W, ConvConfig, ConvShape, channel_block
from fastunet.kernels.gpu import Target, cdiv

# The family of its check, which is apart from the other kernels': it synchronises by hand, and a wrong barrier hangs.
FAMILY = "conv3x3_halo"


def missing(dtype: torch.dtype, target: Target) -> str | None:
    """Return what the halo variant lacks, sm_90, 16 bits or a Triton whose Gluon it is written for; None if nothing."""
    if target.capability != 90 or dtype.itemsize != 2:
        return f"the halo variant is for 16 bits on sm_90, not {dtype} on {target.name}"
    version = gpu.unknown_triton()
    known = " and ".join(gpu.TRITON_VERSIONS)
    return None if version is None else f"the halo variant is written for Triton {known}, not {version}"


@functools.cache
def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the halo variant may not run on a device, None where nothing is missing and it has passed its check,
    which begins when this is first asked.
    """
    reason, dtype_name = missing(dtype, gpu.target(device)), autotune.format_of(dtype, allow_tf32=False)
    failed = None if reason else self_test.check([FAMILY], dtype_name, device)[FAMILY]
    return f"the halo variant: {failed}" if failed else reason


def checked_configs() -> list[ConvConfig]:
    """Return the configs that its check runs: few, because each is a kernel to compile."""
    parts = ((32, 64, 3, 4), (32, 128, 2, 4), (16, 64, 4, 8))
    return [_config(*part) for part in parts]


def _config(tile_h: int, block_n: int, slots: int, weights: int) -> ConvConfig:
    return ConvConfig(tile_h, TILE_W, block_n, 64, 4, slots, HALO, weight_stages=weights)


def fits_halo(shape: ConvShape, dtype: torch.dtype, target: Target) -> bool:
    """Return whether a convolution fits the halo variant: whole steps of 64 channels of each input, one output."""
    whole = shape.c1 % 64 == 0 and shape.c2 % 64 == 0 and shape.c_out % 8 == 0 and shape.c_out > 32
    return target.capability == 90 and dtype.itemsize == 2 and whole and shape.c_out2 == 0


def halo_config(shape: ConvShape, target: Target) -> ConvConfig:
    """Return the halo variant's blocks, where `fits_halo`: large tiles but for a small image, and all stages that fit.
    Unmeasured.
    """
    block_n = max(64, channel_block(shape.c_out, 128))
    tiles = cdiv(shape.width, TILE_W) * cdiv(shape.height, 32) * cdiv(shape.c_out, block_n)
    tile_h, slots, weights = (32, 2, 4) if block_n == 128 else (32, 3, 4)
    if shape.c_out > 64 and tiles < target.multiprocessors:
        tile_h, block_n, slots, weights = 16, 64, 4, 8
    return _config(tile_h, block_n, slots, weights)


def shared_memory(chosen: ConvConfig) -> int:
    """Return the bytes of the halo variant: both rings, 64 channels of y and its pooled quarter on their way from each
    of two warpgroups, 16 bits each. Barriers aside.
    """
    pixels = chosen.tile_h * chosen.tile_w
    rings = chosen.num_stages * (chosen.tile_h + 2) * chosen.tile_w + chosen.weight_stages * chosen.block_n
    return 2 * (rings * chosen.block_k + 2 * 64 * (pixels + pixels // 4))
