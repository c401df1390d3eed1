"""The 3x3 convolution and its gradients through tensor descriptors: the variant for sm_90 and above, in 16 bits.

The hardware copies whole boxes of pixels into shared memory and fills what lies outside the image with zeros, which is
the padding. The product is turned around, weights [N, K] by pixels [K, P], so that both operands are read from shared
memory: as first operand, a box of pixels would go through registers. Coordinates count pixels and channels one by
one, so that no offset can overflow.
"""

from __future__ import annotations

import itertools
from typing import Any

import triton
import triton.language as tl
from fastunet.kernels.conv3x3 import config, config_grad
from fastunet.kernels.epilogue import finish_sums, round_in_pairs, scale_to_e4m3, store_head, store_statistics
from fastunet.kernels.layout import weight_matrix
from fastunet.kernels.tiles import (
    CENTRE_TAP,
    activate_grad,
    joined_channels,
    nan_max,
    next_tile,
    pixel_offsets,
    pool2x2,
    strided_size,
    tile_origin,
    tile_pixels,
)
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


# fmt: off
@triton.jit
def load_box(desc, image, h, w, c, TILE_H: tl.constexpr, TILE_W: tl.constexpr, C: tl.constexpr):
    """The pixels of a tile [P, C], whose first is (h, w), from channel c on; zero outside."""
    return tl.reshape(desc.load([image, h, w, c]), (TILE_H * TILE_W, C))


@triton.jit
def accumulate_boxes(
    acc, x_desc, weight_desc, begin, first, C, steps, n0, image, h0, w0, FLIP: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """acc [N, P] += weights [N, K] @ the taps of x [K, P].

    weight_desc reads [N, 9*C], tap by tap, of which x has the channels from `first` on; the steps take x's channels
    from `begin` on. With FLIP the window is turned around. (Weights as boxes of three dimensions would be serialised by
    ptxas, or go through registers.)
    """
    tl.assume(steps > 0)  # Without it, ptxas takes the products one by one (warning C7515).
    for step in range(steps):
        tap = step % 9
        k0 = begin + step // 9 * BLOCK_K
        x = load_box(x_desc, image, h0 + tap // 3 - 1, w0 + tap % 3 - 1, k0, TILE_H, TILE_W, BLOCK_K)
        weight = weight_desc.load([n0, (8 - tap if FLIP else tap) * C + first + k0])
        # Of e4m3, sm_90 adds up a step's products in some 14 bits: `acc +=` adds them to the others' in float32. Triton
        # makes one product of it wherever the accumulator has as many bits. Its own max_num_imprecise_acc has the
        # products serialised (ptxas warning C7517).
        acc += tl.dot(weight, tl.trans(x))
    return acc


@triton.jit
def of_parity(even_even, even_odd, odd_even, odd_odd, row, column):
    """The descriptor of the rows and columns that are even and odd as these are."""
    even, odd = even_even, odd_even
    if column % 2 == 1:
        even, odd = even_odd, odd_odd
    chosen = even
    if row % 2 == 1:
        chosen = odd
    return chosen


@triton.jit
def accumulate_boxes_by_2(
    acc, x00_desc, x01_desc, x10_desc, x11_desc, weight_desc, begin, first, C, steps, n0, image, h0, w0, down, right,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """accumulate_boxes of the windows around every second pixel, (2h + down, 2w + right) for (h, w) of the tile; a
    descriptor of x is of each second row and column: 01 of those that are even and odd.
    """
    tl.assume(steps > 0)
    for step in range(steps):
        tap = step % 9
        k0 = begin + step // 9 * BLOCK_K
        # Counted from the pair before the pixel's own, so that nothing is negative.
        row = tap // 3 + 1 + down
        column = tap % 3 + 1 + right
        desc = of_parity(x00_desc, x01_desc, x10_desc, x11_desc, row, column)
        x = load_box(desc, image, h0 - 1 + row // 2, w0 - 1 + column // 2, k0, TILE_H, TILE_W, BLOCK_K)
        weight = weight_desc.load([n0, tap * C + first + k0])
        acc = tl.dot(weight, tl.trans(x), acc)
    return acc


@triton.jit
def store_box(desc, v, image, h, w, c, TILE_H: tl.constexpr, TILE_W: tl.constexpr, N: tl.constexpr):
    """Store v [N, P] as the pixels of the tile whose first is (h, w), from channel c on; nothing outside."""
    desc.store([image, h, w, c], tl.reshape(tl.trans(v), (1, TILE_H, TILE_W, N)))


@triton.jit(do_not_specialize=["H", "W", "steps1", "steps2", "tiles"])
def conv3x3_descriptor_kernel(
    x_desc, x01_desc, x10_desc, x11_desc, up_desc, up01_desc, up10_desc, up11_desc, weight_desc, y_desc, pooled_desc,
    sums_ptr, pixels, H, W, C1, C2, COUT, steps1, steps2, tiles,
    bias_ptr, mean_ptr, variance_ptr, gamma_ptr, eps, negative_slope,
    head_ptr, head_weight_ptr, head_bias_ptr, count_ptr, partial_ptr, y_scale_ptr, pooled_scale_ptr,
    ACTIVATION: tl.constexpr, CLASSES: tl.constexpr, SIGMOID: tl.constexpr, SPLITS: tl.constexpr,
    STRIDE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """As conv3x3_kernel. BLOCK_K divides C1 and C2: no step reads the weights of another tap or input. y and pooled may
    be in e4m3, divided by a scale. By stride 2 an input has four descriptors, as for accumulate_boxes_by_2.
    """
    H, W = strided_size(H, W, STRIDE)  # From here on those of y.
    blocks_n = tl.cdiv(COUT, BLOCK_N)
    block = tl.program_id(0) % blocks_n
    split = tl.program_id(0) // blocks_n % SPLITS
    tile = tl.program_id(0) // (blocks_n * SPLITS)
    n0 = block * BLOCK_N
    image, h0, w0 = tile_origin(tile, H, W, TILE_H, TILE_W)
    number = image.to(tl.int32)
    begin1 = 0
    begin2 = 0
    if SPLITS > 1:
        begin1 = split * (C1 // SPLITS)
        begin2 = split * (C2 // SPLITS)

    acc = tl.zeros((BLOCK_N, TILE_H * TILE_W), tl.float32)
    if STRIDE == 1:
        acc = accumulate_boxes(
            acc, x_desc, weight_desc, begin1, 0, C1 + C2, steps1, n0, number, h0, w0, False, TILE_H, TILE_W, BLOCK_N,
            BLOCK_K,
        )
        if up_desc is not None:
            acc = accumulate_boxes(
                acc, up_desc, weight_desc, begin2, C1, C1 + C2, steps2, n0, number, h0, w0, False, TILE_H, TILE_W,
                BLOCK_N, BLOCK_K,
            )
    else:
        acc = accumulate_boxes_by_2(
            acc, x_desc, x01_desc, x10_desc, x11_desc, weight_desc, begin1, 0, C1 + C2, steps1, n0, number, h0, w0,
            0, 0, TILE_H, TILE_W, BLOCK_N, BLOCK_K,
        )
        if up_desc is not None:
            acc = accumulate_boxes_by_2(
                acc, up_desc, up01_desc, up10_desc, up11_desc, weight_desc, begin2, C1, C1 + C2, steps2, n0, number,
                h0, w0, 0, 0, TILE_H, TILE_W, BLOCK_N, BLOCK_K,
            )

    n = n0 + tl.arange(0, BLOCK_N)
    if sums_ptr is not None:
        rows, _ = tile_pixels(h0, w0, H, W, TILE_H, TILE_W)
        at = split.to(tl.int64) * pixels + (image * H + h0) * W + w0 + pixel_offsets(W, TILE_H, TILE_W)
        tl.store(sums_ptr + at[None, :] * COUT + n[:, None], acc, mask=(rows >= 0)[None, :] & (n < COUT)[:, None])
    acc = finish_sums(
        acc, n, COUT, bias_ptr, mean_ptr, variance_ptr, gamma_ptr, eps, negative_slope, ACTIVATION, 0
    )
    if y_desc is not None:
        y = acc
        if y_scale_ptr is not None:
            y = scale_to_e4m3(y, y_scale_ptr)
        y = round_in_pairs(y, y_desc.dtype) if partial_ptr is not None else y.to(y_desc.dtype)
        store_box(y_desc, y, number, h0, w0, n0, TILE_H, TILE_W, BLOCK_N)
        if partial_ptr is not None:
            rows, _ = tile_pixels(h0, w0, H, W, TILE_H, TILE_W)
            is_whole = (h0 + TILE_H <= H) & (w0 + TILE_W <= W)
            store_statistics(count_ptr, partial_ptr, y, tile, tiles, n, COUT, rows >= 0, is_whole, block == 0, 0)
    if head_ptr is not None:
        rows, _ = tile_pixels(h0, w0, H, W, TILE_H, TILE_W)
        pixels = (image * H + h0) * W + w0 + pixel_offsets(W, TILE_H, TILE_W)
        store_head(head_ptr, head_weight_ptr, head_bias_ptr, acc, n, COUT, pixels, rows >= 0, CLASSES, SIGMOID, 0)
    if pooled_desc is not None:
        pooled = pool2x2(acc, TILE_H, TILE_W, BLOCK_N, 0)
        if pooled_scale_ptr is not None:
            pooled = scale_to_e4m3(pooled, pooled_scale_ptr)
        pooled = pooled.to(pooled_desc.dtype)
        store_box(pooled_desc, pooled, number, h0 // 2, w0 // 2, n0, TILE_H // 2, TILE_W // 2, BLOCK_N)


@triton.jit(do_not_specialize=["H", "W", "steps"])
def conv3x3_input_grad_descriptor_kernel(
    grad_desc, weight_desc, x_desc, out_desc, out_up_desc, out_ptr, out_up_ptr, H, W, C1, C2, COUT, steps,
    negative_slope, ACTIVATION: tl.constexpr, JOINED: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """As conv3x3_input_grad_kernel. weight_desc reads [C1 + C2, 9*COUT]; rows beyond an input's are not stored. JOINED
    channels, which no box holds, go through out_ptr and out_up_ptr.
    """
    blocks1 = tl.cdiv(C1, BLOCK_N)
    blocks = blocks1 if out_up_desc is None or JOINED else blocks1 + tl.cdiv(C2, BLOCK_N)
    block = tl.program_id(0) % blocks
    is_first = block < blocks1
    n0 = tl.where(is_first, block, block - blocks1) * BLOCK_N
    image, h0, w0 = tile_origin(tl.program_id(0) // blocks, H, W, TILE_H, TILE_W)
    pixels = (image * H + h0) * W + w0 + pixel_offsets(W, TILE_H, TILE_W)
    image = image.to(tl.int32)
    acc = tl.zeros((BLOCK_N, TILE_H * TILE_W), tl.float32)
    acc = accumulate_boxes(
        acc, grad_desc, weight_desc, 0, 0, COUT, steps, tl.where(is_first, 0, C1) + n0, image, h0, w0, True,
        TILE_H, TILE_W, BLOCK_N, BLOCK_K,
    )
    if x_desc is not None:
        x = tl.trans(load_box(x_desc, image, h0, w0, n0, TILE_H, TILE_W, BLOCK_N))
        acc = activate_grad(acc, x.to(tl.float32), negative_slope, ACTIVATION)
    grad = acc.to(grad_desc.dtype)
    if JOINED:
        rows, _ = tile_pixels(h0, w0, H, W, TILE_H, TILE_W)
        pointers = joined_channels(out_ptr, out_up_ptr, BLOCK_N) + (pixels * (BLOCK_N // 2))[:, None]
        tl.store(pointers, tl.trans(grad), mask=(rows >= 0)[:, None])
    elif out_up_desc is None:
        store_box(out_desc, grad, image, h0, w0, n0, TILE_H, TILE_W, BLOCK_N)
    else:
        if is_first:
            store_box(out_desc, grad, image, h0, w0, n0, TILE_H, TILE_W, BLOCK_N)
        else:
            store_box(out_up_desc, grad, image, h0, w0, n0, TILE_H, TILE_W, BLOCK_N)


@triton.jit
def _sum_tiles(
    grad_desc, x_desc, first, last, row, column, o0, i0, HO, WO, WITH_BIAS: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):
    """Over the pixels of tiles first to last: sum of grad[p, o] * x[p moved by (row, column), i] [O, I], and of grad.

    A tile's pixels lie one after the other in memory, and grad_desc reads them as the rows of a matrix: as a box of
    more than one row of pixels, the first operand would go through registers. The sums of grad are a product too, with
    the least columns there can be: added up in registers, they would take as many as acc.
    """
    acc = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    totals = tl.zeros((BLOCK_OUT, 16), tl.float32)
    ones = tl.full((TILE_H * TILE_W, 16), 1.0, tl.float32).to(grad_desc.dtype)
    tl.assume(last > first)
    image, h0, w0 = tile_origin(first, HO, WO, TILE_H, TILE_W)
    image = image.to(tl.int32)
    for tile in range(first, last):
        g = grad_desc.load([tile * (TILE_H * TILE_W), o0])
        x = load_box(x_desc, image, h0 + row, w0 + column, i0, TILE_H, TILE_W, BLOCK_IN)
        acc = tl.dot(tl.trans(g), x, acc)
        if WITH_BIAS:
            totals = tl.dot(tl.trans(g), ones, totals)
        image, h0, w0 = next_tile(image, h0, w0, HO, WO, TILE_H, TILE_W)
    return acc, tl.reduce(totals, 1, nan_max)  # They are equal.


@triton.jit(do_not_specialize=["tiles", "tiles_per_split", "H", "W"])
def conv3x3_weight_grad_descriptor_kernel(
    grad_desc, x_desc, x01_desc, x10_desc, x11_desc, partial_ptr, tiles, tiles_per_split, H, W, C, COUT,
    WITH_BIAS: tl.constexpr, STRIDE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):
    """As conv3x3_weight_grad_kernel, for grads of whole tiles of neighbours in memory. By stride 2 x has four
    descriptors, as for accumulate_boxes_by_2.
    """
    HO, WO = strided_size(H, W, STRIDE)
    blocks_o = tl.cdiv(COUT, BLOCK_OUT)
    blocks_i = tl.cdiv(C, BLOCK_IN)
    pid = tl.program_id(0)
    o0 = pid % blocks_o * BLOCK_OUT
    i0 = pid // blocks_o % blocks_i * BLOCK_IN
    tap = pid // (blocks_o * blocks_i) % 9
    split = pid // (blocks_o * blocks_i * 9)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    partial_ptr += split.to(tl.int64) * (COUT * (9 * C + 1 if WITH_BIAS else 9 * C))
    o = o0 + tl.arange(0, BLOCK_OUT)
    i = i0 + tl.arange(0, BLOCK_IN)
    row = tap // 3 - 1
    column = tap % 3 - 1
    if STRIDE == 2:
        x_desc = of_parity(x_desc, x01_desc, x10_desc, x11_desc, row + 2, column + 2)
        row = (row + 2) // 2 - 1
        column = (column + 2) // 2 - 1

    if WITH_BIAS and (i0 == 0) & (tap == CENTRE_TAP):
        acc, total = _sum_tiles(
            grad_desc, x_desc, first, last, row, column, o0, i0, HO, WO, True, TILE_H, TILE_W, BLOCK_OUT, BLOCK_IN
        )
        tl.store(partial_ptr + COUT * 9 * C + o, total, mask=o < COUT)
    else:
        acc, _ = _sum_tiles(
            grad_desc, x_desc, first, last, row, column, o0, i0, HO, WO, False, TILE_H, TILE_W, BLOCK_OUT, BLOCK_IN
        )
    pointers = partial_ptr + (o * 9 * C)[:, None] + (tap * C + i)[None, :]
    tl.store(pointers, acc, mask=(o < COUT)[:, None] & (i < C)[None, :])
# fmt: on


def boxes(x: Tensor | None, tile_h: int, tile_w: int, channels: int) -> TensorDescriptor | None:
    """Return packed x [N, C, H, W] in boxes of pixels by channels; None where it is None."""
    if x is None:
        return None
    n, c, h, w = x.shape
    # Spelled out: where a size is 1, a packed tensor may have any stride.
    return TensorDescriptor(x, [n, h, w, c], [h * w * c, w * c, c, 1], [1, tile_h, tile_w, channels])


def parities(name: str, x: Tensor, tile_h: int, tile_w: int, channels: int) -> dict[str, TensorDescriptor]:
    """Return packed x [N, C, H, W] as four images, of each second row and column, in such boxes: name00_desc of the
    even ones, name01_desc of even rows and odd columns, and so on.
    """
    _, c, h, w = x.shape
    found = {}
    for row, column in itertools.product((0, 1), repeat=2):
        pixels, strides = x.permute(0, 2, 3, 1)[:, row::2, column::2], [h * w * c, 2 * w * c, 2 * c, 1]
        if pixels.numel() == 0:  # A side of one pixel has no odd one, and a descriptor cannot describe nothing.
            pixels = x.new_zeros([max(size, 1) for size in pixels.shape])
            strides = list(pixels.stride())
        box = [1, tile_h, tile_w, channels]
        found[f"{name}{row}{column}_desc"] = TensorDescriptor(pixels, list(pixels.shape), strides, box)
    return found


def by_stride(stride: int, name: str, x: Tensor | None, tile_h: int, tile_w: int, channels: int) -> dict[str, Any]:
    """Return the descriptors by which a kernel knows packed x: its boxes, and by stride 2 its `parities`."""
    if stride == 1 or x is None:
        found: dict[str, Any] = {f"{name}00_desc": boxes(x, tile_h, tile_w, channels)}
        found |= {f"{name}{other}_desc": None for other in ("01", "10", "11")}
    else:
        found = dict(parities(name, x, tile_h, tile_w, channels))
    return {f"{name}_desc": found.pop(f"{name}00_desc"), **found}


def operands(
    x: Tensor, up: Tensor | None, weight: Tensor, chosen: config.ConvConfig, stride: int = 1
) -> dict[str, Any]:
    """Return what a convolution reads: its inputs, and the weight as a matrix [Cout, 9*C], tap by tap."""
    pixels = chosen.tile_h, chosen.tile_w, chosen.block_k
    return {
        **by_stride(stride, "x", x, *pixels),
        **by_stride(stride, "up", up, *pixels),
        "weight_desc": TensorDescriptor.from_tensor(weight_matrix(weight), [chosen.block_n, chosen.block_k]),
    }


def input_grad_operands(
    grad: Tensor,
    weight: Tensor,
    outs: tuple[Tensor, Tensor | None],
    x: Tensor | None,
    chosen: config.ConvConfig,
    stride: int = 1,
) -> dict[str, Any]:
    """Return what the input gradient reads, and fills in boxes."""
    read = operands(grad, None, weight.transpose(0, 1), chosen)
    pixels = chosen.tile_h, chosen.tile_w, chosen.block_n
    return {
        "grad_desc": read["x_desc"],
        "weight_desc": read["weight_desc"],
        "x_desc": boxes(x, *pixels),
        **by_stride(stride, "out", outs[0], *pixels),
        **by_stride(stride, "out_up", outs[1], *pixels),
    }


def weight_grad_operands(
    grad: Tensor, x: Tensor, chosen: config_grad.WeightGradConfig, stride: int = 1
) -> dict[str, Any]:
    """Return what the weight gradient reads."""
    n, c, h, w = grad.shape
    pixels = chosen.tile_h * chosen.tile_w
    return {
        "grad_desc": TensorDescriptor(grad, [n * h * w, c], [c, 1], [pixels, chosen.block_out]),
        **by_stride(stride, "x", x, chosen.tile_h, chosen.tile_w, chosen.block_in),
    }
