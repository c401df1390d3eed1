"""Gluon kernels run on the model of `emulated_cta`, from their own source: the arithmetic of slots, phases and arrivals
that runs is the one that is compiled.

Every jitted function of the file becomes a generator, and every call that can wait or race a step of it. What the
launcher gives the kernel is taken as it is: descriptors of CPU tensors become boxes of float64 arrays.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Sequence
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from emulated_cta import Barrier, Barriers, Cta, Descriptor, Fault, Memory, Registers, Steps, Sums, registers
from torch import Tensor

Edit = tuple[str, str]
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


def weave(modules: Sequence[ModuleType], edits: Sequence[Edit] = ()) -> CodeType:
    """The jitted functions of a kernel's modules as generators; edits: texts of their source, and what stands there
    instead. ValueError where there is no such text.
    """
    text = "\n".join(inspect.getsource(module) for module in modules).replace(
        "from __future__ import annotations\n", ""
    )
    for old, new in edits:
        if old not in text:
            raise ValueError(f"{modules[-1].__name__} has no {old!r}")
        text = text.replace(old, new)
    tree = ast.parse(text)
    jitted = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("'jit'" in ast.dump(each) for each in node.decorator_list)
    ]
    # What is reduced with is named, not called.
    tree.body = [
        _Weave({node.name for node in jitted} - {"larger"}).visit(node) for node in jitted if node.name != "larger"
    ]
    return compile(ast.fix_missing_locations(tree), modules[-1].__name__, "exec")


class _Anything:
    """A layout, a type: anything the model does not look at."""

    def __getattr__(self, _: str) -> _Anything:
        return self

    def __call__(self, *_: Any, **__: Any) -> _Anything:
        return self


class Pointer:
    """A pointer into a tensor; how often each of its values is written, and how many are loaded in all."""

    dtype = _Anything()

    def __init__(self, values: np.ndarray, written: np.ndarray, offset: Any = 0, first: Pointer | None = None) -> None:
        self.values, self.written, self.offset = values, written, offset
        self.first, self.loaded = first or self, 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.values, self.written, self.offset + offset, self.first)


def _language(cta: Cta) -> _Anything:
    def allocate(_: Any, shape: Sequence[int], __: Any) -> Memory | Barriers:
        return cta.barriers(shape[0]) if len(shape) == 2 and shape[1] == 1 else cta.allocate(shape)

    def load(pointer: Pointer, mask: Any = True, other: float = 0.0) -> Registers:
        offsets = np.where(mask, pointer.offset, 0).astype(int)
        pointer.first.loaded += int(np.broadcast_to(mask, offsets.shape).sum())
        return registers(np.where(mask, pointer.values[offsets], other))

    def store(pointer: Pointer, values: Any, mask: Any = True) -> Steps:
        yield
        offsets = np.asarray(pointer.offset)[mask].astype(int)
        if offsets.max(initial=0) >= len(pointer.values):
            raise Fault("a store past its tensor")
        pointer.values[offsets] = np.asarray(values)[mask]
        np.add.at(pointer.written, offsets, 1)

    class Language(_Anything):
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

    language = Language()
    language.load = load  # type: ignore[attr-defined]
    language.store = store  # type: ignore[attr-defined]
    language.allocate_shared_memory = allocate  # type: ignore[attr-defined]
    return language


def environment(modules: Sequence[ModuleType], cta: Cta) -> dict[str, Any]:
    """The names that the kernels of the modules use, on the model."""
    names = [item for module in modules for item in vars(module).items()]
    constants = {name: each.value for name, each in names if type(each).__name__ == "constexpr"}

    def wait(barrier: Barrier, parity: int) -> Steps:
        return cta.until(lambda: (barrier.phase & 1) != parity)

    def arrive(barrier: Barrier, pred: Any = True) -> Steps:
        yield
        if pred:
            barrier.arrive()

    def expect(barrier: Barrier, size: int) -> Steps:
        yield
        barrier.arrive(size)

    def load(source: Descriptor, at: Any, barrier: Barrier, target: Memory, pred: Any = True) -> Steps:
        yield
        if pred:
            cta.load(source, at, barrier, target)

    def store(target: Descriptor, at: Any, source: Memory) -> Steps:
        yield
        cta.store(target, at, source)

    def store_wait(pending: int) -> Steps:
        who = cta.running
        return cta.until(lambda: cta.stores.get(who, 0) <= pending)

    def multiply(a: Memory, b: Memory, sums: Any, is_async: bool) -> Steps:
        yield
        return cta.multiply(a, b, sums)

    def multiply_wait(pending: int, deps: Sequence[Any]) -> Steps:
        who = cta.running
        yield from cta.until(lambda: cta.products.get(who, 0) <= pending)
        return deps[0].values if pending == 0 else deps[0]

    def fence() -> Steps:
        yield
        cta.fence()

    def specialise(parts: Any, *_: Any) -> Steps:
        return cta.specialise(parts)

    language: Any = _language(cta)
    language.warp_specialize = specialise
    return {
        **constants,
        "gl": language,
        "tl": _Anything(),
        "mbarrier": SimpleNamespace(
            wait=wait,
            arrive=arrive,
            expect=expect,
            init=lambda barrier, count: barrier.init(count),
            MBarrierLayout=_Anything(),
        ),
        "tma": SimpleNamespace(
            async_copy_global_to_shared=load, async_copy_shared_to_global=store, store_wait=store_wait
        ),
        "fence_async_shared": fence,
        "warpgroup_mma": multiply,
        "warpgroup_mma_wait": multiply_wait,
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
        """What a tensor, contiguous or of images channels_last, holds now. Fault unless each of its values was written
        once.
        """
        flat, written = self._flat(t)
        if (written != 1).any():
            raise Fault(f"{(written == 0).sum()} values never written, {(written > 1).sum()} more than once")
        if t.dim() != 4:
            return torch.from_numpy(flat).reshape(t.shape)
        n, c, h, w = t.shape
        return torch.from_numpy(flat).reshape(n, h, w, c).permute(0, 3, 1, 2)


def run(modules: Sequence[ModuleType], launch: Any, seed: int, code: CodeType | None = None) -> Globals:
    """Every program of a launch, one after the other, in an order of events that the seed decides. modules: those with
    the kernel's source; code: as weave has edited it.
    """
    memory = Globals(launch.arguments)
    code = weave(modules) if code is None else code
    name = launch.kernel.fn.__name__
    for number in range(launch.grid):
        cta = Cta(seed + 9001 * number, number, launch.grid)
        names = environment(modules, cta)
        exec(code, names)
        kernel: Callable[..., Steps] = names[name]
        with np.errstate(invalid="ignore"):
            cta.run(kernel(**memory.arguments))
    return memory


__all__ = ["Edit", "Fault", "Sums", "run", "weave"]
