"""Gradients of the 3x3 convolution: through activation and pooling, of the input, of the weight and the bias.

The input gradient is the convolution itself, with the window turned around and the channels swapped. The weight
gradient splits the pixels into parts, sums each on its own in float32 and adds the parts in a fixed order: no atomics,
so the same inputs give the same bits on every run.
"""

# Of a kernel's parameters only the constexprs carry an annotation.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastunet.kernels import config, gpu
from fastunet.kernels.conv3x3 import activation_code, conv3x3_launch, empty_packed, packed, precision
from fastunet.kernels.reduction import sum_rows_launch
from fastunet.kernels.tiles import (
    activate_grad,
    load_folded_taps,
    load_pixels,
    load_tap,
    pixel_offsets,
    tile_origin,
    tile_pixels,
)
from torch import Tensor

_CENTRE_TAP = tl.constexpr(4)


# fmt: off
@triton.jit
def _load_pixel(y_ptr, h, w, first, c, mask, H, W, C):
    """y at rows h, columns w [P] and channels c [K]: offsets, mask and float32 values [P, K], zero where masked.

    first: index of the image's first row among the rows of all images [P].
    """
    mask = mask & ((h < H) & (w < W))[:, None]
    offsets = ((first + h) * W + w)[:, None] * C + c[None, :]
    return offsets, mask, tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _takes_over(v, best):
    """Whether v becomes the maximum after best, by torch's rule: the first of equals wins, and the last of NaNs."""
    return (v > best) | (v != v)


@triton.jit
def _store_grad(out_ptr, grad_y_ptr, offsets, mask, y, routed, negative_slope, ACTIVATION: tl.constexpr):
    """Add the direct gradient to the one routed through the pool, carry both through the activation, store."""
    if grad_y_ptr is not None:
        routed += tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    g = activate_grad(routed, y, negative_slope, ACTIVATION)
    tl.store(out_ptr + offsets, g.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["windows", "H", "W"])
def conv3x3_activation_grad_kernel(
    y_ptr, grad_y_ptr, grad_pooled_ptr, out_ptr, windows, H, W, C, negative_slope,
    ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """out = activation'(y) * (grad_y + unpool(grad_pooled)), all packed NHWC; a gradient that is None counts as zero.

    A program owns BLOCK_P windows of 2x2 pixels and BLOCK_C channels. Windows cover odd edges too: there, pixels of
    windows that are not whole receive nothing from the pool.
    """
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    window = (tl.program_id(0) // blocks_c).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    windows_w = (W + 1) // 2
    windows_h = (H + 1) // 2
    w = window % windows_w * 2
    h = window // windows_w % windows_h * 2
    image = window // (windows_w * windows_h)
    mask = (window < windows)[:, None] & (c < C)[None, :]

    at0, mask0, y0 = _load_pixel(y_ptr, h, w, image * H, c, mask, H, W, C)
    at1, mask1, y1 = _load_pixel(y_ptr, h, w + 1, image * H, c, mask, H, W, C)
    at2, mask2, y2 = _load_pixel(y_ptr, h + 1, w, image * H, c, mask, H, W, C)
    at3, mask3, y3 = _load_pixel(y_ptr, h + 1, w + 1, image * H, c, mask, H, W, C)

    routed = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if grad_pooled_ptr is not None:
        # Only a whole window has its fourth pixel inside the image.
        pooled_at = ((image * (H // 2) + h // 2) * (W // 2) + w // 2)[:, None] * C + c[None, :]
        routed = tl.load(grad_pooled_ptr + pooled_at, mask=mask3, other=0.0).to(tl.float32)
    best = y0
    winner = tl.zeros((BLOCK_P, BLOCK_C), tl.int32)
    winner = tl.where(_takes_over(y1, best), 1, winner)
    best = tl.where(_takes_over(y1, best), y1, best)
    winner = tl.where(_takes_over(y2, best), 2, winner)
    best = tl.where(_takes_over(y2, best), y2, best)
    winner = tl.where(_takes_over(y3, best), 3, winner)

    _store_grad(out_ptr, grad_y_ptr, at0, mask0, y0, tl.where(winner == 0, routed, 0.0), negative_slope, ACTIVATION)
    _store_grad(out_ptr, grad_y_ptr, at1, mask1, y1, tl.where(winner == 1, routed, 0.0), negative_slope, ACTIVATION)
    _store_grad(out_ptr, grad_y_ptr, at2, mask2, y2, tl.where(winner == 2, routed, 0.0), negative_slope, ACTIVATION)
    _store_grad(out_ptr, grad_y_ptr, at3, mask3, y3, tl.where(winner == 3, routed, 0.0), negative_slope, ACTIVATION)


@triton.jit
def _sum_tiles(
    grad_ptr, x_ptr, first, last, tap, o, i, H, W, C, COUT, WITH_BIAS: tl.constexpr, FOLDED: tl.constexpr,
    PRECISION: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):
    """Over the pixels of tiles first to last: sum of grad[p, o] * x[p moved by tap, i] [O, I], and sum of grad [O]."""
    acc = tl.zeros((o.shape[0], i.shape[0]), tl.float32)
    totals = tl.zeros((TILE_H * TILE_W, o.shape[0]), tl.float32)
    offsets = pixel_offsets(W, TILE_H, TILE_W)
    for tile in range(first, last):
        image, h0, w0 = tile_origin(tile, H, W, TILE_H, TILE_W)
        rows, columns = tile_pixels(h0, w0, H, W, TILE_H, TILE_W)
        origin = (image * H + h0) * W + w0
        g = load_pixels(grad_ptr, o, rows, origin, offsets, COUT)
        if FOLDED:
            x = load_folded_taps(x_ptr, i, rows, columns, origin, offsets, H, W, C)
        else:
            x = load_tap(x_ptr, tap, i, rows, columns, origin, offsets, H, W, C)
        acc = tl.dot(tl.trans(g), x, acc, input_precision=PRECISION)
        if WITH_BIAS:
            totals += g.to(tl.float32)
    return acc, tl.sum(totals, 0)


@triton.jit(do_not_specialize=["tiles", "tiles_per_split", "H", "W"])
def conv3x3_weight_grad_kernel(
    grad_ptr, x_ptr, partial_ptr, tiles, tiles_per_split, H, W, C, COUT,
    WITH_BIAS: tl.constexpr, FOLDED: tl.constexpr, PRECISION: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):
    """partial[s, o, t, i] = sum over the pixels p of split s of grad[p, o] * x[p moved by t, i].

    grad [N, H, W, COUT], x [N, H, W, C]; partial float32 [splits, COUT*9*C + COUT], whose last COUT values are the
    sums of grad, the bias gradient (without WITH_BIAS they are absent). One program owns a split, a tap (all nine
    where FOLDED), BLOCK_OUT output and BLOCK_IN input channels; the programs of a split are neighbours in time.
    """
    blocks_o = tl.cdiv(COUT, BLOCK_OUT)
    blocks_i = 1 if FOLDED else tl.cdiv(C, BLOCK_IN)
    taps = 1 if FOLDED else 9
    pid = tl.program_id(0)
    o = pid % blocks_o * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i0 = pid // blocks_o % blocks_i * BLOCK_IN
    i = i0 + tl.arange(0, BLOCK_IN)
    tap = pid // (blocks_o * blocks_i) % taps
    split = pid // (blocks_o * blocks_i * taps)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    partial_ptr += split.to(tl.int64) * (COUT * (9 * C + 1 if WITH_BIAS else 9 * C))

    # The sums of grad are taken by one program of each split and output block, in a loop of its own.
    sums_bias = (i0 == 0) & (tap == (0 if FOLDED else _CENTRE_TAP))
    if WITH_BIAS and sums_bias:
        acc, total = _sum_tiles(
            grad_ptr, x_ptr, first, last, tap, o, i, H, W, C, COUT, True, FOLDED, PRECISION, TILE_H, TILE_W
        )
        tl.store(partial_ptr + COUT * 9 * C + o, total, mask=o < COUT)
    else:
        acc, _ = _sum_tiles(
            grad_ptr, x_ptr, first, last, tap, o, i, H, W, C, COUT, False, FOLDED, PRECISION, TILE_H, TILE_W
        )
    columns = 9 * C if FOLDED else C
    pointers = partial_ptr + (o * 9 * C)[:, None] + (tap * C + i)[None, :]
    tl.store(pointers, acc, mask=(o < COUT)[:, None] & (i < columns)[None, :])
# fmt: on


def activation_grad_launch(
    y: Tensor, grad_y: Tensor | None, grad_pooled: Tensor | None, out: Tensor, negative_slope: float | None
) -> gpu.Launch:
    """The launch that fills out from packed tensors: see conv3x3_activation_grad."""
    batch, channels, height, width = y.shape
    chosen = config.pointwise_config(channels)
    windows = batch * triton.cdiv(height, 2) * triton.cdiv(width, 2)
    arguments = {
        "y_ptr": y,
        "grad_y_ptr": grad_y,
        "grad_pooled_ptr": grad_pooled,
        "out_ptr": out,
        "windows": windows,
        "H": height,
        "W": width,
        "C": channels,
        "negative_slope": float(negative_slope or 0),
        "ACTIVATION": activation_code(negative_slope),
        "BLOCK_P": chosen.block_windows,
        "BLOCK_C": chosen.block_channels,
    }
    grid = triton.cdiv(windows, chosen.block_windows) * triton.cdiv(channels, chosen.block_channels)
    return gpu.Launch(conv3x3_activation_grad_kernel, grid, arguments, chosen.num_warps, num_stages=1)


def conv3x3_activation_grad(
    y: Tensor, grad_y: Tensor | None, grad_pooled: Tensor | None, negative_slope: float | None
) -> Tensor:
    """The gradient of conv3x3's sum before its activation, in one pass over y [N, C, H, W].

    grad_y [N, C, H, W] and grad_pooled [N, C, H // 2, W // 2] are the gradients of conv3x3's two outputs, None for
    zero but not both. A window's gradient goes to its maximum, by torch's rule to the first of equals and to the last
    NaN; the activation's slope follows from y's sign. Returns a channels_last tensor of y's dtype.
    """
    out = empty_packed(y, *y.shape[1:])
    grad_y = None if grad_y is None else packed(grad_y)
    grad_pooled = None if grad_pooled is None else packed(grad_pooled)
    activation_grad_launch(packed(y), grad_y, grad_pooled, out, negative_slope).run(y.device)
    return out


def conv3x3_input_grad(grad: Tensor, weight: Tensor, *, allow_tf32: bool = False) -> Tensor:
    """The gradient of conv3x3's input [N, C, H, W] from its sum's, grad [N, Cout, H, W], and weight [Cout, C, 3, 3].

    Of two inputs' gradients, each is a call with its slice of the weight's input channels. Returns a channels_last
    tensor of grad's dtype.
    """
    out = empty_packed(grad, weight.shape[1], *grad.shape[2:])
    launch = conv3x3_launch(
        packed(grad),
        None,
        weight,
        None,
        out,
        None,
        negative_slope=None,
        input_grad=True,
        allow_tf32=allow_tf32,
        target=gpu.target(grad.device),
    )
    launch.run(grad.device)
    return out


def weight_grad_launches(
    grad: Tensor,
    x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    *,
    allow_tf32: bool,
    target: gpu.Target,
) -> tuple[gpu.Launch, gpu.Launch]:
    """The two launches that fill grad_weight (channels_last) and grad_bias: partial sums, then the sum of those."""
    batch, channels, height, width = x.shape
    channels_out = grad.shape[1]
    chosen = config.weight_grad_config(channels, channels_out, x.dtype, target, allow_tf32=allow_tf32)
    programs = config.weight_grad_programs(chosen, channels, channels_out)
    tiles = batch * triton.cdiv(height, chosen.tile_h) * triton.cdiv(width, chosen.tile_w)
    per_split = triton.cdiv(tiles, config.weight_grad_splits(programs, tiles, target))
    splits = triton.cdiv(tiles, per_split)
    weights = channels_out * 9 * channels
    total = weights + (0 if grad_bias is None else channels_out)
    partial = torch.empty((splits, total), dtype=torch.float32, device=x.device)
    sums = {
        "grad_ptr": grad,
        "x_ptr": x,
        "partial_ptr": partial,
        "tiles": tiles,
        "tiles_per_split": per_split,
        "H": height,
        "W": width,
        "C": channels,
        "COUT": channels_out,
        "WITH_BIAS": grad_bias is not None,
        "FOLDED": chosen.folded,
        "PRECISION": precision(x.dtype, allow_tf32),
        "TILE_H": chosen.tile_h,
        "TILE_W": chosen.tile_w,
        "BLOCK_OUT": chosen.block_out,
        "BLOCK_IN": chosen.block_in,
    }
    partial_sums = gpu.Launch(
        conv3x3_weight_grad_kernel,
        programs * splits,
        sums,
        chosen.num_warps,
        chosen.num_stages,
        chosen.max_registers,
        product_rows=chosen.block_out,
    )
    return partial_sums, sum_rows_launch(partial, grad_weight, grad_bias)


def conv3x3_weight_grad(
    grad: Tensor, x: Tensor, *, with_bias: bool = False, allow_tf32: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The gradients of conv3x3's weight and, with_bias, of its bias from that of its sum.

    grad [N, Cout, H, W] and x [N, C, H, W], one of conv3x3's inputs. Returns [Cout, C, 3, 3], channels_last, and
    [Cout] or None, both of grad's dtype; float32 sums, in a fixed order. An empty batch gives zeros.
    """
    channels_out, channels = grad.shape[1], x.shape[1]
    grad_weight = torch.empty(
        (channels_out, channels, 3, 3), dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last
    )
    grad_bias = torch.empty((channels_out,), dtype=grad.dtype, device=grad.device) if with_bias else None
    if x.shape[0] == 0:
        return grad_weight.zero_(), None if grad_bias is None else grad_bias.zero_()
    launches = weight_grad_launches(
        packed(grad), packed(x), grad_weight, grad_bias, allow_tf32=allow_tf32, target=gpu.target(x.device)
    )
    for launch in launches:
        launch.run(x.device)
    return grad_weight, grad_bias
