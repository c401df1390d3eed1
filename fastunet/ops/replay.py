"""The work of our kernels on one kind of arguments, noted down once and repeated on others.

What a call takes the host is mostly the way to its launches: the kernels' configurations, their descriptors, Triton's
look at each argument. All of it depends on the arguments' dtypes, shapes, strides and distance from a boundary of 16
bytes, and not on their values: it is the same at every step of a training. So a call with arguments of a kind seen
before is noted down, as a list of allocations, launches and torch's ops, and later ones go through the list.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastunet import dispatch
from fastunet.ops.registration import implementation_of
from fastunet.prepared import Use, address, uses_are_noted, uses_noted

P = ParamSpec("P")
R = TypeVar("R")

# Kinds of arguments remembered of each function.
_MOST = 1024
_aten = torch.ops.aten
_ALLOCATIONS = (_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty_strided)
_enabled = True


@contextmanager
def replaying(enabled: bool) -> Iterator[None]:
    """Within the block, in every thread, whether functions repeat what was noted down. They do outside."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def replayed(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which runs Triton kernels on its arguments, repeated from a list where it was called with such of the
    same kind before.

    It takes tensors, None, numbers, strings, and sequences of these, and gives tensors and None; what it launches,
    allocates and asks of torch follows from their kind. A function that does something else, such as reading a value,
    is called as it is.
    """
    programs = Programs(_MOST)

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        tensors: list[Tensor] = []
        kind = tuple(kinds((*args, *options.items()), tensors))
        if not tensors or not may_replay():
            return function(*args, **options)
        return programs.run(kind, tensors, functools.partial(function, *args, **options))

    return call


class Programs:
    """What was noted down of calls, by the kind of what they were given; most: kinds that are remembered."""

    def __init__(self, most: int) -> None:
        self._known: dict[Hashable, _Program | None] = {}
        self._seen: set[Hashable] = set()
        self._most = most

    def run(self, kind: Hashable, tensors: Sequence[Tensor], call: Callable[[], R]) -> R:
        """call(), or the program of one whose kind was the same, on these tensors."""
        key = (dispatch.tf32_allowed(), kind)
        program = self._known.get(key)
        if program is not None and program.holds():
            return program(tensors)
        names_one_twice = len({*map(id, tensors)}) < len(tensors)  # No one knows which is meant.
        if names_one_twice or (program is None and key in self._known):
            return call()
        if key not in self._seen:
            if len(self._seen) >= self._most:
                self._seen.clear()
                self._known.clear()
            self._seen.add(key)
            return call()
        from fastunet.kernels import gpu

        with uses_noted() as uses, gpu.recording() as steps, _Recorder(tensors, uses, steps) as recorder:
            result = call()
        self._known[key] = recorder.program(result)
        return result


def may_replay() -> bool:
    """Whether this thread's calls may be repeated: not while each launch is noted down, or set by a benchmark."""
    from fastunet.kernels import gpu, tuning

    is_watched = gpu.is_recording() or uses_are_noted()
    return _enabled and not is_watched and not tuning.is_overridden() and gpu.unknown_triton() is None


def kinds(values: Iterable[Any], tensors: list[Tensor]) -> Iterator[Hashable]:
    """All of the values that a program depends on; their tensors are added to the list."""
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            yield value.dtype, value.shape, value.stride(), address(value) % 16, value.get_device()
        elif isinstance(value, list | tuple):
            yield tuple(kinds(value, tensors))
        else:
            yield value


class _Place(NamedTuple):
    """A tensor as a view of one in a program's table: all of it where `view` is None, else dtype, shape, stride and
    distance from its begin, in elements; skipped: the same in bytes.
    """

    at: int
    view: tuple[torch.dtype, torch.Size, tuple[int, ...], int] | None = None
    skipped: int = 0

    def tensor(self, table: list[Any]) -> Tensor:
        whole: Tensor = table[self.at]
        if self.view is None:
            return whole
        dtype, shape, stride, offset = self.view
        whole = whole.view(dtype)
        return whole.as_strided(shape, stride, whole.storage_offset() + offset)

    def address(self, table: list[Any]) -> int:
        return table[self.at].data_ptr() + self.skipped


# What a program does next to its table of tensors.
_Step = Callable[[list[Any]], None]


class _Program:
    """Steps on a table of tensors, which begins with the arguments.

    rest: what follows them, None where a step is to put it. result: as the function's, of places in the table. uses:
    of what was prepared of weights.
    """

    def __init__(self, steps: Sequence[_Step], rest: list[Tensor | None], result: Any, uses: Sequence[Use]) -> None:
        self._steps, self._rest, self._result, self._uses = steps, rest, result, uses

    def holds(self) -> bool:
        """Whether what was prepared is still what it would be now."""
        return all(use.holds() for use in self._uses)

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        from fastunet.kernels import gpu

        table = [*tensors, *self._rest]
        with gpu.current(tensors[0].device):
            for step in self._steps:
                step(table)
        return _filled(self._result, table)


def _filled(value: Any, table: list[Any]) -> Any:
    """The value with tensors instead of places."""
    if isinstance(value, _Place):
        return value.tensor(table)
    if isinstance(value, list | tuple):
        return type(value)([_filled(v, table) for v in value])
    return value


class _Allocation(NamedTuple):
    """A new tensor of the table."""

    at: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def step(self) -> _Step:
        at, shape, stride, dtype, device = self

        def run(table: list[Any]) -> None:
            table[at] = torch.empty_strided(shape, stride, dtype=dtype, device=device)

        return run

    def places(self) -> Iterable[int]:
        return ()


class _Call(NamedTuple):
    """One of torch's ops; those of its results that are new belong to the table."""

    op: Callable[..., Any]
    args: Any
    options: Any
    new: list[tuple[int, int]]  # Which of its results, and where in the table.

    def step(self) -> _Step:
        def run(table: list[Any]) -> None:
            options = {name: _filled(value, table) for name, value in self.options.items()}
            results = self.op(*_filled(self.args, table), **options)
            for i, at in self.new:
                table[at] = results if isinstance(results, Tensor) else results[i]

        return run

    def places(self) -> Iterable[int]:
        given = tree_leaves((self.args, self.options), is_leaf=lambda value: isinstance(value, _Place))
        return (*(place.at for place in given if isinstance(place, _Place)), *(at for _, at in self.new))


class _Started(NamedTuple):
    """A kernel's launch on tensors of the table."""

    launch: Any
    on: list[_Place]

    def step(self) -> _Step:
        device, on = self.launch.tensors[0].device, self.on
        if self.launch.is_interpreted:
            # Without memory, of which the tensors that were noted down would hold on to theirs.
            described = [(t.shape, t.stride(), t.dtype) for t in self.launch.tensors]
            stripped = self.launch.on(
                [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in described]
            )
            return lambda table: stripped.on([place.tensor(table) for place in on]).run(device)
        start = self.launch.on_addresses(device)
        return lambda table: start([place.address(table) for place in on])

    def places(self) -> Iterable[int]:
        return (place.at for place in self.on)


class _Recorder(TorchDispatchMode):
    """Notes down what runs within its block, which is given the tensors: torch's ops among the steps, to which launches
    come of themselves. uses: of what is prepared, as they come.
    """

    def __init__(self, tensors: Sequence[Tensor], uses: Sequence[Use], steps: list[Any]) -> None:
        super().__init__()
        self._uses, self._steps = uses, steps
        self._rest: list[Tensor | None] = []
        self._wholes: list[Tensor] = []
        self._indices: dict[int, int] = {}  # By id, of tensors that are held so that it stays theirs.
        self._held: list[Tensor] = []
        self._has_refused = False
        for t in tensors:
            self._add(t)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        implementation = implementation_of(op)
        if implementation is not None:  # Of an op of ours: what it does is noted down.
            with self:
                return implementation(*args, **options)
        result = op(*args, **options)
        given = [t for t in tree_leaves((args, options)) if isinstance(t, Tensor)]
        results = [*result] if isinstance(result, list | tuple) else [result]
        # Opaque tensors, such as oneDNN's, have no storage.
        if not all(isinstance(t, Tensor) and t.layout == torch.strided for t in (*given, *results)):
            self._has_refused = True
            return result
        owners = {t.untyped_storage()._cdata: self._index_of(t) for t in given}
        if None in owners.values():
            self._has_refused = True
            return result
        new = []
        for i, t in enumerate(results):
            owner = self._indices.get(id(t), owners.get(t.untyped_storage()._cdata))
            if owner is None:
                new.append((i, self._add(t)))
                self._rest.append(None)
            else:
                self._hold(t, owner)
        if op.overloadpacket in _ALLOCATIONS:
            t, index = results[0], new[0][1]
            self._steps.append(_Allocation(index, t.shape, t.stride(), t.dtype, t.device))
        elif new or op._schema.is_mutable:
            args, options = tree_map_only(Tensor, self._place, (args, options))
            self._steps.append(_Call(op, args, options, new))
        return result

    def _add(self, t: Tensor) -> int:
        self._wholes.append(t)
        self._hold(t, len(self._wholes) - 1)
        return len(self._wholes) - 1

    def _hold(self, t: Tensor, index: int) -> None:
        self._indices[id(t)] = index
        self._held.append(t)

    def _index_of(self, t: Tensor) -> int | None:
        """Where in the table its memory is, None where that is nowhere."""
        if id(t) not in self._indices and any(t is leaf for use in self._uses for leaf in tree_leaves(use.result)):
            self._add(t)
            self._rest.append(t)
        return self._indices.get(id(t))

    def _place(self, t: Tensor) -> _Place:
        at = self._index_of(t)
        if at is None or t.itemsize != self._wholes[at].itemsize:
            self._has_refused = True
            return _Place(-1)
        whole = self._wholes[at]
        offset = int(t.storage_offset() - whole.storage_offset())
        if (t.dtype, t.shape, t.stride(), offset) == (whole.dtype, whole.shape, whole.stride(), 0):
            return _Place(at)
        return _Place(at, (t.dtype, t.shape, t.stride(), offset), offset * t.itemsize)

    def program(self, result: Any) -> _Program | None:
        """What repeats it on other tensors, and gives such a result; None where not all of it could be noted down."""
        from fastunet.kernels import gpu

        result = tree_map_only(Tensor, self._place, result)
        steps: list[Any] = []
        for step in self._steps:
            if isinstance(step, gpu.Launch):
                steps.append(_Started(step, [self._place(t) for t in step.tensors]))
            elif not isinstance(step, gpu.Copy):  # Which is one of torch's ops as well.
                steps.append(step)
        if self._has_refused or not any(isinstance(step, _Started) for step in steps):
            return None
        return _Program(self._with_ends(steps, result), self._rest, result, [*self._uses])

    def _with_ends(self, steps: list[Any], result: Any) -> list[_Step]:
        """The steps, without allocations that nothing needs, and what lets go of a tensor after its last one."""
        leaves = tree_leaves(result, is_leaf=lambda value: isinstance(value, _Place))
        last = {index: i for i, step in enumerate(steps) for index in step.places()}
        last |= {place.at: len(steps) for place in leaves if isinstance(place, _Place)}
        found: list[_Step] = []
        for i, step in enumerate(steps):
            if isinstance(step, _Allocation) and step.at not in last:
                continue
            found.append(step.step())
            done = [index for index, end in last.items() if end == i]
            if done:
                found.append(functools.partial(_let_go, done))
        return found


def _let_go(indices: Sequence[int], table: list[Any]) -> None:
    for index in indices:
        table[index] = None
