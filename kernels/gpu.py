"""The device as numbers, read once and never at import, and the launch of one kernel on it."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Shared memory that one block may opt in to, in bytes, by compute capability (CUDA C Programming Guide, "Technical
# Specifications per Compute Capability", less the 1 KiB that the driver keeps for itself).
SHARED_MEMORY_LIMITS: Mapping[int, int] = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}

# Multiprocessors of the usual product of each capability: A100, RTX 3090, RTX 4090, H100, B200.
_USUAL_MULTIPROCESSORS: Mapping[int, int] = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148}


# Releases of Triton whose Gluon, which promises no stability, the Hopper variant is written for. From 3.8 on a view of
# shared memory must be as large as what it is taken from: of a ring of rows there is no view that begins at any row, by
# which three taps read the same pixels.
TRITON_VERSIONS = ("3.6", "3.7")


def unknown_triton() -> str | None:
    """Return the release of Triton where it is none of TRITON_VERSIONS, None where it is."""
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    return None if version in TRITON_VERSIONS else version


@dataclass(frozen=True)
class Target:
    """What a launch configuration may depend on.

    capability: major * 10 + minor, 90 for sm_90. shared_memory: bytes one block may use. multiprocessors: a count.
    """

    capability: int
    shared_memory: int
    multiprocessors: int
    name: str


# Triton's interpreter runs programs one after the other: few, so that splits stay few too.
INTERPRETER = Target(capability=80, shared_memory=SHARED_MEMORY_LIMITS[80], multiprocessors=4, name="interpreter")


def known_target(capability: int) -> Target:
    """Return target of a capability in SHARED_MEMORY_LIMITS, for compiling without a GPU. KeyError for any other."""
    return Target(
        capability, SHARED_MEMORY_LIMITS[capability], _USUAL_MULTIPROCESSORS[capability], name=f"sm_{capability}"
    )


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(
        capability=properties.major * 10 + properties.minor,
        shared_memory=getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block),
        multiprocessors=properties.multi_processor_count,
        name=properties.name,
    )


def target(device: torch.device) -> Target:
    """Return the numbers of `device`: of the GPU for a CUDA device (cached), of the interpreter for any other, unless
    `recording` has another.
    """
    if _recorder.target is not None:
        return _recorder.target
    if device.type != "cuda":
        return INTERPRETER
    return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)


def cdiv(a: int, b: int) -> int:
    """Return how many blocks of b cover a. Triton's own, which is for kernels too, takes some twenty times as long."""
    return -(-a // b)


class Config:
    """How a kernel is launched, chosen by a pure function. Fields named tile_* and block_* are its kernel's constants.

    max_registers: per thread, None leaves it to ptxas.
    """

    num_warps: int
    num_stages: int
    max_registers: int | None

    def constants(self) -> dict[str, int]:
        """Return the kernel's constants, by their names in capitals."""
        return {name.upper(): value for name, value in vars(self).items() if name.startswith(("tile_", "block_"))}


class _Recorder(threading.local):
    """The launches that this thread records, or None, and the target they are made for if it is not their device."""

    launches: list[Launch] | None = None
    target: Target | None = None


_recorder = _Recorder()


@contextlib.contextmanager
def recording(target: Target | None = None) -> Iterator[list[Launch]]:
    """Record this thread's launches within the block, for benchmarks and tests that look at them.

    target: what the launches are made for, in place of the tensors' device; then they do not run.
    """
    before = _recorder.launches, _recorder.target
    _recorder.launches, _recorder.target = [], target
    try:
        yield _recorder.launches
    finally:
        _recorder.launches, _recorder.target = before


@dataclass(frozen=True)
class Launch:
    """One kernel with everything it is launched with: what runs on a GPU is what `benchmarks static` compiles.

    grid: number of programs, one-dimensional because only x may exceed 65535. arguments: by the kernel's parameter
    names, constexprs included; a None pointer is compiled away. max_registers: per thread, None leaves it to ptxas.
    """

    kernel: Any
    grid: int
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int | bool | None]:
        """Return the options Triton compiles with.

        A product and a sum may become one rounding, by default until Triton 3.10. No bound of errors rests on it, but
        epilogues and norms have half the instructions.
        """
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
            "enable_fp_fusion": True,
        }

    def run(self, device: torch.device) -> None:
        """Launch on `device`'s current stream. An empty grid launches nothing."""
        if self.grid == 0:
            return
        if _recorder.launches is not None:
            _recorder.launches.append(self)
        if _recorder.target is not None:
            return
        with current(device):
            # Triton takes arguments by position in less host time than by name.
            self.kernel[(self.grid,)](*(self.arguments[name] for name in self.kernel.arg_names), **self.options)


# Constants of kernels, each the row_unit of those of these arguments that the kernel has: all by which rows of channels
# go, or, where a head's few classes are not to decide how its input loads, one of them.
_UNITS = {"UNIT": ("C", "C1", "C2", "COUT", "stride_out", "stride_tap"), "UNIT_C": ("C",), "UNIT_COUT": ("COUT",)}


def row_unit(*sizes: int) -> int:
    """Return how many channels a vector may hold where rows begin at multiples of these sizes: 1, 2, 4 or 8."""
    return math.gcd(8, *sizes)


def launch(kernel: Any, grid: int, arguments: Mapping[str, Any], chosen: Config) -> Launch:
    """Return the launch of a kernel with what it takes of the arguments, of its config's constants, and of the units of
    its rows: by itself Triton knows multiples of 16 alone.
    """
    found = {**arguments, **chosen.constants()}
    for unit in _UNITS.keys() & set(kernel.arg_names):
        found[unit] = row_unit(*(found[name] for name in _UNITS[unit] if name in kernel.arg_names))
    found = {name: found[name] for name in kernel.arg_names}
    return Launch(kernel, grid, found, chosen.num_warps, chosen.num_stages, chosen.max_registers)


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which `device` is the current one; entering torch.cuda.device is not free, so only where it
    must.
    """
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return contextlib.nullcontext()
    return torch.cuda.device(device)
