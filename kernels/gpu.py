"""The device as numbers, read once and never at import, and the launch of one kernel on it, noted down where asked."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# Shared memory that one block may opt in to, in bytes, by compute capability (CUDA C Programming Guide, "Technical
# Specifications per Compute Capability", less the 1 KiB that the driver keeps for itself).
SHARED_MEMORY_LIMITS: Mapping[int, int] = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}

# Multiprocessors of the usual product of each capability: A100, RTX 3090, RTX 4090, H100, B200.
_USUAL_MULTIPROCESSORS: Mapping[int, int] = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148}


# Releases of Triton of which more is used than it promises: Gluon, and the inside of its launcher.
TRITON_VERSIONS = ("3.6", "3.7")
# Tensor maps kept of each descriptor, by address.
_MAPS = 32


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


def is_recording() -> bool:
    """Whether this thread notes down its launches."""
    return _noted.steps is not None


def note(step: Launch | Copy) -> None:
    """Add a step to what this thread notes down, if it does."""
    if _noted.steps is not None:
        _noted.steps.append(step)


@dataclass(frozen=True)
class Copy:
    """The values of source, in the order of out: what a launch reads that does not lie in memory as it must."""

    source: Tensor
    out: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """What it reads and writes."""
        return [self.source, self.out]

    def on(self, tensors: Sequence[Tensor]) -> Copy:
        """The same copy of other tensors."""
        return Copy(*tensors)

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

    @property
    def tensors(self) -> list[Tensor]:
        """What it reads and writes, by itself or through a descriptor, in the order of the kernel's parameters."""
        found = map(_tensor_of, self._values())
        return [t for t in found if t is not None]

    def on(self, tensors: Sequence[Tensor]) -> Launch:
        """The same launch on other tensors, which lie in memory as these do."""
        others = iter(tensors)
        arguments = {name: self.arguments[name] for name in self.kernel.arg_names}
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                arguments[name] = next(others)
            elif _tensor_of(value) is not None:
                arguments[name] = replace(value, base=next(others))
        return replace(self, arguments=arguments)

    @property
    def is_interpreted(self) -> bool:
        """Whether Triton's interpreter runs it."""
        from triton.runtime.jit import JITFunction

        return not isinstance(self.kernel, JITFunction)

    def run(self, device: torch.device) -> None:
        """Launch on `device`'s current stream. An empty grid launches nothing."""
        if self.grid == 0:
            return
        note(self)
        # What the interpreter itself asks of torch is nothing that a mode should see.
        unseen = _disable_current_modes() if self.is_interpreted else contextlib.nullcontext()
        with current(device), unseen:
            self.kernel[(self.grid,)](*self._values(), **self.options)

    def repeatable(self, device: torch.device) -> Callable[[], None]:
        """What launches the same again, on the stream that is current then.

        The caller makes the device the `current` one, once for many.
        """
        if self.is_interpreted or unknown_triton() is not None:
            return functools.partial(self.run, device)
        start, values, places = self._prepared(device)
        for t, (place, encode) in zip(self.tensors, places, strict=True):
            values[place] = encode(t.data_ptr())

        def repeat() -> None:
            note(self)
            start(*values)

        return repeat

    def on_addresses(self, device: torch.device) -> Callable[[Iterable[int]], None]:
        """What launches the same, as `repeatable` does, on memory that begins elsewhere: it takes the addresses of what
        are `tensors` here, as far from a boundary of 16 bytes as these. For a compiled kernel, of a Triton that is
        known.
        """
        start, template, places = self._prepared(device)

        def launch(addresses: Iterable[int]) -> None:
            values = template.copy()
            for address, (place, encode) in zip(addresses, places, strict=True):
                values[place] = encode(address)
            start(*values)

        return launch

    def compiled(self, device: torch.device) -> Any:
        """The kernel as it is compiled for this launch."""
        with current(device):
            return self.kernel.run(*self._values(), grid=(self.grid,), warmup=True, **self.options)

    def _prepared(
        self, device: torch.device
    ) -> tuple[Callable[..., None], list[Any], list[tuple[int, Callable[[int], Any]]]]:
        """What starts the kernel, the values that it takes but for those of `tensors`, and for each of these the place
        among the values and what it is made of an address.

        Triton looks at every argument of a launch for what the kernel is specialised to, and encodes its tensor
        descriptors for the driver: of one that is repeated the first is known, and the second changes with the address
        alone.
        """
        from triton.backends.nvidia import driver

        compiled, formats = _without_encoding(self.compiled(device))
        values: list[Any] = []
        places: list[tuple[int, Callable[[int], Any]]] = []
        for value in self._values():
            if isinstance(value, Tensor):
                places.append((len(values), int))
                values.append(None)
            elif _tensor_of(value) is not None:
                format = next(formats)
                places.append((len(values), _encoding(value, format)))
                values += [None, *driver.make_tensordesc_arg(value, format)[1:]]
            else:
                values.append(value)
        return _starter(compiled, self.grid), values, places

    def _values(self) -> list[Any]:
        """The arguments in the kernel's order, in which Triton takes them faster than by name."""
        return [self.arguments[name] for name in self.kernel.arg_names]


def _tensor_of(value: Any) -> Tensor | None:
    """An argument's tensor: itself, or a descriptor's."""
    t = value if isinstance(value, Tensor) else getattr(value, "base", None)
    return t if isinstance(t, Tensor) else None


def _without_encoding(compiled: Any) -> tuple[Any, Iterator[Any]]:
    """A compiled kernel that takes tensor maps instead of its descriptors, and the formats of these maps."""
    launcher = compiled.run
    if not inspect.isfunction(launcher.launch):  # It has no descriptors.
        return compiled, iter(())
    around = inspect.getclosurevars(launcher.launch).nonlocals
    compiled, launcher = copy.copy(compiled), copy.copy(launcher)
    launcher.launch, compiled._run = around["launcher"], launcher
    return compiled, iter(around["tensordesc_meta"])


def _starter(compiled: Any, grid: int) -> Callable[..., None]:
    """What starts a compiled kernel on the current stream. Only where someone has hooks there, as profilers do, is
    Triton's own way taken, which makes what hooks are told.
    """
    from triton import knobs
    from triton.runtime import driver

    with_hooks, run = compiled[(grid, 1, 1)], compiled.run
    function, metadata, settings = compiled.function, compiled.packed_metadata, knobs.runtime

    def start(*values: Any) -> None:
        if any(getattr(hook, "calls", hook) for hook in (settings.launch_enter_hook, settings.launch_exit_hook)):
            with_hooks(*values)
            return
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        run(grid, 1, 1, stream, function, metadata, None, None, None, *values)

    return start


@dataclass(frozen=True)
class _Address:
    """As much of a tensor as a descriptor is encoded by."""

    address: int

    def data_ptr(self) -> int:
        return self.address


def _encoding(descriptor: Any, format: Any) -> Callable[[int], Any]:
    """What gives the tensor map of such a descriptor at an address; a training step meets the same ones again."""
    from triton.backends.nvidia import driver

    if format is None:  # It is taken apart instead.
        return int
    empty = copy.copy(descriptor)
    empty.base = None

    def encode(address: int) -> Any:
        at = copy.copy(empty)
        at.base = _Address(address)
        return driver.make_tensordesc_arg(at, format)[0]

    return functools.lru_cache(_MAPS)(encode)


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which `device` is the current one; entering torch.cuda.device is not free, so only where it must."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return contextlib.nullcontext()
    return torch.cuda.device(device)
