"""The 3x3 convolution with its input channels split among programs, for a batch of one image on a deep level, whose
tiles are too few for the GPU. Each program leaves its sums in float32; the kernel here adds them, in a fixed order, and
does what the others do in their epilogue. No atomics: the bits are the same at every run.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from fastunet.kernels import gpu
from fastunet.kernels.conv3x3 import config
from fastunet.kernels.conv3x3.pointer import conv3x3_launch, store_outputs
from fastunet.kernels.epilogue import Epilogue, finish_sums
from fastunet.kernels.tiles import pixel_offsets, tile_origin, tile_pixels
from torch import Tensor

# Pixels and channels of the adding kernel's tiles: a few values to a thread. Unmeasured.
_FINISH_H, _FINISH_N, _FINISH_WARPS = 4, 64, 4


# fmt: off
@triton.jit(do_not_specialize=["H", "W", "tiles"])
def conv3x3_finish_kernel(
    sums_ptr, y_ptr, pooled_ptr, stride, H, W, COUT, tiles,
    bias_ptr, mean_ptr, variance_ptr, gamma_ptr, eps, negative_slope,
    head_ptr, head_weight_ptr, head_bias_ptr, count_ptr, partial_ptr,
    ACTIVATION: tl.constexpr, CLASSES: tl.constexpr, SIGMOID: tl.constexpr, SPLITS: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """v = the sum over s of sums[s], first split first; then as conv3x3_kernel. stride: from one s to the next."""
    blocks_n = tl.cdiv(COUT, BLOCK_N)
    block = tl.program_id(0) % blocks_n
    tile = tl.program_id(0) // blocks_n
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    image, h0, w0 = tile_origin(tile, H, W, TILE_H, TILE_W)
    rows, _ = tile_pixels(h0, w0, H, W, TILE_H, TILE_W)
    origin = (image * H + h0) * W + w0
    offsets = pixel_offsets(W, TILE_H, TILE_W)
    pointers = sums_ptr + (origin + offsets)[:, None] * COUT + n[None, :]
    mask = (rows >= 0)[:, None] & (n < COUT)[None, :]
    acc = tl.zeros((TILE_H * TILE_W, BLOCK_N), tl.float32)
    for _ in tl.static_range(SPLITS):
        acc += tl.load(pointers, mask=mask, other=0.0)
        pointers += stride
    acc = finish_sums(
        acc, n, COUT, bias_ptr, mean_ptr, variance_ptr, gamma_ptr, eps, negative_slope, ACTIVATION, 1
    )
    store_outputs(
        acc, y_ptr, None, pooled_ptr, head_ptr, head_weight_ptr, head_bias_ptr, count_ptr, partial_ptr, image, h0, w0,
        tile, tiles, n, block == 0, H, W, COUT, rows, origin, offsets, CLASSES, SIGMOID, TILE_H, TILE_W, BLOCK_N,
    )
# fmt: on


def launches(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    chosen: config.ConvConfig,
    epilogue: Epilogue,
    *,
    allow_tf32: bool,
) -> list[gpu.Launch]:
    """Return those that fill the epilogue's outputs from packed x and up: the sums of each split, then what comes of
    them.

    ValueError where a split would have a part of a block of channels.
    """
    batch, c1, height, width = x.shape
    step = chosen.splits * chosen.block_k
    if c1 % step or (0 if up is None else up.shape[1]) % step:
        raise ValueError(f"{chosen.splits} splits of blocks of {chosen.block_k} channels: expected multiples of {step}")
    pixels, channels = batch * height * width, weight.shape[0]
    sums = torch.empty((chosen.splits, pixels, channels), dtype=torch.float32, device=x.device)
    first = conv3x3_launch(x, up, weight, chosen, Epilogue(None), allow_tf32=allow_tf32, sums=sums)
    # Statistics are by tiles that the caller has counted, and a head wants all channels in one program.
    tile_h = _FINISH_H if epilogue.statistics is None else chosen.tile_h
    block_n = _FINISH_N if epilogue.head is None else config.cover(channels, 32, 128)
    options = {"num_warps": _FINISH_WARPS, "num_stages": 1, "max_registers": config.ALL_REGISTERS}
    finish = replace(chosen, tile_h=tile_h, block_n=block_n, **options)
    tiles = batch * config.tiles_per_image(finish, height, width)
    arguments = {
        **epilogue.arguments(),
        "sums_ptr": sums,
        "stride": pixels * channels,  # Not in the kernel: the product may need 64 bits where its factors do not.
        "H": height,
        "W": width,
        "COUT": channels,
        "tiles": tiles,
        "SPLITS": chosen.splits,
    }
    return [first, gpu.launch(conv3x3_finish_kernel, tiles * gpu.cdiv(channels, block_n), arguments, finish)]
