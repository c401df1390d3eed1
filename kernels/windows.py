"""2x2 windows: which pixels they hold, and which of those is the maximum.

A program of a pass over windows owns P windows and K channels. Windows cover odd edges too: there they are not whole,
and the pixels they lack are masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from fastunet.kernels import config_passes, gpu
from fastunet.kernels.epilogue import activation_code
from torch import Tensor


# fmt: off
@triton.jit
def window_origin(window, H, W):
    """Image, first row and first column of windows [P] (int64), counted row by row and image by image."""
    windows_w = (W + 1) // 2
    windows_h = (H + 1) // 2
    return window // (windows_w * windows_h), window // windows_w % windows_h * 2, window % windows_w * 2


@triton.jit
def pixel_at(image, h, w, c, mask, H, W, C):
    """Offsets [P, K] of the pixels (h, w) [P] and channels c [K], packed NHWC, and the mask without those outside."""
    offsets = ((image * H + h) * W + w)[:, None] * C + c[None, :]
    return offsets, mask & ((h < H) & (w < W))[:, None]


@triton.jit
def pooled_at(image, h, w, c, H, W, C):
    """Offsets [P, K] of the windows' values in the pooled images, packed NHWC."""
    return ((image * (H // 2) + h // 2) * (W // 2) + w // 2)[:, None] * C + c[None, :]


@triton.jit
def _takes_over(v, best):
    """Whether v becomes the maximum after best, by torch's rule: the first of equals wins, and the last of NaNs."""
    return (v > best) | (v != v)


@triton.jit
def winner_of(y0, y1, y2, y3):
    """Which of a window's four values is its maximum, 0 to 3."""
    winner = tl.where(_takes_over(y1, y0), 1, 0)
    best = tl.where(winner == 1, y1, y0)
    winner = tl.where(_takes_over(y2, best), 2, winner)
    best = tl.where(winner == 2, y2, best)
    return tl.where(_takes_over(y3, best), 3, winner)
# fmt: on


def window_arguments(shape: Sequence[int], negative_slope: float | None) -> dict[str, Any]:
    """Return what every kernel with an activation is told of the windows of images of shape [N, C, H, W]."""
    batch, channels, height, width = shape
    return {
        "windows": batch * gpu.cdiv(height, 2) * gpu.cdiv(width, 2),
        "H": height,
        "W": width,
        "C": channels,
        "negative_slope": float(negative_slope or 0),
        "ACTIVATION": activation_code(negative_slope),
    }


def run_on_windows(kernel: Any, image: Tensor, tensors: Mapping[str, Any], negative_slope: float | None) -> None:
    """Launch a pass with an activation over the windows of images like `image` [N, C, H, W].

    tensors: the arguments that are the kernel's own.
    """
    chosen = config_passes.pointwise_config(image.shape[1])
    arguments = {**tensors, **window_arguments(image.shape, negative_slope)}
    grid = gpu.cdiv(arguments["windows"], chosen.block_p) * gpu.cdiv(image.shape[1], chosen.block_c)
    gpu.launch(kernel, grid, arguments, chosen).run(image.device)
