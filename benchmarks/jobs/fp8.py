"""The convolution of e4m3 values on sm_90 and above, and what makes them: a pass, or other kernels' epilogues."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fastunet.kernels import config, config_pixels, gpu

from . import Job

OPS = ("fp8", "fp8_pool", "fp8_two_inputs", "fp8_chain", "fp8_quantise", "fp8_first", "fp8_transpose")
_SHAPES = tuple(
    config.ConvShape(c_in, 0, c_out, side, side)
    for c_in, c_out in ((32, 64), (64, 64), (128, 128), (64, 128))
    for side in (512, 64, 8)
)


def jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """With every block there is, for results in bf16; those in fp16 compile alike."""
    if dtype != torch.bfloat16 or not config.has_fp8(target):
        return
    shapes = {config.fp8_config(shape, target): shape for shape in _SHAPES}
    for shape in shapes.values():
        for op in OPS[:4]:
            yield Job(op, dtype, allow_tf32, target.capability, shape)
    yield Job("fp8_quantise", dtype, allow_tf32, target.capability, _SHAPES[0])
    yield Job("fp8_first", dtype, allow_tf32, target.capability, config.ConvShape(3, 0, 64, 512, 512, aligned=False))
    for channels in config_pixels.subpixel_tile_configs(dtype, target).values():
        if config_pixels.writes_e4m3(*channels, dtype, target):
            yield Job("fp8_transpose", dtype, allow_tf32, target.capability, channels)


def launch(job: Job) -> gpu.Launch:
    """The launch of one job."""
    from fastunet.kernels import conv3x3, conv3x3_fp8, conv_transpose2x2
    from fastunet.kernels.epilogue import E4M3, Epilogue, Normalisation

    scale = torch.empty(1, device="meta")
    if job.op == "fp8_transpose":
        c_in, c_out = job.shape
        x, y = job.pixels(c_in, 32, 32), torch.empty_like(job.pixels(c_out, 64, 64), dtype=E4M3)
        weight = job.tensor(c_in, c_out, 2, 2, layout=torch.channels_last)
        options = {"allow_tf32": False, "target": job.target, "y_scale": scale}
        return conv_transpose2x2.conv_transpose2x2_launch(x, weight, job.tensor(c_out), y, **options)
    shape, sides = job.shape, (job.shape.height, job.shape.width)
    x, per_channel = job.pixels(shape.c1, *sides), torch.empty(shape.c_out, device="meta")
    quantised = torch.empty_like(x, dtype=E4M3)
    if job.op == "fp8_quantise":
        return conv3x3_fp8.quantise_launch(x, scale, quantised)
    if job.op == "fp8_first":
        weight = job.tensor(shape.c_out, shape.c1, 3, 3, layout=torch.channels_last)
        epilogue = Epilogue(torch.empty_like(job.pixels(shape.c_out, *sides), dtype=E4M3), per_channel, y_scale=scale)
        chosen = conv3x3.choose(x, None, weight, job.target, allow_tf32=False)
        return conv3x3.conv3x3_launch(x, None, weight, chosen, epilogue, allow_tf32=False)
    up = torch.empty_like(quantised) if job.op == "fp8_two_inputs" else None
    channels = shape.c1 * (1 if up is None else 2)
    weight = job.tensor(shape.c_out, channels, 3, 3, layout=torch.channels_last).to(E4M3)
    norm = Normalisation(per_channel, per_channel, per_channel, 1e-5)
    y, pooled = job.pixels(shape.c_out, *sides), job.pixels(shape.c_out, sides[0] // 2, sides[1] // 2)
    if job.op == "fp8_chain":
        scales = {"y_scale": scale, "pooled_scale": scale}
        y, pooled = (torch.empty_like(t, dtype=E4M3) for t in (y, pooled))
        epilogue = Epilogue(y, per_channel, norm, 0.0, pooled, **scales)
    else:
        epilogue = Epilogue(y, per_channel, norm, 0.0, pooled if job.op == "fp8_pool" else None)
    return conv3x3_fp8.fp8_launch(quantised, up, weight, job.target, epilogue)
