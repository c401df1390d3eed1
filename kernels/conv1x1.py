"""1x1 convolution with bias and a sigmoid, or a softmax over the channels, in its epilogue: the U-Net's head.

The gradient goes through the activation where it is loaded: that of the sum before it is never written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastunet.kernels import config_pixels, gpu
from fastunet.kernels.layout import dense, empty_packed, packed
from fastunet.kernels.pixels import (
    ACTIVATIONS,
    SIGMOID,
    SOFTMAX,
    accumulate_rows,
    load_grad,
    pixel_rows,
    run_product,
    softmax_dots,
)
from fastunet.kernels.tiles import multiple, nan_max
from torch import Tensor


# fmt: off
@triton.jit
def _softmax(v, mask_n):
    """The softmax of the rows of v [P, N] over the columns of mask_n: float32, NaN throughout a row that holds one."""
    v = tl.where(mask_n[None, :], v, -float("inf"))
    e = tl.exp(v - tl.reduce(v, 1, nan_max)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit(do_not_specialize=["pixels"])
def conv1x1_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, pixels, C, COUT,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, UNIT_C: tl.constexpr, UNIT_COUT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """y[p, o] = ACTIVATION(sum over channels c of x[p, c] * weight[o, c] + bias[o]).

    x [pixels, C], weight [COUT, C], y [pixels, COUT]; a program owns BLOCK_P pixels and BLOCK_N channels of y, all of
    them for a softmax.
    """
    C, COUT = multiple(C, UNIT_C), multiple(COUT, UNIT_COUT)
    blocks_n = tl.cdiv(COUT, BLOCK_N)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < COUT
    rows, mask_p = pixel_rows(tl.program_id(0) // blocks_n, pixels, BLOCK_P)
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    acc = accumulate_rows(
        acc, x_ptr, rows, mask_p, C, 0, weight_ptr, n, COUT, 1, C, 0, 1, PRECISION, BLOCK_K
    )
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == SIGMOID:
        acc = tl.sigmoid(acc)
    if ACTIVATION == SOFTMAX:
        acc = _softmax(acc, mask_n)
    pointers = y_ptr + (rows * COUT)[:, None] + n[None, :]
    tl.store(pointers, acc.to(y_ptr.dtype.element_ty), mask=mask_p[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["pixels"])
def conv1x1_input_grad_kernel(
    grad_ptr, y_ptr, weight_ptr, out_ptr, pixels, C, COUT,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, UNIT_C: tl.constexpr, UNIT_COUT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """out[p, c] = sum over output channels o of g[p, o] * weight[o, c]; g is grad carried through the ACTIVATION.

    grad and the activation's output y [pixels, COUT], weight [COUT, C], out [pixels, C]; a program owns BLOCK_P pixels,
    BLOCK_N channels of out.
    """
    C, COUT = multiple(C, UNIT_C), multiple(COUT, UNIT_COUT)
    blocks_n = tl.cdiv(C, BLOCK_N)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < C
    rows, mask_p = pixel_rows(tl.program_id(0) // blocks_n, pixels, BLOCK_P)
    dots = tl.zeros((BLOCK_P,), tl.float32)
    if ACTIVATION == SOFTMAX:
        dots = softmax_dots(grad_ptr, y_ptr, rows, mask_p, COUT, BLOCK_K)
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    k = tl.arange(0, BLOCK_K)
    for k0 in range(0, COUT, BLOCK_K):
        g = load_grad(grad_ptr, y_ptr, rows, mask_p, dots, k0 + k, COUT, ACTIVATION)
        pointers = weight_ptr + (k0 + k).to(tl.int64)[:, None] * C + n[None, :]
        b = tl.load(pointers, mask=(k0 + k < COUT)[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(g.to(b.dtype), b, acc, input_precision=PRECISION)
    pointers = out_ptr + (rows * C)[:, None] + n[None, :]
    tl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=mask_p[:, None] & mask_n[None, :])
# fmt: on


def conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """Return activation(F.conv2d(x, weight, bias)), activation None, "sigmoid" or "softmax" over the channels.

    x [N, C, H, W], weight [Cout, C, 1, 1] in any layout, bias [Cout] or None; all of one dtype and device, which the
    caller has checked, as it has that a softmax is of no more than config_pixels.LARGEST_SOFTMAX channels. Returns
    [N, Cout, H, W], channels_last. float32 sums and activations, rounded once; allow_tf32 lets float32 inputs be
    rounded to TF32 on tensor cores.
    """
    y = empty_packed(x, weight.shape[0], *x.shape[2:])
    (channels_out, channels), options = weight.shape[:2], {"allow_tf32": allow_tf32, "softmax": activation == "softmax"}
    chosen = config_pixels.head_config(channels, channels_out, x.dtype, gpu.target(x.device), **options)
    arguments = {"x_ptr": packed(x), "weight_ptr": packed(weight), "bias_ptr": dense(bias), "y_ptr": y}
    arguments |= {"C": channels, "COUT": channels_out, "ACTIVATION": ACTIVATIONS[activation]}
    programs = gpu.cdiv(channels_out, chosen.block_n)
    run_product(conv1x1_kernel, arguments, y, programs, chosen, allow_tf32=allow_tf32)
    return y


def conv1x1_input_grad(
    grad: Tensor,
    weight: Tensor,
    y: Tensor | None = None,
    *,
    activation: str | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """Return the gradient of conv1x1's input [N, C, H, W] from its output's, grad [N, Cout, H, W].

    weight [Cout, C, 1, 1]; y is conv1x1's output, which an activation needs. The gradient before the activation is
    rounded to grad's dtype, as torch stores it. Returns a channels_last tensor of grad's dtype.
    """
    channels_out, channels = weight.shape[:2]
    out = empty_packed(grad, channels, *grad.shape[2:])
    chosen = config_pixels.head_input_grad_config(grad.dtype, allow_tf32=allow_tf32)
    arguments = {"grad_ptr": packed(grad), "y_ptr": packed(y), "weight_ptr": packed(weight), "out_ptr": out}
    arguments |= {"C": channels, "COUT": channels_out, "ACTIVATION": ACTIVATIONS[activation]}
    programs = gpu.cdiv(channels, chosen.block_n)
    run_product(conv1x1_input_grad_kernel, arguments, out, programs, chosen, allow_tf32=allow_tf32)
    return out
