"""Gradients of the 3x3 convolution: of its inputs, of the weight and the bias.

The input gradient is the convolution itself, with the window turned around and the channels swapped. The weight
gradient splits the pixels into parts, sums each on its own in float32 and adds the parts in a fixed order: no atomics,
so the same inputs give the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from fastunet.kernels import autotune, gpu
from fastunet.kernels.conv3x3 import config, config_grad, descriptor, pointer, strided
from fastunet.kernels.conv3x3.pointer import accumulate, accumulate_folded, halo_runs, rows_aligned
from fastunet.kernels.epilogue import Epilogue, activation_code, precision
from fastunet.kernels.layout import empty_packed, packed
from fastunet.kernels.reduction import empty_weight_grads, sum_rows
from fastunet.kernels.tiles import (
    CENTRE_TAP,
    activate_grad,
    joined_channels,
    load_folded_taps,
    load_pixels,
    load_tap,
    multiple,
    next_tile,
    pixel_offsets,
    read_pixels,
    strided_size,
    tile_origin,
    tile_pixels,
)
from torch import Tensor


# fmt: off
@triton.jit(do_not_specialize=["H", "W", "steps"])
def conv3x3_input_grad_kernel(
    grad_ptr, weight_ptr, x_ptr, out_ptr, out_up_ptr, H, W, C1, C2, COUT, steps,
    stride_out, stride_tap, stride_in, negative_slope,
    ACTIVATION: tl.constexpr, FOLDED: tl.constexpr, JOINED: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """out[p, c] = sum over taps t and channels o of grad[p moved by t, o] * weight[o, c, 8 - t], for two inputs' out.

    grad [N, H, W, COUT], out [N, H, W, C1], out_up [N, H, W, C2] or None. Where x, the first input, is given, it is the
    output of an ACTIVATION, and out becomes the gradient of what went into that. A program owns a tile of pixels and
    BLOCK_N channels of one of the inputs, or JOINED all channels of both, of which each has half of BLOCK_N.
    """
    C1, C2, COUT = multiple(C1, UNIT), multiple(C2, UNIT), multiple(COUT, UNIT)
    stride_out, stride_tap = multiple(stride_out, UNIT), multiple(stride_tap, UNIT)
    blocks1 = tl.cdiv(C1, BLOCK_N)
    blocks = blocks1 if out_up_ptr is None or JOINED else blocks1 + tl.cdiv(C2, BLOCK_N)
    block = tl.program_id(0) % blocks
    image, h0, w0 = tile_origin(tl.program_id(0) // blocks, H, W, TILE_H, TILE_W)
    rows, columns = tile_pixels(h0, w0, H, W, TILE_H, TILE_W)
    origin = (image * H + h0) * W + w0
    offsets = pixel_offsets(W, TILE_H, TILE_W)
    C = C1 + C2 if JOINED else C1
    if out_up_ptr is not None and not JOINED:
        if block >= blocks1:
            block -= blocks1
            C = C2
            out_ptr = out_up_ptr
            weight_ptr += tl.cast(C1, tl.int64) * stride_in  # Of a 1 Triton makes a constant, which has no `to`.
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((TILE_H * TILE_W, BLOCK_N), tl.float32)
    # The same sum as the convolution's: what was its input channel is the output's, and the window is turned around.
    if FOLDED:
        acc = accumulate_folded(
            acc, grad_ptr, weight_ptr, steps, n, rows, columns, origin, offsets, H, W, COUT, C,
            stride_in, stride_tap, stride_out, True, PRECISION, BLOCK_K,
        )
    else:
        acc = accumulate(
            acc, grad_ptr, weight_ptr, 0, steps, n, rows, columns, origin, offsets, H, W, COUT, C,
            stride_in, stride_tap, stride_out, True, PRECISION, BLOCK_K,
        )
    at = (origin + offsets)[:, None] * C + n[None, :]
    mask = (rows >= 0)[:, None] & (n < C)[None, :]
    if x_ptr is not None:
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        acc = activate_grad(acc, x, negative_slope, ACTIVATION)
    pointers = out_ptr + at
    if JOINED:
        pointers = joined_channels(out_ptr, out_up_ptr, BLOCK_N) + ((origin + offsets) * (BLOCK_N // 2))[:, None]
    tl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_tiles(
    grad_ptr, x_ptr, first, last, tap, o, i, H, W, C, COUT, WITH_BIAS: tl.constexpr, FOLDED: tl.constexpr,
    PRECISION: tl.constexpr, STRIDE: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):
    """Over the pixels p of tiles first to last: sum of grad[p, o] * x[STRIDE*p moved by tap, i] [O, I], and of grad."""
    acc = tl.zeros((o.shape[0], i.shape[0]), tl.float32)
    totals = tl.zeros((TILE_H * TILE_W, o.shape[0]), tl.float32)
    HO, WO = strided_size(H, W, STRIDE)
    offsets = pixel_offsets(WO, TILE_H, TILE_W)
    image, h0, w0 = tile_origin(first, HO, WO, TILE_H, TILE_W)
    for _ in range(first, last):
        rows, columns = tile_pixels(h0, w0, HO, WO, TILE_H, TILE_W)
        origin = (image * HO + h0) * WO + w0
        g = load_pixels(grad_ptr, o, rows, origin, offsets, COUT)
        offsets_in = offsets
        if STRIDE > 1:
            rows, columns, origin, offsets_in = read_pixels(
                image, h0, w0, rows, columns, H, W, STRIDE, TILE_H, TILE_W
            )
        if FOLDED:
            x = load_folded_taps(x_ptr, i, rows, columns, origin, offsets_in, H, W, C)
        else:
            x = load_tap(x_ptr, tap, i, rows, columns, origin, offsets_in, H, W, C)
        acc = tl.dot(tl.trans(g), x, acc, input_precision=PRECISION)
        if WITH_BIAS:
            totals += g.to(tl.float32)
        image, h0, w0 = next_tile(image, h0, w0, HO, WO, TILE_H, TILE_W)
    return acc, tl.sum(totals, 0)


@triton.jit(do_not_specialize=["tiles", "tiles_per_split", "H", "W"])
def conv3x3_weight_grad_kernel(
    grad_ptr, x_ptr, partial_ptr, tiles, tiles_per_split, H, W, C, COUT,
    WITH_BIAS: tl.constexpr, FOLDED: tl.constexpr, PRECISION: tl.constexpr, STRIDE: tl.constexpr, UNIT: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):
    """partial[s, o, t, i] = sum over the pixels p of split s of grad[p, o] * x[STRIDE*p moved by t, i].

    grad [N, ceil(H / STRIDE), ceil(W / STRIDE), COUT], x [N, H, W, C]; partial float32 [splits, COUT*9*C + COUT], whose
    last COUT values are the sums of grad, the bias gradient (without WITH_BIAS they are absent). One program owns a
    split, a tap (all nine where FOLDED), BLOCK_OUT output and BLOCK_IN input channels; the programs of a split are
    neighbours in time.
    """
    C, COUT = multiple(C, UNIT), multiple(COUT, UNIT)
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
    sums_bias = (i0 == 0) & (tap == (0 if FOLDED else CENTRE_TAP))
    if WITH_BIAS and sums_bias:
        acc, total = _sum_tiles(
            grad_ptr, x_ptr, first, last, tap, o, i, H, W, C, COUT, True, FOLDED, PRECISION, STRIDE, TILE_H,
            TILE_W,
        )
        tl.store(partial_ptr + COUT * 9 * C + o, total, mask=o < COUT)
    else:
        acc, _ = _sum_tiles(
            grad_ptr, x_ptr, first, last, tap, o, i, H, W, C, COUT, False, FOLDED, PRECISION, STRIDE,
            TILE_H, TILE_W,
        )
    columns = 9 * C if FOLDED else C
    pointers = partial_ptr + (o * 9 * C)[:, None] + (tap * C + i)[None, :]
    tl.store(pointers, acc, mask=(o < COUT)[:, None] & (i < columns)[None, :])
# fmt: on


def conv3x3_input_grads(
    grad: Tensor,
    weight: Tensor,
    channels: Sequence[int],
    *,
    stride: int = 1,
    size: Sequence[int] = (),
    x: Tensor | None = None,
    negative_slope: float | None = None,
    allow_tf32: bool = False,
) -> list[Tensor]:
    """Return the gradients of conv3x3's input, or of its two, which have so many channels, by one launch.

    grad [N, Cout, ceil(H / stride), ceil(W / stride)] is that of the sum; weight [Cout, C, 3, 3], C all channels; size:
    H and W, which by stride 2 grad does not tell. Where x, the only input, is given, by stride 1, it is the output of
    the activation that negative_slope names, and the result is the gradient of what went into the activation. Returns
    channels_last tensors [N, each of channels, H, W] of grad's dtype.
    """
    size = size if stride == 2 else grad.shape[2:]
    outs = [empty_packed(grad, each, *size) for each in channels]
    if grad.numel() == 0:  # A descriptor cannot describe an empty tensor.
        return outs
    (out, out_up), grad, x = [*outs, None][:2], packed(grad), packed(x)
    target = gpu.target(grad.device)
    batch, channels_out, height, width = grad.shape
    c1, c2 = out.shape[1], 0 if out_up is None else out_up.shape[1]
    shape = config.ConvShape(channels_out, 0, c1, height, width, rows_aligned(weight, channels_out, c1, c2), c_out2=c2)
    op = config.INPUT_GRAD
    if stride == 2:  # It has no variant with folded taps, which fewer channels would have.
        op, shape = op + autotune.STRIDE2, replace(shape, c1=max(channels_out, config.FOLDED_BELOW))
    elif c1 == c2 and 2 * c1 in (32, 64, 128):  # A block may hold the channels of both.
        shape = replace(shape, c_out=2 * c1, c_out2=0)
    chosen = config.conv_config(shape, grad.dtype, target, allow_tf32=allow_tf32, op=op)
    if chosen.variant == config.HALO:
        # It is a convolution by the window turned around.
        if out_up is None and halo_runs(grad, config.INPUT_GRAD):
            from fastunet.kernels.conv3x3 import hopper  # Late: its interface is private to some releases of Triton.

            epilogue = Epilogue(out, negative_slope=negative_slope)
            hopper.conv3x3_launch(grad, None, weight.transpose(0, 1).flip(2, 3), chosen, epilogue, x).run(grad.device)
            return outs
        chosen = config.heuristic_conv_config(shape, grad.dtype, target, allow_tf32)
    joined = out_up is not None and chosen.block_n == shape.c_out == 2 * c1
    arguments = {
        "out_ptr": out,
        "out_up_ptr": out_up,
        "JOINED": joined,
        "H": size[0],
        "W": size[1],
        "C1": c1,
        "C2": c2,
        "COUT": channels_out,
        "steps": config.conv_steps(chosen, channels_out),
        "negative_slope": float(negative_slope or 0),
        "ACTIVATION": activation_code(negative_slope),
    }
    arguments["blocks_k"] = gpu.cdiv(channels_out, chosen.block_k)
    if chosen.variant == config.DESCRIPTOR:
        kernel = descriptor.conv3x3_input_grad_descriptor_kernel
        if stride == 2:
            kernel = strided.conv3x3_strided_input_grad_descriptor_kernel
        arguments |= descriptor.input_grad_operands(grad, weight, (out, out_up), x, chosen, stride)
    else:
        kernel = conv3x3_input_grad_kernel if stride == 1 else strided.conv3x3_strided_input_grad_kernel
        arguments |= pointer.operands(grad, None, weight, allow_tf32)
        arguments |= {"grad_ptr": grad, "x_ptr": x, "FOLDED": chosen.variant == config.FOLDED}
    blocks = 1 if joined else gpu.cdiv(c1, chosen.block_n) + gpu.cdiv(c2, chosen.block_n)
    blocks *= strided.PHASES if stride == 2 else 1
    grid = batch * config.tiles_per_image(chosen, height, width) * blocks
    gpu.launch(kernel, grid, arguments, chosen).run(grad.device)
    return outs


def conv3x3_weight_grad(
    grad: Tensor, x: Tensor, *, with_bias: bool = False, stride: int = 1, allow_tf32: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of conv3x3's weight and, with_bias, of its bias from that of its sum.

    grad [N, Cout, ceil(H / stride), ceil(W / stride)] and x [N, C, H, W], one of conv3x3's inputs. Returns [Cout, C, 3,
    3], channels_last, and [Cout] or None, both of grad's dtype; float32 sums, in a fixed order. An empty batch gives
    zeros.
    """
    batch, channels, height, width = x.shape
    channels_out, target = grad.shape[1], gpu.target(x.device)
    grad_weight, grad_bias = empty_weight_grads((channels_out, channels, 3, 3), grad, with_bias=with_bias)
    if batch == 0:
        return grad_weight, grad_bias
    grad, x = packed(grad), packed(x)
    shape = config.ConvShape(channels, 0, channels_out, *grad.shape[2:])
    op = config.WEIGHT_GRAD + (autotune.STRIDE2 if stride == 2 else "")
    chosen = config_grad.weight_grad_config(shape, x.dtype, target, allow_tf32=allow_tf32, op=op)
    programs = config_grad.weight_grad_programs(chosen, channels, channels_out)
    tiles = batch * config.tiles_per_image(chosen, *grad.shape[2:])
    per_split = gpu.cdiv(tiles, config_grad.weight_grad_splits(programs, tiles, target))
    splits = gpu.cdiv(tiles, per_split)
    total = channels_out * (9 * channels + with_bias)
    partial = torch.empty((splits, total), dtype=torch.float32, device=x.device)
    arguments = {
        "partial_ptr": partial,
        "tiles": tiles,
        "tiles_per_split": per_split,
        "H": height,
        "W": width,
        "C": channels,
        "COUT": channels_out,
        "WITH_BIAS": with_bias,
        "STRIDE": stride,
    }
    if chosen.variant == config.DESCRIPTOR:
        kernel = descriptor.conv3x3_weight_grad_descriptor_kernel
        arguments |= descriptor.weight_grad_operands(grad, x, chosen, stride)
    else:
        kernel = conv3x3_weight_grad_kernel
        arguments |= {"grad_ptr": grad, "x_ptr": x, "FOLDED": chosen.variant == config.FOLDED}
        arguments["PRECISION"] = precision(x.dtype, allow_tf32)
    gpu.launch(kernel, programs * splits, arguments, chosen).run(x.device)
    sum_rows(partial, grad_weight, grad_bias)
    return grad_weight, grad_bias
