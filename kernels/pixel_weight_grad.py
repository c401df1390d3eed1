"""The weight and bias gradient of conv_transpose2x2 and conv1x1, whose products look at one pixel at a time.

The pixels are split into parts, each summed on its own in float32, and the parts are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastunet.kernels import config_pixels, gpu
from fastunet.kernels.conv3x3 import config_grad
from fastunet.kernels.epilogue import precision
from fastunet.kernels.layout import packed
from fastunet.kernels.pixels import (
    ACTIVATIONS,
    SOFTMAX,
    first_subpixels,
    load_grad,
    load_rows,
    pixel_rows,
    softmax_dots,
    subpixel_step,
)
from fastunet.kernels.reduction import empty_weight_grads, sum_rows
from fastunet.kernels.tiles import multiple
from torch import Tensor


# fmt: off
@triton.jit
def _sum_blocks(
    x_ptr, grad_ptr, y_ptr, first, last, sub, i, o, pixels, W, C, COUT, WITH_BIAS: tl.constexpr,
    SUBPIXELS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """Over pixel blocks first to last: the sum of x[p, i] * g[p's sub-pixel, o] [I, O], and that of g [O]."""
    acc = tl.zeros((i.shape[0], o.shape[0]), tl.float32)
    totals = tl.zeros((BLOCK_P, o.shape[0]), tl.float32)
    for block in range(first, last):
        rows, mask_p = pixel_rows(block, pixels, BLOCK_P)
        x = load_rows(x_ptr, rows, mask_p, i, C)
        if SUBPIXELS == 4:
            rows = first_subpixels(rows, W) + subpixel_step(sub, W)
        dots = tl.zeros((BLOCK_P,), tl.float32)
        if ACTIVATION == SOFTMAX:
            dots = softmax_dots(grad_ptr, y_ptr, rows, mask_p, COUT, o.shape[0])
        g = load_grad(grad_ptr, y_ptr, rows, mask_p, dots, o, COUT, ACTIVATION)
        acc = tl.dot(tl.trans(x), g.to(x.dtype), acc, input_precision=PRECISION)
        if WITH_BIAS:
            totals += g.to(tl.float32)
    return acc, tl.sum(totals, 0)


@triton.jit(do_not_specialize=["pixels", "blocks", "blocks_per_split", "W"])
def pixel_weight_grad_kernel(
    x_ptr, grad_ptr, y_ptr, partial_ptr, bias_partial_ptr, pixels, blocks, blocks_per_split, W, C, COUT,
    SUBPIXELS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    UNIT_C: tl.constexpr, UNIT_COUT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):
    """partial[s, i, o, q] = the sum over the pixels p of split s of x[p, i] * g[p's sub-pixel q, o].

    x [pixels, C]; g [pixels * SUBPIXELS, COUT] is grad, carried through the ACTIVATION whose output is y. partial,
    float32, has the weight's memory order: [splits, COUT, C], or [splits, C, 4, COUT] of four sub-pixels. bias_partial
    [splits * SUBPIXELS, COUT] or None takes the sums of g, of each split and sub-pixel. A program owns a split, a
    sub-pixel, BLOCK_IN input and BLOCK_OUT output channels; the programs of a split are neighbours in time.
    """
    C, COUT = multiple(C, UNIT_C), multiple(COUT, UNIT_COUT)
    blocks_o = tl.cdiv(COUT, BLOCK_OUT)
    blocks_i = tl.cdiv(C, BLOCK_IN)
    pid = tl.program_id(0)
    o = pid % blocks_o * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    sub = pid // blocks_o % SUBPIXELS
    i0 = pid // (blocks_o * SUBPIXELS) % blocks_i * BLOCK_IN
    i = i0 + tl.arange(0, BLOCK_IN)
    split = pid // (blocks_o * SUBPIXELS * blocks_i)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, blocks)

    # The sums of g are taken by the first block of input channels, in a loop of its own.
    if bias_partial_ptr is not None and i0 == 0:
        acc, total = _sum_blocks(
            x_ptr, grad_ptr, y_ptr, first, last, sub, i, o, pixels, W, C, COUT, True,
            SUBPIXELS, ACTIVATION, PRECISION, BLOCK_P,
        )
        tl.store(bias_partial_ptr + (split * SUBPIXELS + sub) * COUT + o, total, mask=o < COUT)
    else:
        acc, _ = _sum_blocks(
            x_ptr, grad_ptr, y_ptr, first, last, sub, i, o, pixels, W, C, COUT, False,
            SUBPIXELS, ACTIVATION, PRECISION, BLOCK_P,
        )
    partial_ptr += split.to(tl.int64) * (C * COUT * SUBPIXELS)
    if SUBPIXELS == 4:
        offsets = ((4 * i + sub) * COUT)[:, None] + o[None, :]
    else:
        offsets = i[:, None] + (o * C)[None, :]
    tl.store(partial_ptr + offsets, acc, mask=(i < C)[:, None] & (o < COUT)[None, :])
# fmt: on


def pixel_weight_grad(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None = None,
    *,
    activation: str | None = None,
    with_bias: bool = False,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of conv1x1's or conv_transpose2x2's weight and, with_bias, of its bias.

    grad is the output's, [N, Cout, H, W] of conv1x1, [N, Cout, 2H, 2W] of conv_transpose2x2; x [N, C, H, W]; y is
    conv1x1's output, which an activation needs. Returns [Cout, C, 1, 1] or [C, Cout, 2, 2], channels_last, and [Cout]
    or None, of grad's dtype; an empty batch gives zeros.
    """
    batch, channels, height, width = x.shape
    subpixels = 1 if grad.shape[2] == height else 4
    channels_out, target = grad.shape[1], gpu.target(x.device)
    shape = (channels_out, channels, 1, 1) if subpixels == 1 else (channels, channels_out, 2, 2)
    grad_weight, grad_bias = empty_weight_grads(shape, grad, with_bias=with_bias)
    if batch == 0:
        return grad_weight, grad_bias
    if subpixels == 1:
        chosen = config_pixels.head_weight_grad_config(channels_out, x.dtype, allow_tf32=allow_tf32)
    else:
        chosen = config_pixels.pixel_weight_grad_config(channels, channels_out, x.dtype, target, allow_tf32=allow_tf32)
    programs = config_pixels.pixel_weight_grad_programs(chosen, channels, channels_out, subpixels)
    pixels = batch * height * width
    blocks = gpu.cdiv(pixels, chosen.block_p)
    per_split = gpu.cdiv(blocks, config_grad.weight_grad_splits(programs, blocks, target))
    splits = gpu.cdiv(blocks, per_split)
    partial = torch.empty((splits, grad_weight.numel()), dtype=torch.float32, device=x.device)
    bias_partial = None
    if grad_bias is not None:
        bias_partial = torch.empty((splits * subpixels, channels_out), dtype=torch.float32, device=x.device)
    arguments = {
        "x_ptr": packed(x),
        "grad_ptr": packed(grad),
        "y_ptr": packed(y),
        "partial_ptr": partial,
        "bias_partial_ptr": bias_partial,
        "pixels": pixels,
        "blocks": blocks,
        "blocks_per_split": per_split,
        "W": width,
        "C": channels,
        "COUT": channels_out,
        "SUBPIXELS": subpixels,
        "ACTIVATION": ACTIVATIONS[activation],
        "PRECISION": precision(x.dtype, allow_tf32),
    }
    gpu.launch(pixel_weight_grad_kernel, programs * splits, arguments, chosen).run(x.device)
    sum_rows(partial, grad_weight)
    if grad_bias is not None and bias_partial is not None:
        sum_rows(bias_partial, grad_bias)
    return grad_weight, grad_bias
