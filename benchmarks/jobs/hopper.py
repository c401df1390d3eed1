"""The halo variant, for Hopper: all blocks that a search may try."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from fastunet.kernels import config, config_hopper, config_search, gpu

from . import Job

OPS = ("halo", "halo_pool", "halo_norm", "halo_leaky", "halo_head")
_SHAPES = (
    config.ConvShape(64, 0, 64, 512, 512),
    config.ConvShape(64, 64, 64, 512, 512),
    config.ConvShape(128, 0, 128, 256, 256),
)


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
        if not config_hopper.fits_halo(shape, dtype, target):
            continue
        first, *others = [
            chosen
            for chosen in config_search.feasible_conv_configs(shape, dtype, target, allow_tf32=False)
            if chosen.form == config.HALO
        ]
        in_full = dtype == torch.bfloat16
        for chosen in (first, *others) if in_full else (first,):
            # What wants most registers for all; the rest with the blocks that a search begins with.
            for op in OPS if chosen == first and in_full else ("halo_norm",):
                if op == "halo_head" and shape.c_out > chosen.block_n:
                    continue
                yield Job(op, dtype, allow_tf32, target.capability, HaloShape(shape, chosen))


def launch(job: Job) -> gpu.Launch:
    """The launch of one job."""
    from fastunet.kernels import conv3x3_hopper
    from fastunet.kernels.epilogue import Epilogue, Head, Normalisation

    shape, chosen = job.shape.conv, job.shape.chosen
    sides = shape.height, shape.width
    x = job.pixels(shape.c1, *sides)
    up = job.pixels(shape.c2, *sides) if shape.c2 else None
    weight = job.tensor(shape.c_out, shape.c1 + shape.c2, 3, 3, layout=torch.channels_last)
    y, per_channel = job.pixels(shape.c_out, *sides), torch.empty(shape.c_out, device="meta")
    pooled = job.pixels(shape.c_out, sides[0] // 2, sides[1] // 2) if job.op in ("halo_pool", "halo_norm") else None
    norm = Normalisation(per_channel, per_channel, per_channel, 1e-5) if job.op == "halo_norm" else None
    epilogue = Epilogue(y, per_channel, norm, 0.1 if job.op == "halo_leaky" else 0.0, pooled)
    if job.op == "halo_head":
        chosen = config.with_head(chosen)
        head = Head(job.tensor(2, shape.c_out, 1, 1), job.tensor(2), sigmoid=True)
        epilogue = Epilogue(None, per_channel, norm, 0.0, head=head, probabilities=job.pixels(2, *sides))
    return conv3x3_hopper.conv3x3_launch(x, up, weight, chosen, epilogue)
