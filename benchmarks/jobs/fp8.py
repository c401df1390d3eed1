"""The convolution of e4m3 values on sm_90 and above, and the pass that makes them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fastunet.kernels import config, gpu

from . import Job

OPS = ("fp8", "fp8_pool", "fp8_two_inputs", "fp8_chain", "fp8_quantise")
_SHAPES = tuple(
    config.ConvShape(c_in, 0, c_out, side, side)
    for c_in, c_out in ((32, 64), (64, 64), (128, 128), (64, 128))
    for side in (512, 64, 8)
)


def jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """With every block there is, for results in bf16; those in fp16 compile alike."""
    if dtype != torch.bfloat16 or not config.fits_fp8(target, (64,), 64):
        return
    shapes = {config.fp8_config(shape, target): shape for shape in _SHAPES}
    for shape in shapes.values():
        for op in OPS[:4]:
            yield Job(op, dtype, allow_tf32, target.capability, shape)
    yield Job("fp8_quantise", dtype, allow_tf32, target.capability, _SHAPES[0])


def launch(job: Job) -> gpu.Launch:
    """The launch of one job."""
    from fastunet.kernels import conv3x3_fp8
    from fastunet.kernels.epilogue import Epilogue, Normalisation

    shape, sides = job.shape, (job.shape.height, job.shape.width)
    x, per_channel = job.pixels(shape.c1, *sides), torch.empty(shape.c_out, device="meta")
    quantised = torch.empty_like(x, dtype=conv3x3_fp8.DTYPE)
    if job.op == "fp8_quantise":
        return conv3x3_fp8.quantise_launch(x, per_channel[:1], quantised)
    up = torch.empty_like(quantised) if job.op == "fp8_two_inputs" else None
    channels = shape.c1 * (1 if up is None else 2)
    weight = job.tensor(shape.c_out, channels, 3, 3, layout=torch.channels_last).to(conv3x3_fp8.DTYPE)
    norm = Normalisation(per_channel, per_channel, per_channel, 1e-5)
    y, pooled = job.pixels(shape.c_out, *sides), job.pixels(shape.c_out, sides[0] // 2, sides[1] // 2)
    if job.op == "fp8_chain":
        scales = {"y_scale": per_channel[:1], "pooled_scale": per_channel[:1]}
        y, pooled = (torch.empty_like(t, dtype=conv3x3_fp8.DTYPE) for t in (y, pooled))
        epilogue = Epilogue(y, per_channel, norm, 0.0, pooled, **scales)
    else:
        epilogue = Epilogue(y, per_channel, norm, 0.0, pooled if job.op == "fp8_pool" else None)
    return conv3x3_fp8.fp8_launch(quantised, up, weight, job.target, epilogue)
