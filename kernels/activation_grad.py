"""The gradient through an activation and a 2x2 max pooling, in one pass over the activation's output."""

from __future__ import annotations

import triton
import triton.language as tl
from fastunet.kernels.layout import empty_packed, packed
from fastunet.kernels.tiles import activate_grad, multiple
from fastunet.kernels.windows import pixel_at, pooled_at, run_on_windows, window_origin, winner_of
from torch import Tensor


# fmt: off
@triton.jit
def _load_pixel(y_ptr, image, h, w, c, mask, H, W, C):
    """y at one pixel of each window: offsets, mask and float32 values [P, K], zero where masked."""
    offsets, mask = pixel_at(image, h, w, c, mask, H, W, C)
    return offsets, mask, tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_grad(out_ptr, grad_y_ptr, offsets, mask, y, routed, negative_slope, ACTIVATION: tl.constexpr):
    """Add the direct gradient to the one routed through the pool, carry both through the activation, store."""
    if grad_y_ptr is not None:
        routed += tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    g = activate_grad(routed, y, negative_slope, ACTIVATION)
    tl.store(out_ptr + offsets, g.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["windows", "H", "W"])
def activation_grad_kernel(
    y_ptr, grad_y_ptr, grad_pooled_ptr, out_ptr, windows, H, W, C, negative_slope,
    ACTIVATION: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """out = activation'(y) * (grad_y + unpool(grad_pooled)), all packed NHWC; a gradient that is None counts as zero.

    A program owns BLOCK_P windows of 2x2 pixels and BLOCK_C channels. Pixels of windows that are not whole receive
    nothing from the pool.
    """
    C = multiple(C, UNIT)
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    window = (tl.program_id(0) // blocks_c).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    image, h, w = window_origin(window, H, W)
    mask = (window < windows)[:, None] & (c < C)[None, :]

    at0, mask0, y0 = _load_pixel(y_ptr, image, h, w, c, mask, H, W, C)
    at1, mask1, y1 = _load_pixel(y_ptr, image, h, w + 1, c, mask, H, W, C)
    at2, mask2, y2 = _load_pixel(y_ptr, image, h + 1, w, c, mask, H, W, C)
    at3, mask3, y3 = _load_pixel(y_ptr, image, h + 1, w + 1, c, mask, H, W, C)

    routed = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if grad_pooled_ptr is not None:
        # Only a whole window has its fourth pixel inside the image.
        pointers = grad_pooled_ptr + pooled_at(image, h, w, c, H, W, C)
        routed = tl.load(pointers, mask=mask3, other=0.0).to(tl.float32)
    winner = winner_of(y0, y1, y2, y3)

    _store_grad(out_ptr, grad_y_ptr, at0, mask0, y0, tl.where(winner == 0, routed, 0.0), negative_slope, ACTIVATION)
    _store_grad(out_ptr, grad_y_ptr, at1, mask1, y1, tl.where(winner == 1, routed, 0.0), negative_slope, ACTIVATION)
    _store_grad(out_ptr, grad_y_ptr, at2, mask2, y2, tl.where(winner == 2, routed, 0.0), negative_slope, ACTIVATION)
    _store_grad(out_ptr, grad_y_ptr, at3, mask3, y3, tl.where(winner == 3, routed, 0.0), negative_slope, ACTIVATION)
# fmt: on


def activation_grad(
    y: Tensor, grad_y: Tensor | None, grad_pooled: Tensor | None, negative_slope: float | None
) -> Tensor:
    """Return the gradient of conv3x3's sum before its activation, in one pass over y [N, C, H, W].

    grad_y [N, C, H, W] and grad_pooled [N, C, H // 2, W // 2] are the gradients of conv3x3's two outputs, None for
    zero but not both. A window's gradient goes to its maximum, by torch's rule to the first of equals and to the last
    NaN; the activation's slope follows from y's sign. Returns a channels_last tensor of y's dtype.
    """
    out = empty_packed(y, *y.shape[1:])
    grads = {"grad_y_ptr": packed(grad_y), "grad_pooled_ptr": packed(grad_pooled)}
    run_on_windows(activation_grad_kernel, y, {"y_ptr": packed(y), **grads, "out_ptr": out}, negative_slope)
    return out
