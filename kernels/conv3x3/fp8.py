"""The 3x3 convolution of e4m3 values by e4m3 weights on sm_90 and above: the descriptor kernel, whose products then are
of 8 bits, and whose epilogue takes the scales back out.

On sm_90 the tensor cores keep some 14 bits of a sum of e4m3 products (DeepSeek-V3, arXiv:2412.19437, section 3.5.2).
They add up those of one step, 32 to 128, and float32 adds up the steps. From sm_100 on their sums are float32's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastunet.kernels import gpu
from fastunet.kernels.conv3x3 import config
from fastunet.kernels.conv3x3.pointer import conv3x3_launch
from fastunet.kernels.epilogue import E4M3, Epilogue, Normalisation, scale_to_e4m3
from fastunet.kernels.layout import empty_packed, packed
from torch import Tensor

_BLOCK, _WARPS = 4096, 8


# fmt: off
@triton.jit(do_not_specialize=["size"])
def quantise_kernel(x_ptr, scale_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """out = x by scale_to_e4m3."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    v = scale_to_e4m3(tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32), scale_ptr)
    tl.store(out_ptr + at, v.to(out_ptr.dtype.element_ty), mask=mask)
# fmt: on


def conv3x3_fp8(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm: Normalisation,
    negative_slope: float | None,
    *,
    dtype: torch.dtype,
    pool: bool,
    y_scale: Tensor | None = None,
    pooled_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return activation(norm(conv2d(cat([x, up], 1) / scale in e4m3, weight, padding=1)) + bias), and with pool its
    maxima.

    x [N, C1, H, W], up [N, C2, H, W] or None: in 16 bits, or already divided by scale and in e4m3. weight [Cout, C1 +
    C2, 3, 3] e4m3, channels_last. scale: one float32. The norm's tensors and bias, float32 [Cout], hold the scales of
    weight and images. The results are packed, of dtype, or e4m3 where they have a scale, and then divided by it. The
    caller has checked `config.fits_fp8`, and that the images are not empty.
    """
    x, up = quantised(x, scale), None if up is None else quantised(up, scale)
    channels, (height, width) = weight.shape[0], x.shape[2:]
    y = empty_packed(x, channels, height, width, dtype if y_scale is None else E4M3)
    pooled = None
    if pool:
        pooled = empty_packed(x, channels, height // 2, width // 2, dtype if pooled_scale is None else E4M3)
    scales = {"y_scale": y_scale, "pooled_scale": pooled_scale if pool else None}
    epilogue = Epilogue(y, bias, norm, negative_slope, pooled, **scales)
    shape = config.ConvShape(x.shape[1], 0 if up is None else up.shape[1], channels, height, width)
    chosen = config.descriptor_config(shape, E4M3, gpu.target(x.device))
    conv3x3_launch(x, up, weight, chosen, epilogue, allow_tf32=False).run(x.device)
    return y, pooled


def quantised(t: Tensor, scale: Tensor) -> Tensor:
    """Return t / scale in e4m3, packed; packed t where it is of e4m3. scale: a float32 of one element."""
    t = packed(t)
    if t.dtype == E4M3:
        return t
    out = torch.empty_like(t, dtype=E4M3)
    arguments = {"x_ptr": t, "scale_ptr": scale, "out_ptr": out, "size": t.numel(), "BLOCK": _BLOCK}
    gpu.Launch(quantise_kernel, gpu.cdiv(t.numel(), _BLOCK), arguments, _WARPS, 1).run(t.device)
    return out
