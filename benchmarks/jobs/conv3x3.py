"""The conv3x3 kernels: forward, input gradient, weight gradient, and the pass through activation and pooling."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
from fastunet.kernels import config, config_passes, gpu

from . import Job

OPS = (
    *("forward", "pool", "two_inputs", "contiguous_weight", "leaky", "norm", "head", "statistics"),
    *("input_grad", "masked_input_grad", "two_input_grads", "weight_grad", "bias_grad", "activation_grad", "unpool"),
    *("split", "finish_split"),
)


def jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """bf16 and both kinds of float32 in full; fp16, which compiles alike, where both sides have 64 channels."""
    found = _jobs(target, dtype, allow_tf32)
    if dtype == torch.float16:
        return (job for job in found if job.shape.c1 == job.shape.c_out == 64)
    return found


def _jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    make = functools.partial(Job, dtype=dtype, allow_tf32=allow_tf32, capability=target.capability)
    shapes = config.conv_configs(dtype, target, allow_tf32=allow_tf32)
    for (chosen, aligned), shape in shapes.items():
        for op in ("forward", "pool", "input_grad", "statistics"):
            yield make(op, shape=shape)
        if chosen.form != config.FOLDED:
            yield make("two_inputs", shape=replace(shape, c2=shape.c1))
            yield make("two_input_grads", shape=replace(shape, c_out2=shape.c_out))
            if chosen.form == config.POINTER and aligned:
                yield make("contiguous_weight", shape=shape)
        if shape.c_out <= chosen.block_n:
            yield make("head", shape=shape)
    for shape in config.weight_grad_configs(dtype, target, allow_tf32=allow_tf32).values():
        yield make("bias_grad", shape=shape)
    widest = max(
        (shape for (_, aligned), shape in shapes.items() if aligned), key=lambda shape: (shape.c1, shape.c_out)
    )
    for op in ("leaky", "norm", "masked_input_grad", "weight_grad"):
        yield make(op, shape=widest)
    for deep in dict.fromkeys(_deep(shape) for shape in shapes.values()):
        chosen = config.derived_conv_config(deep, dtype, target, allow_tf32)
        if config.splittings(chosen, deep, target):
            yield make("split", shape=deep)
    yield make("finish_split", shape=_deep(widest))
    if not allow_tf32:
        yield make("activation_grad", shape=widest)
        for channels in (*config_passes.pointwise_configs().values(), 3, 100):  # The last two load no vectors.
            yield make("unpool", shape=replace(widest, c_out=channels))


def _deep(shape: config.ConvShape) -> config.ConvShape:
    """Two inputs of many channels, as where sums are split: with blocks for which `shape` stands."""
    return replace(shape, c1=16 * shape.c1, c2=16 * shape.c1, height=8, width=8)


def launch(job: Job) -> gpu.Launch:
    """The launch of one job."""
    if job.op in ("split", "finish_split"):
        return _split(job)
    if job.op in ("activation_grad", "unpool"):
        return _activation_grad(job)
    if job.op in ("weight_grad", "bias_grad"):
        return _weight_grad(job)
    if "input_grad" in job.op:
        return _input_grad(job)
    return _forward(job)


def _forward(job: Job) -> gpu.Launch:
    from fastunet.kernels import conv3x3  # Late, as below: triton is imported by the compiling process alone.
    from fastunet.kernels.epilogue import Epilogue, Head, Normalisation, Statistics

    shape = job.shape
    sides = shape.height, shape.width
    x, up = job.pixels(shape.c1, *sides), job.pixels(shape.c2, *sides) if shape.c2 else None
    layout = torch.contiguous_format if job.op == "contiguous_weight" else torch.channels_last
    weight = job.tensor(shape.c_out, shape.c1 + shape.c2, 3, 3, layout=layout)
    y, per_channel = job.pixels(shape.c_out, *sides), job.tensor(shape.c_out)
    chosen = conv3x3.choose(x, up, weight, job.target, allow_tf32=job.allow_tf32)
    if job.op == "statistics":
        chosen = config.with_statistics(chosen)
        tiles = 2 * config.tiles_per_image(chosen, *sides)
        count, partial = (torch.empty(s, dtype=torch.float32, device="meta") for s in (tiles, (2, tiles, shape.c_out)))
        epilogue = Epilogue(y, statistics=Statistics(count, partial))
    elif job.op == "head":
        chosen = config.with_head(chosen)
        head = Head(job.tensor(2, shape.c_out, 1, 1), job.tensor(2), sigmoid=True)
        norm = Normalisation(per_channel, per_channel, per_channel, 1e-5)
        probabilities = job.pixels(2, *sides)
        epilogue = Epilogue(None, per_channel, norm, 0.0, head=head, probabilities=probabilities)
    else:
        norm = Normalisation(per_channel, per_channel, per_channel, 1e-5) if job.op == "norm" else None
        pooled = job.pixels(shape.c_out, sides[0] // 2, sides[1] // 2) if job.op == "pool" else None
        epilogue = Epilogue(y, per_channel, norm, 0.1 if job.op == "leaky" else 0.0, pooled)
    return conv3x3.conv3x3_launch(x, up, weight, chosen, epilogue, allow_tf32=job.allow_tf32)


def _split(job: Job) -> gpu.Launch:
    from fastunet.kernels import conv3x3_split
    from fastunet.kernels.epilogue import Epilogue, Normalisation

    shape, sides = job.shape, (job.shape.height, job.shape.width)
    x, up = job.pixels(shape.c1, *sides), job.pixels(shape.c2, *sides) if shape.c2 else None
    weight = job.tensor(shape.c_out, shape.c1 + shape.c2, 3, 3, layout=torch.channels_last)
    chosen = config.derived_conv_config(shape, job.dtype, job.target, job.allow_tf32)
    y, per_channel = job.pixels(shape.c_out, *sides), job.tensor(shape.c_out)
    pooled = job.pixels(shape.c_out, sides[0] // 2, sides[1] // 2)
    epilogue = Epilogue(y, per_channel, Normalisation(per_channel, per_channel, per_channel, 1e-5), 0.0, pooled)
    given = {"allow_tf32": job.allow_tf32}
    both = conv3x3_split.launches(x, up, weight, replace(chosen, splits=2), epilogue, **given)
    return both[0] if job.op == "split" else both[1]


def _input_grad(job: Job) -> gpu.Launch:
    from fastunet.kernels import conv3x3_grad

    shape = job.shape
    sides = shape.height, shape.width
    grad, out = job.pixels(shape.c1, *sides), job.pixels(shape.c_out, *sides)
    out_up = job.pixels(shape.c_out2, *sides) if shape.c_out2 else None
    weight = job.tensor(shape.c1, shape.c_out + shape.c_out2, 3, 3, layout=torch.channels_last)
    x, slope = (out, 0.0) if job.op == "masked_input_grad" else (None, None)
    options = {"allow_tf32": job.allow_tf32, "target": job.target}
    return conv3x3_grad.input_grad_launch(grad, weight, (out, out_up), x, slope, **options)


def _weight_grad(job: Job) -> gpu.Launch:
    from fastunet.kernels import conv3x3_grad

    shape = job.shape
    x, y = (job.pixels(c, shape.height, shape.width) for c in (shape.c1, shape.c_out))
    weight = job.tensor(shape.c_out, shape.c1, 3, 3, layout=torch.channels_last)
    bias = None if job.op == "weight_grad" else job.tensor(shape.c_out)
    options = {"allow_tf32": job.allow_tf32, "target": job.target}
    return conv3x3_grad.weight_grad_launches(y, x, weight, bias, **options)[0]


def _activation_grad(job: Job) -> gpu.Launch:
    from fastunet.kernels import activation_grad

    shape = job.shape
    y = job.pixels(shape.c_out, shape.height, shape.width)
    pooled = job.pixels(shape.c_out, shape.height // 2, shape.width // 2) if job.op == "unpool" else None
    return activation_grad.activation_grad_launch(y, y, pooled, y, 0.0)
