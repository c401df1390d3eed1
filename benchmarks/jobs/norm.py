"""The norms: merging statistics, normalising, and the way back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fastunet.kernels import config_passes, gpu
from torch import Tensor

from . import Job

OPS = ("merge_statistics", "finish_statistics", "normalise", "norm_sums", "norm_grad")


def jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """shape: channels, and whether statistics are per image."""
    if allow_tf32 or dtype == torch.float16:
        return
    for op in OPS[:2]:
        yield from (Job(op, dtype, False, target.capability, (channels, False)) for channels in (16, 32))
    for channels in (*config_passes.norm_grad_configs(target).values(), 100):
        for op in OPS[2:]:
            yield from (Job(op, dtype, False, target.capability, (channels, per_image)) for per_image in (False, True))


def _statistics(*sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=torch.float32, device="meta")


def launch(job: Job) -> gpu.Launch:
    """The launch of one job."""
    from fastunet.kernels import norm, norm_grad
    from fastunet.kernels.epilogue import Statistics

    channels, per_image = job.shape
    groups = 2 if per_image else 1
    mean, parameter = _statistics(groups, channels), job.tensor(channels)
    if job.op in OPS[:2]:
        statistics = Statistics(_statistics(4096), _statistics(2, 4096, channels))
        launches = norm.merge_launches(statistics, groups, mean, mean, (parameter, parameter), 1e-5, 0.1)
        return launches[OPS.index(job.op)]
    affine = norm.Affine(mean, mean, parameter, parameter)
    raw, pooled = job.pixels(channels, 64, 64), job.pixels(channels, 32, 32)
    if job.op == "normalise":
        return norm.normalise_launch(raw, affine, raw, pooled, 0.0)
    launches = norm_grad.norm_grad_launches(
        raw,
        raw,
        pooled,
        affine,
        0.0,
        _statistics(groups, 2, channels),
        raw,
        statistics_given=False,
        target=job.target,
    )
    return launches[0 if job.op == "norm_sums" else 2]
