"""The 3x3 convolution of e4m3 values by e4m3 weights on sm_90 and above: the descriptor kernel, whose products then are
of 8 bits, and whose epilogue takes the scales back out.
"""

# Of a kernel's parameters only the constexprs carry an annotation.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastunet.kernels import config, conv3x3_descriptor, gpu
from fastunet.kernels.epilogue import Epilogue, Normalisation
from fastunet.kernels.layout import packed
from torch import Tensor

DTYPE = torch.float8_e4m3fn
_BLOCK, _WARPS = 4096, 8


# fmt: off
@triton.jit(do_not_specialize=["size"])
def quantise_kernel(x_ptr, scale_ptr, out_ptr, size, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """out = x / scale, held to +-LARGEST; NaN stays."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    v = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) / tl.load(scale_ptr)
    v = tl.where(v > LARGEST, LARGEST, tl.where(v < -LARGEST, -LARGEST, v))
    tl.store(out_ptr + at, v.to(out_ptr.dtype.element_ty), mask=mask)
# fmt: on


def quantise_launch(x: Tensor, scale: Tensor, out: Tensor) -> gpu.Launch:
    """The launch that fills out, e4m3, with packed x / scale. scale: a float32 of one element."""
    arguments = {
        "x_ptr": x,
        "scale_ptr": scale,
        "out_ptr": out,
        "size": x.numel(),
        "LARGEST": torch.finfo(DTYPE).max,
        "BLOCK": _BLOCK,
    }
    return gpu.Launch(quantise_kernel, triton.cdiv(x.numel(), _BLOCK), arguments, _WARPS, 1)


def conv3x3_fp8(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm: Normalisation,
    negative_slope: float | None,
    *,
    pool: bool,
) -> tuple[Tensor, Tensor | None]:
    """activation(norm(conv2d(cat([x, up], 1) / scale in e4m3, weight, padding=1)) + bias), and with pool its maxima.

    x [N, C1, H, W], up [N, C2, H, W] or None, in 16 bits, which the results have too, packed. weight [Cout, C1 + C2,
    3, 3] e4m3, channels_last. scale: one float32. The norm's tensors and bias, float32 [Cout], hold the scales of
    weight and images. The caller has checked `config.fits_fp8`, and that the images are not empty.
    """
    quantised = [torch.empty_like(packed(t), dtype=DTYPE) for t in (x, up) if t is not None]
    for t, out in zip((x, up), quantised, strict=False):
        assert t is not None
        quantise_launch(packed(t), scale, out).run(x.device)
    batch, _, height, width = x.shape
    y, pooled = (
        torch.empty((batch, weight.shape[0], h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for h, w in ((height, width), (height // 2, width // 2))
    )
    epilogue = Epilogue(y, bias, norm, negative_slope, pooled if pool else None)
    inputs = (quantised[0], quantised[1] if up is not None else None)
    fp8_launch(*inputs, weight, gpu.target(x.device), epilogue).run(x.device)
    return y, epilogue.pooled


def fp8_launch(x: Tensor, up: Tensor | None, weight: Tensor, target: gpu.Target, epilogue: Epilogue) -> gpu.Launch:
    """The launch that fills the epilogue's outputs from packed x and up, e4m3."""
    c2 = 0 if up is None else up.shape[1]
    shape = config.ConvShape(x.shape[1], c2, weight.shape[0], *x.shape[2:])
    return conv3x3_descriptor.conv3x3_launch(x, up, weight, config.fp8_config(shape, target), epilogue)
