"""Kernels compiled ahead of time, in a process of their own, for tests that look at what came of them."""

from __future__ import annotations

from typing import Any

from fastunet.benchmarks import launches, static
from fastunet.benchmarks.harness.worker import Spawned
from fastunet.kernels import gpu
from fastunet.kernels.conv3x3.config import ConvShape

from fastunet.testing import parity

_REGISTERS = 65536
# What the driver keeps of a multiprocessor's shared memory for each program.
_KEPT = 1024


def compiled(
    op: str, shape: ConvShape, kernel: str, capability: int, math: str = "bfloat16"
) -> tuple[static.Compiled, int]:
    """Return what ptxas made of the last launch of a kernel by an op, in inference or training, on an image of that
    shape, and how many programs a multiprocessor holds, by registers and by shared memory.
    """
    return _compiler.ask((op, shape, kernel, capability, math), 300.0)


def _compile(wanted: tuple[str, ConvShape, str, int, str]) -> tuple[static.Compiled, int]:
    op, shape, kernel, capability, math = wanted
    call = launches._call(launches._case(op, shape), parity.FORMATS[math][0])
    recorded = launches.record(call, math, capability)
    launch: Any = [each for each in recorded if each.kernel.__name__ == kernel][-1]
    result = static.compile_launch(launch, capability)
    by_registers = _REGISTERS // (32 * launch.num_warps * -(-result.registers // 8) * 8)
    shared = gpu.SHARED_MEMORY_LIMITS[capability] + _KEPT
    return result, min(by_registers, shared // (result.shared_memory + _KEPT))


_compiler = Spawned(_compile)
