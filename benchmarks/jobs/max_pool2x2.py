"""The kernel of max_pool2x2; its gradient is one of the conv3x3 family's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fastunet.kernels import config_passes, gpu

from . import Job

OPS = ("max_pool",)


def jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """Every config in bf16, and with channels that load no vectors; of the other dtypes, and on sm_86, one."""
    if allow_tf32:
        return
    several = (*config_passes.pointwise_configs().values(), 100)
    for channels in several if dtype == torch.bfloat16 and target.capability != 86 else (64,):
        yield Job("max_pool", dtype, False, target.capability, channels)


def launch(job: Job) -> gpu.Launch:
    """The launch of one job."""
    from fastunet.kernels.max_pool2x2 import max_pool2x2_launch

    return max_pool2x2_launch(job.pixels(job.shape, 64, 64), job.pixels(job.shape, 32, 32))
