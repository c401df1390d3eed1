"""The device as numbers, read once and never at import, and the launch of one kernel on it, noted down where asked."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Shared memory that one block may opt in to, in bytes, by compute capability (CUDA C Programming Guide, "Technical
# Specifications per Compute Capability", less the 1 KiB that the driver keeps for itself).
SHARED_MEMORY_LIMITS: Mapping[int, int] = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}

# Multiprocessors of the usual product of each capability: A100, RTX 3090, RTX 4090, H100, B200.
_USUAL_MULTIPROCESSORS: Mapping[int, int] = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148}


# Releases of Triton of which more is used than it promises: Gluon, and the inside of its launcher.
TRITON_VERSIONS = ("3.6", "3.7")


def unknown_triton() -> str | None:
    """The release of Triton where it is none of TRITON_VERSIONS, None where it is."""
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
    """The target of a capability in SHARED_MEMORY_LIMITS, for compiling without a GPU. KeyError for any other."""
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
    """The numbers of `device`: of the GPU for a CUDA device (cached), of the interpreter for any other."""
    if device.type != "cuda":
        return INTERPRETER
    return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)


def cdiv(a: int, b: int) -> int:
    """How many blocks of b cover a. Triton's own, which is for kernels too, takes some twenty times as long."""
    return -(-a // b)


class _Noted(threading.local):
    """The steps that this thread notes down, or None."""

    steps: list[Launch | Copy] | None = None


_noted = _Noted()


@contextlib.contextmanager
def recording() -> Iterator[list[Launch | Copy]]:
    """Within the block this thread's launches, and the copies that prepare them, are noted down as they run."""
    steps: list[Launch | Copy] = []
    before = _noted.steps
    _noted.steps = steps
    try:
        yield steps
    finally:
        _noted.steps = before


def note(step: Launch | Copy) -> None:
    """Add a step to what this thread notes down, if it does."""
    if _noted.steps is not None:
        _noted.steps.append(step)


@dataclass(frozen=True)
class Copy:
    """The values of source, in the order of out: what a launch reads that does not lie in memory as it must."""

    source: Tensor
    out: Tensor

    def run(self, device: torch.device) -> None:
        """Copy on the current stream."""
        note(self)
        self.out.copy_(self.source)

    def repeatable(self, device: torch.device) -> Callable[[], None]:
        """What copies."""
        return functools.partial(self.run, device)


def contiguous_copy(source: Tensor) -> Tensor:
    """A copy of source whose elements lie in its dimensions' order."""
    out = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    Copy(source, out).run(source.device)
    return out


@dataclass(frozen=True)
class Launch:
    """One kernel with everything it is launched with: what runs on a GPU is what `benchmarks.static` compiles.

    grid: number of programs, one-dimensional because only x may exceed 65535. arguments: by the kernel's parameter
    names, constexprs included; a None pointer is compiled away. max_registers: per thread, None leaves it to ptxas.
    product_rows: rows of its matrix products' result, which decide the tensor-core instruction; 0 where it has none.
    computes_operand: the products' first operand is computed, and so comes from registers.
    """

    kernel: Any
    grid: int
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    product_rows: int = 0
    computes_operand: bool = False

    @property
    def options(self) -> dict[str, int | None]:
        """The options Triton compiles with."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}

    def run(self, device: torch.device) -> None:
        """Launch on `device`'s current stream. An empty grid launches nothing."""
        self.launched(device)

    def repeatable(self, device: torch.device) -> Callable[[], None]:
        """Launch, and give what launches the same again, on the stream that is current then.

        The caller makes the device the `current` one, once for many.

        Triton looks at every argument of a launch for what the kernel is specialised to, and encodes its tensor
        descriptors for the driver; of one repeated both are known.
        """
        compiled = self.launched(device)
        if compiled is None:  # Interpreted, or nothing to launch.
            return functools.partial(self.run, device)
        compiled, values = _with_encoded_descriptors(compiled, self._values())
        start = compiled[(self.grid, 1, 1)]

        def repeat() -> None:
            note(self)
            start(*values)

        return repeat

    def launched(self, device: torch.device) -> Any:
        """Launch as `run` does; the compiled kernel, or None where none was."""
        if self.grid == 0:
            return None
        note(self)
        with current(device):
            return self.kernel[(self.grid,)](*self._values(), **self.options)

    def _values(self) -> list[Any]:
        """The arguments in the kernel's order, in which Triton takes them faster than by name."""
        return [self.arguments[name] for name in self.kernel.arg_names]


def _with_encoded_descriptors(compiled: Any, values: list[Any]) -> tuple[Any, list[Any]]:
    """A compiled kernel that takes the tensor maps of its descriptors instead of these, and the arguments it takes.

    Of a Triton whose launcher is not known, and where there are no descriptors, both as they are.
    """
    launcher = compiled.run
    if unknown_triton() is not None or not inspect.isfunction(launcher.launch):
        return compiled, values
    from triton.backends.nvidia import driver

    around = inspect.getclosurevars(launcher.launch).nonlocals
    formats = iter(around["tensordesc_meta"])
    encoded: list[Any] = []
    for i, value in enumerate(values):
        is_descriptor = i in around["tensordesc_indices"]
        encoded += driver.make_tensordesc_arg(value, next(formats)) if is_descriptor else [value]
    compiled, launcher = copy.copy(compiled), copy.copy(launcher)
    launcher.launch, compiled._run = around["launcher"], launcher
    return compiled, encoded


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which `device` is the current one; entering torch.cuda.device is not free, so only where it must."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return contextlib.nullcontext()
    return torch.cuda.device(device)
