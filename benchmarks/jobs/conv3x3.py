"""The conv3x3 kernels: forward, input gradient, weight gradient, and the pass through activation and pooling."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
from fastunet.kernels import config, gpu

from . import Job

OPS = (
    *("forward", "pool", "two_inputs", "contiguous_weight", "leaky", "input_grad"),
    *("weight_grad", "bias_grad", "activation_grad", "unpool"),
)


def jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """bf16 and both kinds of float32 in full; fp16, which compiles alike, where both sides have 64 channels."""
    found = _jobs(target, dtype, allow_tf32)
    if dtype == torch.float16:
        return (job for job in found if job.shape.c1 == job.shape.c_out == 64)
    return found


def _jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    make = functools.partial(Job, dtype=dtype, allow_tf32=allow_tf32, capability=target.capability)
    shapes = config.conv_configs(dtype, target, allow_tf32=allow_tf32).values()
    for shape in shapes:
        for op in ("forward", "pool", "input_grad"):
            yield make(op, shape=shape)
        if shape.c1 >= config.FOLDED_BELOW:
            yield make("two_inputs", shape=replace(shape, c2=shape.c1))
            if shape.aligned:
                yield make("contiguous_weight", shape=shape)
    for c_in, c_out in config.weight_grad_configs(dtype, target, allow_tf32=allow_tf32).values():
        yield make("bias_grad", shape=config.ConvShape(c_in, 0, c_out, 64, 64))
    widest = max((shape for shape in shapes if shape.aligned), key=lambda shape: (shape.c1, shape.c_out))
    for op in ("leaky", "weight_grad"):
        yield make(op, shape=widest)
    if not allow_tf32:
        yield make("activation_grad", shape=widest)
        for channels in (*config.pointwise_configs().values(), 3, 100):  # The last two load no vectors.
            yield make("unpool", shape=replace(widest, c_out=channels))


def launch(job: Job) -> gpu.Launch:
    """The launch of one job."""
    from fastunet.kernels import conv3x3, conv3x3_grad  # Late: triton is imported by the compiling process alone.

    shape = job.shape
    sides = shape.height, shape.width
    x, y = job.pixels(shape.c1, *sides), job.pixels(shape.c_out, *sides)
    bias = job.tensor(shape.c_out)
    pooled = job.pixels(shape.c_out, sides[0] // 2, sides[1] // 2) if job.op in ("pool", "unpool") else None
    if job.op in ("activation_grad", "unpool"):
        return conv3x3_grad.activation_grad_launch(y, y, pooled, y, 0.0)
    if job.op in ("weight_grad", "bias_grad"):
        weight = job.tensor(shape.c_out, shape.c1, 3, 3, layout=torch.channels_last)
        grad_bias = None if job.op == "weight_grad" else bias
        options = {"allow_tf32": job.allow_tf32, "target": job.target}
        return conv3x3_grad.weight_grad_launches(y, x, weight, grad_bias, **options)[0]
    input_grad = job.op == "input_grad"
    layout = torch.contiguous_format if job.op == "contiguous_weight" else torch.channels_last
    sizes = (shape.c1, shape.c_out) if input_grad else (shape.c_out, shape.c1 + shape.c2)
    return conv3x3.conv3x3_launch(
        x,
        job.pixels(shape.c2, *sides) if shape.c2 else None,
        job.tensor(*sizes, 3, 3, layout=layout),
        None if input_grad else bias,
        y,
        pooled,
        negative_slope=None if input_grad else 0.1 if job.op == "leaky" else 0.0,
        input_grad=input_grad,
        allow_tf32=job.allow_tf32,
        target=job.target,
    )
