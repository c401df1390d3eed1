"""Kernels compiled ahead of time, in a process of their own, for tests that look at what came of them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from fastunet.benchmarks import launches, static
from fastunet.benchmarks.harness.worker import Spawned
from fastunet.kernels import gpu
from fastunet.kernels.conv3x3.config import ConvShape

from fastunet.testing import parity

_REGISTERS = 65536
# What the driver keeps of a multiprocessor's shared memory for each program.
_KEPT = 1024


class Wanted(NamedTuple):
    """The last launch of a kernel by an op, in inference or training, on an image of that shape."""

    op: str
    shape: ConvShape
    kernel: str
    capability: int
    math: str = "bfloat16"


class Found(NamedTuple):
    """What ptxas made of it, and how many programs a multiprocessor holds, by registers and by shared memory."""

    compiled: static.Compiled
    programs: int


@functools.cache
def compiled(wanted: Wanted) -> Found:
    """Return what the compiler makes of a launch."""
    return _compiler.ask(wanted, 300.0)


def _compile(wanted: Wanted) -> Found:
    call = launches._call(launches._case(wanted.op, wanted.shape), parity.FORMATS[wanted.math][0])
    recorded = launches.record(call, wanted.math, wanted.capability)
    launch: Any = [each for each in recorded if each.kernel.__name__ == wanted.kernel][-1]
    result = static.compile_launch(launch, wanted.capability)
    by_registers = _REGISTERS // (32 * launch.num_warps * -(-result.registers // 8) * 8)
    shared = gpu.SHARED_MEMORY_LIMITS[wanted.capability] + _KEPT
    return Found(result, min(by_registers, shared // (result.shared_memory + _KEPT)))


_compiler = Spawned(_compile)
