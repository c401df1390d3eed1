"""The kernel with halo reuse, on sm_90: all blocks that a search may try, with each epilogue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from fastunet.kernels import config, config_search, gpu

from . import Job

OPS = ("halo", "halo_pool", "halo_two_inputs", "halo_norm", "halo_leaky")
_SHAPES = (config.ConvShape(64, 0, 64, 512, 512), config.ConvShape(128, 0, 128, 256, 256))


@dataclass(frozen=True)
class HaloShape:
    """A convolution and its blocks."""

    conv: config.ConvShape
    chosen: config.ConvConfig


def jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """bf16 in full; fp16, which compiles alike, with the derived blocks."""
    if allow_tf32:
        return
    for shape in _SHAPES:
        if not config.fits_halo(shape, dtype, target):
            continue
        derived = config.halo_config(shape, target)
        found = config_search.feasible_conv_configs(shape, dtype, target, allow_tf32=False)
        halos = [each for each in found if each.form == config.HALO and (dtype == torch.bfloat16 or each == derived)]
        for chosen in halos:
            for op in OPS if dtype == torch.bfloat16 else OPS[:1]:
                yield Job(op, dtype, allow_tf32, target.capability, HaloShape(shape, chosen))


def launch(job: Job) -> gpu.Launch:
    """The launch of one job."""
    from fastunet.kernels import conv3x3_hopper
    from fastunet.kernels.epilogue import Epilogue, Normalisation

    shape, chosen = job.shape.conv, job.shape.chosen
    sides = shape.height, shape.width
    x = job.pixels(shape.c1, *sides)
    up = job.pixels(shape.c1, *sides) if job.op == "halo_two_inputs" else None
    weight = job.tensor(shape.c_out, shape.c1 * (1 if up is None else 2), 3, 3, layout=torch.channels_last)
    y, per_channel = job.pixels(shape.c_out, *sides), torch.empty(shape.c_out, device="meta")
    pooled = job.pixels(shape.c_out, sides[0] // 2, sides[1] // 2) if job.op == "halo_pool" else None
    norm = Normalisation(per_channel, per_channel, per_channel, 1e-5) if job.op == "halo_norm" else None
    epilogue = Epilogue(y, per_channel, norm, 0.1 if job.op == "halo_leaky" else 0.0, pooled)
    return conv3x3_hopper.conv3x3_launch(x, up, weight, chosen, epilogue)
