"""The 3x3 convolution with its input channels split among programs, for a batch of one image on a deep level, whose
tiles are too few for the GPU. Each program leaves its sums in float32; a second kernel adds them, in a fixed order, and
does what the other variants do in their epilogue. No atomics: the bits are the same at every run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from fastunet.kernels import gpu
from fastunet.kernels.conv3x3 import config, descriptor, pointer
from fastunet.kernels.conv3x3.descriptor import accumulate_boxes
from fastunet.kernels.conv3x3.pointer import accumulate, store_outputs
from fastunet.kernels.epilogue import Epilogue, finish_sums
from fastunet.kernels.tiles import pixel_offsets, tile_origin, tile_pixels
from torch import Tensor

# Pixels and channels of the adding kernel's tiles: a few values to a thread. Unmeasured.
_FINISH_H, _FINISH_N, _FINISH_WARPS = 4, 64, 4


# fmt: off
@triton.jit
def locate(H, W, COUT, SPLITS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's image (int64), first row, column and channel, and split. Channel blocks run fastest, then splits:
    neighbours in time share pixels in L2.
    """
    blocks_n = tl.cdiv(COUT, BLOCK_N)
    block = tl.program_id(0) % blocks_n
    split = tl.program_id(0) // blocks_n % SPLITS
    image, h0, w0 = tile_origin(tl.program_id(0) // (blocks_n * SPLITS), H, W, TILE_H, TILE_W)
    return image, h0, w0, block * BLOCK_N, split


@triton.jit(do_not_specialize=["H", "W", "steps1", "steps2"])
def conv3x3_split_kernel(
    x_ptr, up_ptr, weight_ptr, sums_ptr, pixels, H, W, C1, C2, COUT, steps1, steps2, stride_out, stride_tap, stride_in,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """sums[s, p, o] = the part of conv3x3_kernel's v[p, o] of the channels of split s: the s-th of equal parts of each
    input. sums [SPLITS, pixels, COUT] float32; steps1 and steps2 are those of one split.
    """
    image, h0, w0, n0, split = locate(H, W, COUT, SPLITS, TILE_H, TILE_W, BLOCK_N)
    n = n0 + tl.arange(0, BLOCK_N)
    rows, columns = tile_pixels(h0, w0, H, W, TILE_H, TILE_W)
    origin = (image * H + h0) * W + w0
    offsets = pixel_offsets(W, TILE_H, TILE_W)
    first = tl.multiple_of(split * (C1 // SPLITS), 16)  # Of whole blocks of channels.
    acc = tl.zeros((TILE_H * TILE_W, BLOCK_N), tl.float32)
    acc = accumulate(
        acc, x_ptr + first, weight_ptr, first, steps1, n, rows, columns, origin, offsets, H, W, C1, COUT,
        stride_out, stride_tap, stride_in, False, PRECISION, BLOCK_K,
    )
    if up_ptr is not None:
        first = tl.multiple_of(split * (C2 // SPLITS), 16)
        acc = accumulate(
            acc, up_ptr + first, weight_ptr, C1 + first, steps2, n, rows, columns, origin, offsets, H, W, C2, COUT,
            stride_out, stride_tap, stride_in, False, PRECISION, BLOCK_K,
        )
    pointers = sums_ptr + (split.to(tl.int64) * pixels + origin + offsets)[:, None] * COUT + n[None, :]
    tl.store(pointers, acc, mask=(rows >= 0)[:, None] & (n < COUT)[None, :])


@triton.jit(do_not_specialize=["H", "W", "steps1", "steps2"])
def conv3x3_split_descriptor_kernel(
    x_desc, up_desc, weight_desc, sums_ptr, pixels, H, W, C1, C2, COUT, steps1, steps2, SPLITS: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """As conv3x3_split_kernel."""
    image, h0, w0, n0, split = locate(H, W, COUT, SPLITS, TILE_H, TILE_W, BLOCK_N)
    number = image.to(tl.int32)
    acc = tl.zeros((BLOCK_N, TILE_H * TILE_W), tl.float32)
    acc = accumulate_boxes(
        acc, x_desc, weight_desc, split * (C1 // SPLITS), 0, C1 + C2, steps1, n0, number, h0, w0, False,
        TILE_H, TILE_W, BLOCK_N, BLOCK_K,
    )
    if up_desc is not None:
        acc = accumulate_boxes(
            acc, up_desc, weight_desc, split * (C2 // SPLITS), C1, C1 + C2, steps2, n0, number, h0, w0, False,
            TILE_H, TILE_W, BLOCK_N, BLOCK_K,
        )
    n = n0 + tl.arange(0, BLOCK_N)
    rows, _ = tile_pixels(h0, w0, H, W, TILE_H, TILE_W)
    at = split.to(tl.int64) * pixels + (image * H + h0) * W + w0 + pixel_offsets(W, TILE_H, TILE_W)
    tl.store(sums_ptr + at[None, :] * COUT + n[:, None], acc, mask=(rows >= 0)[None, :] & (n < COUT)[:, None])


@triton.jit(do_not_specialize=["H", "W", "tiles"])
def conv3x3_finish_kernel(
    sums_ptr, y_ptr, pooled_ptr, stride, H, W, COUT, tiles,
    bias_ptr, mean_ptr, variance_ptr, gamma_ptr, eps, negative_slope,
    head_ptr, head_weight_ptr, head_bias_ptr, count_ptr, partial_ptr,
    ACTIVATION: tl.constexpr, CLASSES: tl.constexpr, SIGMOID: tl.constexpr, SPLITS: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """v = the sum over s of sums[s], first split first; then as conv3x3_kernel. stride: from one s to the next."""
    image, h0, w0, n0, _ = locate(H, W, COUT, 1, TILE_H, TILE_W, BLOCK_N)
    n = n0 + tl.arange(0, BLOCK_N)
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
    tile = tl.program_id(0) // tl.cdiv(COUT, BLOCK_N)
    store_outputs(
        acc, y_ptr, None, pooled_ptr, head_ptr, head_weight_ptr, head_bias_ptr, count_ptr, partial_ptr, image, h0, w0,
        tile, tiles, n, n0 == 0, H, W, COUT, rows, origin, offsets, CLASSES, SIGMOID, TILE_H, TILE_W, BLOCK_N,
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
    arguments = {**config.sizes(x, up, weight, chosen), "sums_ptr": sums, "pixels": pixels, "SPLITS": chosen.splits}
    if chosen.variant == config.DESCRIPTOR:
        kernel, operands = conv3x3_split_descriptor_kernel, descriptor.operands(x, up, weight, chosen)
    else:
        kernel, operands = conv3x3_split_kernel, pointer.operands(x, up, weight, allow_tf32)
    programs = batch * config.tiles_per_image(chosen, height, width) * gpu.cdiv(channels, chosen.block_n)
    return [
        gpu.launch(kernel, chosen.splits * programs, arguments | operands, chosen),
        _finish_launch(arguments, batch, chosen, epilogue),
    ]


def _finish_launch(arguments: dict[str, Any], batch: int, chosen: config.ConvConfig, epilogue: Epilogue) -> gpu.Launch:
    channels = arguments["COUT"]
    # Statistics are by tiles that the caller has counted, and a head wants all channels in one program.
    tile_h = _FINISH_H if epilogue.statistics is None else chosen.tile_h
    block_n = _FINISH_N if epilogue.head is None else config.cover(channels, 32, 128)
    options = {"num_warps": _FINISH_WARPS, "num_stages": 1, "max_registers": config.ALL_REGISTERS}
    chosen = replace(chosen, tile_h=tile_h, block_n=block_n, **options)
    tiles = batch * config.tiles_per_image(chosen, arguments["H"], arguments["W"])
    # Not in the kernel: the product may need 64 bits where its factors do not.
    stride = arguments["pixels"] * channels
    arguments = {**arguments, **epilogue.arguments(), "stride": stride, "tiles": tiles}
    launch = gpu.launch(conv3x3_finish_kernel, tiles * gpu.cdiv(channels, block_n), arguments, chosen)
    return replace(launch, product_rows=0)  # It only adds.
