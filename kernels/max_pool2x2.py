"""2x2 max pooling, stride 2. Its gradient is activation_grad's of norm_grad.py, which finds the winners again."""

from __future__ import annotations

import triton
import triton.language as tl
from fastunet.kernels import config_passes, gpu
from fastunet.kernels.layout import empty_packed, packed
from fastunet.kernels.tiles import multiple, nan_max
from torch import Tensor


# fmt: off
@triton.jit(do_not_specialize=["windows", "H", "W"])
def max_pool2x2_kernel(
    x_ptr, y_ptr, windows, H, W, C, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """y[n, h, w, c] = the maximum of x[n, 2h + a, 2w + b, c] over a and b in {0, 1}, NaN if one of the four is.

    x [N, H, W, C], y [N, H // 2, W // 2, C]; a program owns BLOCK_P windows and BLOCK_C channels.
    """
    C = multiple(C, UNIT)
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    window = (tl.program_id(0) // blocks_c).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    w = window % (W // 2)
    row = window // (W // 2)  # n*(H // 2) + h
    # Its first pixel: an odd height skips a row of pixels after each image.
    pixel = (row * 2 + row // (H // 2) * (H % 2)) * W + 2 * w
    mask = (window < windows)[:, None] & (c < C)[None, :]
    pointers = x_ptr + (pixel * C)[:, None] + c[None, :]

    y = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    y = nan_max(y, tl.load(pointers + C, mask=mask, other=0.0).to(tl.float32))
    pointers += W.to(tl.int64) * C
    y = nan_max(y, tl.load(pointers, mask=mask, other=0.0).to(tl.float32))
    y = nan_max(y, tl.load(pointers + C, mask=mask, other=0.0).to(tl.float32))
    tl.store(y_ptr + (window * C)[:, None] + c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
# fmt: on


def max_pool2x2(x: Tensor) -> Tensor:
    """Return F.max_pool2d(x, 2) of x [N, C, H, W], H and W >= 2, any layout: [N, C, H // 2, W // 2], channels_last.

    An odd last row or column is dropped; NaN wins.
    """
    batch, channels, height, width = x.shape
    y = empty_packed(x, channels, height // 2, width // 2)
    chosen = config_passes.pointwise_config(channels)
    windows = batch * (height // 2) * (width // 2)
    arguments = {"x_ptr": packed(x), "y_ptr": y, "windows": windows, "H": height, "W": width, "C": channels}
    grid = gpu.cdiv(windows, chosen.block_p) * gpu.cdiv(channels, chosen.block_c)
    gpu.launch(max_pool2x2_kernel, grid, arguments, chosen).run(x.device)
    return y
