"""What there is to compile: for each family of kernels, every configuration that can be chosen, and its launch.

A job is named by its op, number format, target and shape; `launch_of` gives what the launchers would launch for it, on
tensors without memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from fastunet.kernels import gpu
from torch import Tensor

TARGETS = tuple(gpu.SHARED_MEMORY_LIMITS)
TRITON_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
}
_FORMATS = ((torch.bfloat16, False), (torch.float16, False), (torch.float32, False), (torch.float32, True))


@dataclass(frozen=True)
class Job:
    """One compilation. shape: what the family's launch needs to know, hashable; it prints as part of the row."""

    op: str
    dtype: torch.dtype
    allow_tf32: bool
    capability: int
    shape: Any

    @property
    def math(self) -> str:
        """The products' number format."""
        return "tf32" if self.allow_tf32 else TRITON_TYPES[self.dtype]

    @property
    def target(self) -> gpu.Target:
        """The usual GPU of the capability."""
        return gpu.known_target(self.capability)

    def tensor(self, *sizes: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        """A tensor without memory, of the job's dtype."""
        return torch.empty(sizes, dtype=self.dtype, device="meta", memory_format=layout)

    def pixels(self, channels: int, height: int, width: int) -> Tensor:
        """A channels_last batch of two images without memory."""
        return self.tensor(2, channels, height, width, layout=torch.channels_last)


class Family(NamedTuple):
    """Kernels of one kind: the names of their ops, and their jobs for a target, dtype and TF32.

    run: makes the launches of a job, and returns the number of the one it stands for.
    """

    ops: tuple[str, ...]
    jobs: Callable[[gpu.Target, torch.dtype, bool], Iterable[Job]]
    run: Callable[[Job], int]


def per_channel(*sizes: int) -> Tensor:
    """Return a float32 tensor without memory, as scales, statistics and sums are."""
    return torch.empty(sizes, dtype=torch.float32, device="meta")


def _families() -> tuple[Family, ...]:
    from . import convolutions, pointwise

    return convolutions.FAMILIES + pointwise.FAMILIES


def all_ops() -> tuple[str, ...]:
    """Return the names of all ops there are jobs for."""
    return tuple(op for family in _families() for op in family.ops)


def all_jobs() -> list[Job]:
    """Return everything there is to compile, family by family."""
    return [
        job
        for family, capability, (dtype, tf32) in itertools.product(_families(), TARGETS, _FORMATS)
        for job in family.jobs(gpu.known_target(capability), dtype, tf32)
    ]


def one_of_each(jobs: Iterable[Job]) -> list[Job]:
    """Return a job for each kernel and target: in bfloat16, of which most have their largest blocks last."""
    chosen: dict[Any, Job] = {}
    for job in jobs:
        key = launch_of(job).kernel, job.capability
        if key not in chosen or job.dtype == torch.bfloat16:
            chosen[key] = job
    return list(chosen.values())


def launch_of(job: Job) -> gpu.Launch:
    """Return what the launchers would launch for this job's shape on its target."""
    family = next(family for family in _families() if job.op in family.ops)
    with gpu.recording(job.target) as launches:
        number = family.run(job)
    return launches[number]


def describe(launch: gpu.Launch) -> str:
    """The configuration in short: the blocks in the kernel's order, warps, stages, or the slots of rings."""
    blocks, arguments = _blocks(launch.arguments), launch.arguments
    said = f"{'x'.join(map(str, blocks))} w{launch.num_warps}"
    if "SLOTS" not in arguments:
        return f"{said} s{launch.num_stages}"
    return f"{said} s{arguments['SLOTS']}/{arguments['WEIGHT_SLOTS']}" + " swapped" * arguments["SWAPPED"]


def _blocks(arguments: Any) -> Sequence[int]:
    return [value for name, value in arguments.items() if name.startswith(("TILE_", "BLOCK"))]
