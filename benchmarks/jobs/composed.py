"""An upsampling composed with the 3x3 convolution after it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fastunet.kernels import config, gpu

from . import Job

OPS = ("composed", "composed_bias", "composed_odd")
_SHAPES = tuple(
    config.ConvShape(c1, 2 * c1, c_out, side, side)
    for c1, c_out in ((16, 64), (32, 64), (64, 64), (128, 128), (64, 128), (64, 192), (48, 96), (32, 40))
    for side in (256, 64, 32, 8)
)


def jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """With every block there is: without norm or bias, and with both norm and the upsampling's bias, of a skip of even
    sides and of odd ones.
    """
    fitting = [shape for shape in _SHAPES if _fits(shape, dtype, target)]
    shapes = {config.composed_config(shape, dtype, target): shape for shape in fitting}
    for shape in shapes.values():
        for op in OPS:
            yield Job(op, dtype, allow_tf32, target.capability, shape)


def _fits(shape: config.ConvShape, dtype: torch.dtype, target: gpu.Target) -> bool:
    return config.fits_descriptors(dtype, target, (shape.c1, shape.c2), (shape.c_out,))


def launch(job: Job) -> gpu.Launch:
    """The launch of one job."""
    from fastunet.kernels import conv_transpose2x2_concat_conv3x3 as kernels
    from fastunet.kernels.epilogue import Epilogue, Normalisation

    shape, sides = job.shape, (job.shape.height, job.shape.width)
    doubled = tuple(2 * side + (job.op == "composed_odd") for side in sides)
    per_channel, border = (torch.empty(size, device="meta") for size in ((shape.c_out,), (4, 3, 3, shape.c_out)))
    of_skip, of_low = job.tensor(shape.c_out, 9 * shape.c1), job.tensor(4 * shape.c_out, 4 * shape.c2)
    with_bias = job.op != "composed"
    weights = kernels.Composed(of_skip, of_low, border if with_bias else None)
    norm = Normalisation(per_channel, per_channel, per_channel, 1e-5) if with_bias else None
    epilogue = Epilogue(job.pixels(shape.c_out, *doubled), per_channel if with_bias else None, norm, 0.0)
    images = job.pixels(shape.c1, *doubled), job.pixels(shape.c2, *sides)
    return kernels.launch(*images, weights, config.composed_config(shape, job.dtype, job.target), epilogue)
