"""A U-Net's step up as one convolution: conv3x3([skip, conv_transpose2x2(low)]) with the two weights composed.

Of the four sub-pixels of each pixel of low, every one is a sum over 3x3 pixels of skip and 2x2 pixels of low: 9*C1 +
4*Cl products, where the two steps have 9*C1 + 9*C2 + Cl, and the upsampled image is never written. A program owns one
sub-pixel of a tile of low's pixels. Through tensor descriptors alone: sm_90 and above, 16 bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastunet.kernels import gpu
from fastunet.kernels.conv3x3 import config
from fastunet.kernels.conv3x3.descriptor import (
    accumulate_boxes_by_2,
    boxes,
    load_box,
    of_parity,
    parities,
    store_box,
)
from fastunet.kernels.epilogue import Epilogue, Normalisation, finish_sums, load_channels
from fastunet.kernels.layout import empty_packed, packed, weight_matrix
from fastunet.kernels.tiles import tile_origin
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

SUBPIXELS = 4


class Composed(NamedTuple):
    """The weights of the step up, of one dtype, as the kernel reads them.

    of_skip [Cout, 9*C1], tap by tap; of_low [4*Cout, 4*Cl], by sub-pixels and taps, row by row; border [4, 3, 3, Cout]
    float32 or None: for each sub-pixel what the upsampling's bias adds everywhere, and what more it adds in two rows,
    in two columns, and where they meet: first that of low's pixels next to the border that the sub-pixel is at, then
    the one more that skip may have.
    """

    of_skip: Tensor
    of_low: Tensor
    border: Tensor | None


# fmt: off
@triton.jit
def _accumulate_low(
    acc, desc, weight_desc, C, steps, n0, image, h0, w0, down, right,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """acc [N, P] += weights @ the 2x2 taps of each pixel of the tile, those nearest to its sub-pixel."""
    tl.assume(steps > 0)
    for step in range(steps):
        tap = step % 4
        k0 = step // 4 * BLOCK_K
        x = load_box(desc, image, h0 - 1 + tap // 2 + down, w0 - 1 + tap % 2 + right, k0, TILE_H, TILE_W, BLOCK_K)
        weight = weight_desc.load([n0, tap * C + k0])
        acc = tl.dot(weight, tl.trans(x), acc)
    return acc


@triton.jit
def _of_row(ptr, n, COUT, at_near, at_last, ODD_W: tl.constexpr):
    """[N, 1, TILE_W]: what a row's three terms add in each column."""
    terms = load_channels(ptr, n, COUT, 0)[:, :, None] + load_channels(ptr + COUT, n, COUT, 0)[:, :, None] * at_near
    if ODD_W:
        terms += load_channels(ptr + 2 * COUT, n, COUT, 0)[:, :, None] * at_last
    return terms


@triton.jit
def _add_border(
    acc, ptr, n, COUT, h0, w0, H, W, down, right, ODD_H: tl.constexpr, ODD_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """acc [N, P] plus what the upsampling's bias adds to the sub-pixel (down, right) of each pixel."""
    ptr += (down * 2 + right) * (9 * COUT)
    # By rows and columns of the tile: a thread would hold both of each of its pixels.
    h = (h0 + tl.arange(0, TILE_H))[None, :, None]
    w = (w0 + tl.arange(0, TILE_W))[None, None, :]
    at_near = (w == right * (W - 1)).to(tl.float32)
    at_last = (w == W).to(tl.float32)
    acc = tl.reshape(acc, (BLOCK_N, TILE_H, TILE_W)) + _of_row(ptr, n, COUT, at_near, at_last, ODD_W)
    near_row = _of_row(ptr + 3 * COUT, n, COUT, at_near, at_last, ODD_W)
    acc += near_row * (h == down * (H - 1)).to(tl.float32)
    if ODD_H:
        last_row = _of_row(ptr + 6 * COUT, n, COUT, at_near, at_last, ODD_W)
        acc += last_row * (h == H).to(tl.float32)
    return tl.reshape(acc, (BLOCK_N, TILE_H * TILE_W))


@triton.jit(do_not_specialize=["H", "W", "steps1", "steps2"])
def conv_transpose2x2_concat_conv3x3_kernel(
    skip00_desc, skip01_desc, skip10_desc, skip11_desc, low_desc, skip_weight_desc, low_weight_desc, border_ptr,
    y00_desc, y01_desc, y10_desc, y11_desc, H, W, C1, CL, COUT, steps1, steps2,
    bias_ptr, mean_ptr, variance_ptr, gamma_ptr, eps, negative_slope, ACTIVATION: tl.constexpr,
    ODD_H: tl.constexpr, ODD_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """y = activation(norm(sums) + bias) of skip [N, 2H + ODD_H, 2W + ODD_W, C1] and low [N, H, W, CL]: y like skip, of
    COUT channels.

    Of skip and y, a descriptor is of each second row and column: 01 of those that are even and odd.
    """
    # Channel blocks and sub-pixels run fastest: programs that are neighbours in time share pixels in L2.
    blocks_n = tl.cdiv(COUT, BLOCK_N)
    n0 = tl.program_id(0) % blocks_n * BLOCK_N
    sub = tl.program_id(0) // blocks_n % 4
    down = sub // 2
    right = sub % 2
    image, h0, w0 = tile_origin(tl.program_id(0) // (4 * blocks_n), H + ODD_H, W + ODD_W, TILE_H, TILE_W)
    image = image.to(tl.int32)

    acc = tl.zeros((BLOCK_N, TILE_H * TILE_W), tl.float32)
    acc = accumulate_boxes_by_2(
        acc, skip00_desc, skip01_desc, skip10_desc, skip11_desc, skip_weight_desc, 0, 0, C1, steps1, n0, image, h0, w0,
        down, right, TILE_H, TILE_W, BLOCK_N, BLOCK_K,
    )
    # Of the last block, rows may be the next sub-pixel's: what they give is not stored.
    acc = _accumulate_low(
        acc, low_desc, low_weight_desc, CL, steps2, sub * COUT + n0, image, h0, w0, down, right, TILE_H, TILE_W,
        BLOCK_N, BLOCK_K,
    )
    n = n0 + tl.arange(0, BLOCK_N)
    if border_ptr is not None:
        acc = _add_border(
            acc, border_ptr, n, COUT, h0, w0, H, W, down, right, ODD_H, ODD_W, TILE_H, TILE_W, BLOCK_N
        )
    acc = finish_sums(
        acc, n, COUT, bias_ptr, mean_ptr, variance_ptr, gamma_ptr, eps, negative_slope, ACTIVATION, 0
    )
    y_desc = of_parity(y00_desc, y01_desc, y10_desc, y11_desc, down, right)
    store_box(y_desc, acc.to(y00_desc.dtype), image, h0, w0, n0, TILE_H, TILE_W, BLOCK_N)
# fmt: on


def arranged(of_skip: Tensor, composed: Tensor, border: Tensor | None, dtype: torch.dtype) -> Composed:
    """Return the weights as the kernel reads them, rounded to dtype.

    of_skip [Cout, C1, 3, 3]; composed [Cl, Cout, 4, 4], the weight of conv_transpose2d(low, ., stride=2, padding=1);
    border [Cout, 5, 5] or None, what that adds to images of which the first row or column is the first, the second
    stands for the inner ones, and the fourth is the last, or the one before it where the fifth is.
    """
    channels, channels_out = composed.shape[:2]
    # Sub-pixel a sees its first tap through 3 - a, and its second through 1 - a.
    subpixels = composed.flip(2, 3).view(channels, channels_out, 2, 2, 2, 2).permute(3, 5, 1, 2, 4, 0)
    of_low = subpixels.reshape(SUBPIXELS * channels_out, SUBPIXELS * channels)
    return Composed(
        weight_matrix(of_skip.to(dtype).contiguous(memory_format=torch.channels_last)),
        of_low.to(dtype),
        None if border is None else _border_terms(border.float()),
    )


def _border_terms(border: Tensor) -> Tensor:
    def with_differences(t: Tensor, of_subpixel: int) -> Tensor:
        """Along the first dimension: the inner value, how the one at the border differs, and how the one after it."""
        near, last = (t[0], t[4]) if of_subpixel == 0 else (t[3], t[1])  # Only an even place can be the one more.
        return torch.stack([t[1], near - t[1], last - t[1]])

    rows = [with_differences(border.permute(1, 2, 0), down) for down in (0, 1)]
    return torch.stack(
        [with_differences(row.transpose(0, 1), right).transpose(0, 1) for row in rows for right in (0, 1)]
    )


def conv_transpose2x2_concat_conv3x3(
    skip: Tensor,
    low: Tensor,
    weights: Composed,
    bias: Tensor | None = None,
    *,
    norm: Normalisation | None = None,
    negative_slope: float | None = None,
) -> Tensor:
    """Return activation(norm(conv2d(cat([skip, up], 1), padding=1)) + bias) of up = conv_transpose2d(low, stride=2),
    padded with zeros below and right where skip is one larger; weights `arranged`.

    skip [N, C1, 2H, 2W] or one more of either, low [N, Cl, H, W], bias [Cout] or None; 16 bits, of which the caller has
    checked `config.fits_descriptors`. Returns [N, Cout, *skip's size], channels_last. float32 sums.
    """
    channels_out = weights.of_skip.shape[0]
    y = empty_packed(skip, channels_out, *skip.shape[2:])
    if y.numel() == 0:  # A descriptor cannot describe an empty tensor.
        return y
    skip, low = packed(skip), packed(low)
    (batch, channels_low, height, width), channels = low.shape, skip.shape[1]
    odd_height, odd_width = (size % 2 for size in skip.shape[2:])
    shape = config.ConvShape(channels, channels_low, channels_out, height, width)
    target = gpu.target(skip.device)
    chosen = config.conv_config(shape, skip.dtype, target, allow_tf32=False, op=config.COMPOSED)
    block_n, block_k = chosen.block_n, chosen.block_k
    arguments: dict[str, Any] = {
        **parities("skip", skip, chosen.tile_h, chosen.tile_w, block_k),
        "low_desc": boxes(low, chosen.tile_h, chosen.tile_w, block_k),
        "skip_weight_desc": TensorDescriptor.from_tensor(weights.of_skip, [block_n, block_k]),
        "low_weight_desc": TensorDescriptor.from_tensor(weights.of_low, [block_n, block_k]),
        "border_ptr": weights.border,
        **parities("y", y, chosen.tile_h, chosen.tile_w, block_n),
        "H": height,
        "W": width,
        "C1": channels,
        "CL": channels_low,
        "COUT": channels_out,
        "steps1": 9 * (channels // block_k),
        "steps2": 4 * (channels_low // block_k),
        **Epilogue(y, bias, norm, negative_slope).arguments(),
        "ODD_H": odd_height,
        "ODD_W": odd_width,
    }
    tiles = batch * config.tiles_per_image(chosen, height + odd_height, width + odd_width)
    grid = tiles * SUBPIXELS * gpu.cdiv(channels_out, block_n)
    gpu.launch(conv_transpose2x2_concat_conv3x3_kernel, grid, arguments, chosen).run(skip.device)
    return y
