"""The kernels of conv1x1: forward and both gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from fastunet.kernels import config_pixels, gpu

from . import Job

OPS = ("conv1x1", "conv1x1_grad", "conv1x1_weights")


def jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """Every config with softmax, which asks most of it; the other activations with two output channels.

    fp16, which compiles like bf16, and sm_86, which compiles like sm_89, with those and softmax alone.
    """
    make = functools.partial(Job, dtype=dtype, allow_tf32=allow_tf32, capability=target.capability)
    few = dtype == torch.float16 or target.capability == 86
    for activation in ("softmax",) if few else (None, "sigmoid", "softmax"):
        for op in OPS:
            yield make(op, shape=(64, 2, activation))
    if few:
        return
    for channels in config_pixels.head_configs(dtype, target, allow_tf32=allow_tf32, softmax=True).values():
        yield make("conv1x1", shape=(*channels, "softmax"))
    yield make("conv1x1_weights", shape=(17, 17, "softmax"))


def launch(job: Job) -> gpu.Launch:
    """The launch of one job; its shape is (input channels, output channels, activation)."""
    from fastunet.kernels import conv1x1 as kernels
    from fastunet.kernels.pixel_weight_grad import pixel_weight_grad_launches

    c_in, c_out, activation = job.shape
    x, y = job.pixels(c_in, 64, 64), job.pixels(c_out, 64, 64)
    weight, bias = job.tensor(c_out, c_in, 1, 1), job.tensor(c_out)
    output = None if activation is None else y
    if job.op == "conv1x1":
        options = {"activation": activation, "allow_tf32": job.allow_tf32, "target": job.target}
        return kernels.conv1x1_launch(x, weight, bias, y, **options)
    if job.op == "conv1x1_grad":
        return kernels.input_grad_launch(y, output, weight, x, activation=activation, allow_tf32=job.allow_tf32)
    options = {"subpixels": 1, "activation": kernels.ACTIVATIONS[activation]}
    options |= {"allow_tf32": job.allow_tf32, "target": job.target}
    return pixel_weight_grad_launches(y, x, output, weight, bias, **options)[0]
