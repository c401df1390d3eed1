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


def quantise_launch(x: Tensor, scale: Tensor, out: Tensor) -> gpu.Launch:
    """Return the launch that fills out, e4m3, with packed x / scale. scale: a float32 of one element."""
    arguments = {
        "x_ptr": x,
        "scale_ptr": scale,
        "out_ptr": out,
        "size": x.numel(),
        "BLOCK": _BLOCK,
    }
    return gpu.Launch(quantise_kernel, gpu.cdiv(x.numel(), _BLOCK), arguments, _WARPS, 1)


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
    x, up = _quantised(x, scale), None if up is None else _quantised(up, scale)
    channels, (height, width) = weight.shape[0], x.shape[2:]
    y = empty_packed(x, channels, height, width, dtype if y_scale is None else E4M3)
    pooled = None
    if pool:
        pooled = empty_packed(x, channels, height // 2, width // 2, dtype if pooled_scale is None else E4M3)
    scales = {"y_scale": y_scale, "pooled_scale": pooled_scale if pool else None}
    epilogue = Epilogue(y, bias, norm, negative_slope, pooled, **scales)
    fp8_launch(x, up, weight, gpu.target(x.device), epilogue).run(x.device)
    return y, pooled


def _quantised(t: Tensor, scale: Tensor) -> Tensor:
    t = packed(t)
    if t.dtype == E4M3:
        return t
    out = torch.empty_like(t, dtype=E4M3)
    quantise_launch(t, scale, out).run(t.device)
    return out


def fp8_launch(x: Tensor, up: Tensor | None, weight: Tensor, target: gpu.Target, epilogue: Epilogue) -> gpu.Launch:
    """Return the launch that fills the epilogue's outputs from packed x and up, e4m3."""
    c2 = 0 if up is None else up.shape[1]
    shape = config.ConvShape(x.shape[1], c2, weight.shape[0], *x.shape[2:])
    return conv3x3_launch(x, up, weight, config.fp8_config(shape, target), epilogue, allow_tf32=False)
