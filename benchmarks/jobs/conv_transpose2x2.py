"""The kernels of conv_transpose2x2: forward, with a channels_last and a contiguous weight, and both gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from fastunet.kernels import config_pixels, gpu

from . import Job

OPS = ("transpose", "transpose_contiguous", "transpose_grad", "transpose_weights")


def jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """Every config; of fp16, which compiles like bf16, and sm_86, like sm_89, the one for 64 channels on both sides."""
    make = functools.partial(Job, dtype=dtype, allow_tf32=allow_tf32, capability=target.capability)
    tiles = config_pixels.subpixel_tile_configs(dtype, target).values()
    forward = config_pixels.pixel_product_configs(dtype, target, allow_tf32=allow_tf32).values()
    weights = config_pixels.pixel_weight_grad_configs(dtype, target, allow_tf32=allow_tf32).values()
    if dtype == torch.float16 or target.capability == 86:
        forward = weights = [(64, 64)]
    for c_in, c_out in forward:
        yield make("transpose_grad", shape=(c_out, c_in))
        if (
            config_pixels.subpixel_tile_config(c_in, c_out, dtype, target) is None
        ):  # Else the descriptor form runs instead.
            yield make("transpose", shape=(c_in, c_out))
            if (c_in, c_out) == max(forward):
                yield make("transpose_contiguous", shape=(c_in, c_out))
    for channels in tiles:
        yield make("transpose", shape=channels)
    for channels in weights:
        yield make("transpose_weights", shape=channels)


def launch(job: Job) -> gpu.Launch:
    """The launch of one job; its shape is (input channels, output channels)."""
    from fastunet.kernels import conv_transpose2x2 as kernels
    from fastunet.kernels.pixel_weight_grad import pixel_weight_grad_launches
    from fastunet.kernels.pixels import LINEAR

    c_in, c_out = job.shape
    x, y = job.pixels(c_in, 32, 32), job.pixels(c_out, 64, 64)
    layout = torch.contiguous_format if job.op == "transpose_contiguous" else torch.channels_last
    weight, bias = job.tensor(c_in, c_out, 2, 2, layout=layout), job.tensor(c_out)
    options = {"allow_tf32": job.allow_tf32, "target": job.target}
    if job.op == "transpose_grad":
        return kernels.input_grad_launch(y, weight, x, **options)
    if job.op == "transpose_weights":
        sums = pixel_weight_grad_launches(
            y, x, None, weight, bias, subpixels=kernels.SUBPIXELS, activation=LINEAR.value, **options
        )
        return sums[0]
    return kernels.conv_transpose2x2_launch(x, weight, bias, y, **options)
