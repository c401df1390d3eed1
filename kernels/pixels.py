"""The pieces of the kernels that look at one pixel at a time, or at its four sub-pixels: conv_transpose2x2, conv1x1.

Activations are packed NHWC: row (n*H + h)*W + w of a matrix [N*H*W, C] is a pixel. Sub-pixel 2*a + b of the pixel
(h, w) is the pixel (2*h + a, 2*w + b) of an image twice as high and wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from fastunet.kernels import gpu
from fastunet.kernels.config_pixels import PixelProductConfig
from fastunet.kernels.epilogue import precision
from torch import Tensor

# Values of ACTIVATION, of the kernels of conv1x1.
LINEAR = tl.constexpr(0)
SIGMOID = tl.constexpr(1)
SOFTMAX = tl.constexpr(2)
ACTIVATIONS = {None: LINEAR.value, "sigmoid": SIGMOID.value, "softmax": SOFTMAX.value}


# fmt: off
@triton.jit
def pixel_rows(block, pixels, BLOCK_P: tl.constexpr):
    """The rows of a block of pixels, int64 [P], and which of them there are."""
    rows = tl.cast(block, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    return rows, rows < pixels


@triton.jit
def first_subpixels(rows, W):
    """The rows [P], in the image twice as high and wide, of the pixels' sub-pixels 0."""
    # ((n*H + h)*2*2*W + 2*w, of the row (n*H + h)*W + w.
    return 4 * rows - 2 * (rows % W)


@triton.jit
def subpixel_step(sub, W):
    """How many rows sub-pixel `sub` lies beyond sub-pixel 0."""
    return sub // 2 * 2 * W + sub % 2


@triton.jit
def load_rows(a_ptr, rows, mask_p, channels, C):
    """a [.., C] at the rows [P] and channels [K]: [P, K], zero beyond C and where masked."""
    pointers = a_ptr + (rows * C)[:, None] + channels[None, :]
    return tl.load(pointers, mask=mask_p[:, None] & (channels < C)[None, :], other=0.0)


@triton.jit
def accumulate_rows(
    acc, a_ptr, rows, mask_p, C, W, weight_ptr, n, N, stride_k, stride_n, stride_sub,
    SUBPIXELS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """acc [P, N] += the sum over sub-pixels s and channels k of a[rows beyond by s, k] * weight[k, n, s].

    SUBPIXELS is 1 or 4; `W` matters for 4 alone, and is the width of the smaller image.
    """
    k = tl.arange(0, BLOCK_K)
    pointers = weight_ptr + k.to(tl.int64)[:, None] * stride_k + n.to(tl.int64)[None, :] * stride_n
    mask_n = (n < N)[None, :]
    steps = tl.cdiv(C, BLOCK_K) * SUBPIXELS
    tl.assume(steps > 0)  # Without it, ptxas may take the products one by one (warning C7515).
    # The sub-pixel runs fastest: neighbours in memory are read one after the other.
    for step in range(steps):
        sub = step % SUBPIXELS
        k0 = step // SUBPIXELS * BLOCK_K
        a = load_rows(a_ptr, rows + subpixel_step(sub, W), mask_p, k0 + k, C)
        at = tl.cast(k0, tl.int64) * stride_k + sub * stride_sub
        b = tl.load(pointers + at, mask=(k0 + k < C)[:, None] & mask_n, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def softmax_dots(grad_ptr, y_ptr, rows, mask_p, C, BLOCK_C: tl.constexpr):
    """The sum over channels of grad * y [.., C] at the rows: float32 [P]."""
    c = tl.arange(0, BLOCK_C)
    total = tl.zeros((rows.shape[0], BLOCK_C), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        g = load_rows(grad_ptr, rows, mask_p, c0 + c, C).to(tl.float32)
        total += g * load_rows(y_ptr, rows, mask_p, c0 + c, C).to(tl.float32)
    return tl.sum(total, 1)


@triton.jit
def load_grad(grad_ptr, y_ptr, rows, mask_p, dots, channels, C, ACTIVATION: tl.constexpr):
    """The gradient of y = ACTIVATION(v) carried to v, at the rows [P] and channels [K]: [P, K].

    grad*y*(1 - y) of a sigmoid and y*(grad - dots) of a softmax are float32; without activation grad comes as it is.
    """
    g = load_rows(grad_ptr, rows, mask_p, channels, C)
    if ACTIVATION != LINEAR:
        y = load_rows(y_ptr, rows, mask_p, channels, C).to(tl.float32)
        g = g.to(tl.float32)
        if ACTIVATION == SIGMOID:
            g = g * y * (1.0 - y)
        else:  # Beyond C, zero times an infinite sum would be NaN.
            g = tl.where((channels < C)[None, :], y * (g - dots[:, None]), 0.0)
    return g
# fmt: on


def run_product(
    kernel: triton.JITFunction,
    arguments: Mapping[str, Any],
    image: Tensor,
    programs: int,
    chosen: PixelProductConfig,
    *,
    allow_tf32: bool,
) -> None:
    """Launch a product of pixels with a packed weight. arguments: those that other products have not, or otherwise.

    image: one of as many pixels as there are products for. programs: for each block of them.
    """
    batch, _, height, width = image.shape
    pixels = batch * height * width
    arguments = {
        **arguments,
        "pixels": pixels,
        "W": width,
        "PRECISION": precision(image.dtype, allow_tf32),
    }
    gpu.launch(kernel, gpu.cdiv(pixels, chosen.block_p) * programs, arguments, chosen).run(image.device)
