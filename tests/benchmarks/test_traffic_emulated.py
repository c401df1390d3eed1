"""The bytes that launches of Hopper's kernel are said to move, against those that a model of the hardware accesses."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, for the kernel's constants and descriptors")

from counted_accesses import with_memory
from fastunet.benchmarks import access_counts
from fastunet.benchmarks.access_counts import traffic_of
from fastunet.benchmarks.jobs import Job, launch_of
from fastunet.benchmarks.jobs.convolutions import HALO_OPS, HaloShape
from fastunet.kernels import gpu
from fastunet.kernels.conv3x3 import config, config_hopper, hopper, hopper_epilogue
from fastunet.kernels.conv3x3.config import ConvShape
from gluon_source import run

MODULES = (hopper_epilogue, hopper)
HOPPER = gpu.known_target(90)
# 33x20 pixels leave the last tiles partly outside, on both sides; 80 channels the last block.
_ONE, _TWO, _SEVERAL = ConvShape(64, 0, 64, 33, 20), ConvShape(64, 64, 64, 33, 20), ConvShape(64, 0, 80, 20, 12)


def job(op: str, shape: ConvShape, swapped: bool = False) -> Job:
    chosen = config.ConvConfig(16, 8, 64, 64, 4, 2, config.HALO, weight_stages=4, swapped=swapped)
    return Job(op, torch.bfloat16, False, 90, HaloShape(shape, chosen))


JOBS = [
    *(job(op, _ONE) for op in HALO_OPS),
    job("halo_pool", _TWO, swapped=True),
    job("halo", _SEVERAL, swapped=True),
]


def accessed(launch: gpu.Launch) -> dict[str, tuple[int, int]]:
    """By argument, how many of its elements are loaded and stored on the model."""
    memory = run(MODULES, launch, seed=0)
    found = {}
    for name, value in memory.arguments.items():
        if hasattr(value, "loaded"):
            found[name] = value.loaded, int(value.written.sum())
    return found


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job.op}-{job.shape.conv}")
def test_traffic_is_what_the_kernel_accesses(job: Job) -> None:
    launch = with_memory(launch_of(job))
    seen = accessed(launch)
    bytes_of = {name: access_counts.tensor_of(launch.arguments[name]).element_size() for name in seen}
    traffic = traffic_of(launch)
    assert traffic.loaded == sum(loaded * bytes_of[name] for name, (loaded, _) in seen.items())
    assert traffic.stored == traffic.written == sum(stored * bytes_of[name] for name, (_, stored) in seen.items())
    assert traffic.read < traffic.loaded


def test_halo_reuse_loads_a_third_of_the_pixels() -> None:
    """Of a tile of 32x8 pixels: 3 * 34 rows of 8 in place of 9 * 32."""
    shape = ConvShape(64, 0, 64, 512, 512)
    loads = {}
    for op, each in {"forward": shape, "halo": HaloShape(shape, config_hopper.halo_config(shape, HOPPER))}.items():
        launch = launch_of(Job(op, torch.bfloat16, False, 90, each))
        loads[op] = access_counts.COUNTS[launch.kernel.fn.__name__](launch.arguments, launch.grid).loads["x_desc"]
    assert 2.8 < loads["forward"] / loads["halo"] < 2.9
