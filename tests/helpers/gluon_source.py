"""The halo variant's kernel run on the model of `emulated_cta`, from its own source: the arithmetic of slots, phases
and arrivals that runs is the one that is compiled.

Every jitted function of MODULES becomes a generator, and every call that can wait or race a step of it. What the
launcher gives the kernel is taken as it is: descriptors of CPU tensors become boxes of float64 arrays.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Sequence
from types import CodeType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from emulated_cta import Barrier, Cta, Descriptor, Fault, Registers, Steps, registers
from fastunet.kernels.conv3x3 import hopper, hopper_epilogue
from torch import Tensor

# A text of the kernel's source, and what stands there instead.
Edit = tuple[str, str]
MODULES = (hopper_epilogue, hopper)
# Calls that take time on the hardware, or must not be moved past each other.
_STEPS = {
    *("wait", "arrive", "expect", "async_copy_global_to_shared", "async_copy_shared_to_global", "store_wait"),
    *("warpgroup_mma", "warpgroup_mma_wait", "fence_async_shared", "warp_specialize"),
}


class _Weave(ast.NodeTransformer):
    """f(...) becomes (yield from f(...)) for jitted functions and for what takes a step."""

    def __init__(self, functions: set[str]) -> None:
        self.functions = functions

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list = []
        for argument in node.args.args:
            argument.annotation = None
        self.generic_visit(node)
        node.body.insert(0, ast.parse("if False: yield").body[0])
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.Assign:
        self.generic_visit(node)
        assert node.value is not None
        return ast.Assign(targets=[node.target], value=node.value)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        function = node.func
        if isinstance(function, ast.Attribute):
            # Shared memory is stored to by a method; barriers and copies are functions of modules.
            takes_step = function.attr in _STEPS or function.attr == "store"
        else:
            takes_step = isinstance(function, ast.Name) and function.id in self.functions | _STEPS
        return ast.YieldFrom(value=node) if takes_step else node


@functools.cache
def _woven(edits: Sequence[Edit]) -> CodeType:
    """The jitted functions of MODULES as generators. ValueError where an edit finds no such text."""
    text = "\n".join(map(inspect.getsource, MODULES))
    for old, new in edits:
        if old not in text:
            raise ValueError(f"the kernel has no {old!r}")
        text = text.replace(old, new)
    tree = ast.parse(text)
    jitted = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any("'jit'" in ast.dump(each) for each in node.decorator_list)
        and node.name != "larger"  # What is reduced with is named, not called.
    ]
    functions = {node.name for node in jitted}
    tree.body = [_Weave(functions).visit(node) for node in jitted]
    return compile(ast.fix_missing_locations(tree), hopper.__name__, "exec")


class _Anything:
    """A layout, a type: anything the model does not look at."""

    def __getattr__(self, _: str) -> _Anything:
        return self

    def __call__(self, *_: Any, **__: Any) -> _Anything:
        return self


class Pointer:
    """A pointer into a tensor, and how often each of its values is written."""

    dtype = _Anything()

    def __init__(self, values: np.ndarray, written: np.ndarray, offset: Any = 0) -> None:
        self.values, self.written, self.offset = values, written, offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.values, self.written, self.offset + offset)


def _load(pointer: Pointer, mask: Any = True, other: float = 0.0) -> Registers:
    offsets = np.where(mask, pointer.offset, 0).astype(int)
    return registers(np.where(mask, pointer.values[offsets], other))


def _store(pointer: Pointer, values: Any, mask: Any = True) -> Steps:
    yield
    offsets = np.asarray(pointer.offset)[mask].astype(int)
    if offsets.max(initial=0) >= len(pointer.values):
        raise Fault("a store past its tensor")
    pointer.values[offsets] = np.asarray(values)[mask]
    np.add.at(pointer.written, offsets, 1)


def _environment(cta: Cta) -> dict[str, Any]:
    """The names that the kernel uses, on the model."""

    def allocate(_: Any, shape: Sequence[int], __: Any) -> Any:
        if len(shape) == 2 and shape[1] == 1:
            return SimpleNamespace(index=[Barrier() for _ in range(shape[0])].__getitem__)
        return cta.allocate(shape)

    class Language(_Anything):
        load = staticmethod(_load)
        store = staticmethod(_store)
        allocate_shared_memory = staticmethod(allocate)
        warp_specialize = staticmethod(cta.specialise)
        program_id = staticmethod(lambda _: cta.number)
        num_programs = staticmethod(lambda _: cta.grid)
        static_range = staticmethod(range)
        zeros = staticmethod(lambda shape, *_: registers(np.zeros(shape)))
        arange = staticmethod(lambda first, last, *_: registers(np.arange(first, last)))
        expand_dims = staticmethod(lambda values, axis: registers(np.expand_dims(values, axis)))
        sqrt = staticmethod(np.sqrt)
        minimum = staticmethod(min)
        where = staticmethod(lambda mask, a, b: registers(np.where(mask, a, b)))
        exp = staticmethod(np.exp)
        sum = staticmethod(lambda values, axis: registers(np.sum(values, axis)))
        reduce = staticmethod(lambda values, axis, _: registers(np.max(values, axis)))

    names = vars(hopper_epilogue) | vars(hopper)
    return {
        **{name: each.value for name, each in names.items() if type(each).__name__ == "constexpr"},
        "gl": Language(),
        "tl": _Anything(),
        "mbarrier": SimpleNamespace(
            wait=Barrier.wait,
            arrive=Barrier.arrive,
            expect=Barrier.expect,
            init=Barrier.init,
            MBarrierLayout=_Anything(),
        ),
        "tma": SimpleNamespace(
            async_copy_global_to_shared=cta.load, async_copy_shared_to_global=cta.store, store_wait=cta.store_wait
        ),
        "fence_async_shared": cta.fence,
        "warpgroup_mma": cta.multiply,
        "warpgroup_mma_wait": cta.multiply_wait,
        "larger": lambda a, b: registers(np.maximum(a, b)),
        "view": lambda memory, _, shape, __: memory.viewed(shape),
    }


class Globals:
    """Global memory: each tensor that a launch names, as float64, and how often each of its values is written."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arrays: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.arguments = {name: self._argument(each) for name, each in arguments.items()}

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return Pointer(*self._flat(value))
        if not hasattr(value, "block_shape"):
            return value
        flat, written = self._flat(value.base)
        strides = [8 * stride for stride in value.strides]
        tensor, counts = (
            np.lib.stride_tricks.as_strided(each, value.shape, strides, writeable=True) for each in (flat, written)
        )
        return Descriptor(tensor, tuple(value.block_shape), counts)

    def _flat(self, t: Tensor) -> tuple[np.ndarray, np.ndarray]:
        if t.data_ptr() not in self._arrays:
            order = sorted(range(t.dim()), key=lambda axis: -t.stride(axis))
            flat = t.permute(order).double().contiguous().reshape(-1).numpy().copy()
            self._arrays[t.data_ptr()] = flat, np.zeros(flat.shape)
        return self._arrays[t.data_ptr()]

    def is_written(self, t: Tensor) -> bool:
        """Whether anything of the tensor is."""
        return bool(self._flat(t)[1].any())

    def result(self, t: Tensor) -> Tensor:
        """What a packed tensor holds now. Fault unless each of its values was written once."""
        flat, written = self._flat(t)
        if (written != 1).any():
            raise Fault(f"{(written == 0).sum()} values never written, {(written > 1).sum()} more than once")
        return torch.from_numpy(flat).as_strided(t.shape, t.stride())


def run(launch: Any, seed: int, edits: Sequence[Edit] = ()) -> Globals:
    """Every program of a launch, one after the other, in an order of events that the seed decides."""
    memory = Globals(launch.arguments)
    for number in range(launch.grid):
        cta = Cta(seed + 9001 * number, number, launch.grid)
        names = _environment(cta)
        exec(_woven(tuple(edits)), names)
        with np.errstate(invalid="ignore"):
            cta.run(names[launch.kernel.fn.__name__](**memory.arguments))
    return memory
