"""The sum of partial sums."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fastunet.kernels import gpu

from . import Job

OPS = ("sum_rows",)


def jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """One for each dtype of the sums: with one output and with two."""
    if not allow_tf32:
        yield from (Job("sum_rows", dtype, False, target.capability, outputs) for outputs in (1, 2))


def launch(job: Job) -> gpu.Launch:
    """The launch of one job."""
    from fastunet.kernels.reduction import sum_rows_launch

    partial = torch.empty(16, 4096, dtype=torch.float32, device="meta")
    if job.shape == 1:
        return sum_rows_launch(partial, job.tensor(4096))
    return sum_rows_launch(partial, job.tensor(4032), job.tensor(64))
