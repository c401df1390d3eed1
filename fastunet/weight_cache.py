"""Weights prepared for inference (folded, composed, packed), kept as long as what they were made of does not change.

Every way in which torch changes a weight is seen: a new tensor, in-place ops, load_state_dict, and writes that version
counters miss, through `.data` or of inference tensors. For that a weight's storage is marked copy-on-write, without a
second owner: the first write takes the mark away and copies nothing. A weight without the mark is compared by a
checksum, at the cost of reading it once; storages that torch did not allocate (shared memory, NumPy's) or that FSDP
resizes take no mark and are compared each time. On a GPU the checksum waits for it, and the mark does not: whoever only
wants to know where a weight lies asks `address`, since `data_ptr` takes the mark away. Not seen is a write by other
means than torch, such as a NumPy array of the weight made earlier.

What is kept belongs to the weight's storage: it goes with it, and is no part of a module's state_dict, copies or
pickles. The tensor itself is not referred to, not even weakly, which would keep `torch.utils.swap_tensors` from it.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

T = TypeVar("T")

# 64-bit words in a row of the checksum: a prime, so that values which change places change columns.
_COLUMNS = 4093
# Tensors of fewer bytes on the CPU are compared value by value.
_SMALL = 64 << 10


class _Record:
    """What is known of a tensor: its values at some moment, by their number, and how many writes had been found then;
    and what was made of it: (the state of all it was made of, the result).
    """

    def __init__(self) -> None:
        self.number = 0
        self.writes = 0
        self.checksum: tuple[Tensor, ...] = ()
        self.results: dict[Hashable, tuple[list[Any], Any]] = {}


class _Storage:
    """How often a storage's mark was found missing, and the tensors in it, which share the mark, by their geometry."""

    def __init__(self) -> None:
        self.writes = 0
        self.records: dict[Hashable, _Record] = {}


_storages: WeakKeyDictionary[torch.UntypedStorage, _Storage] = WeakKeyDictionary()
_numbers = itertools.count(1)


class _Noted(threading.local):
    """What this thread notes down of what it was given, or None."""

    uses: list[Use] | None = None


_noted = _Noted()


class Use(NamedTuple):
    """A result that was given, and what tells whether it still holds."""

    result: Any
    holds: Callable[[], bool]


@contextmanager
def uses_noted() -> Iterator[list[Use]]:
    """Within the block, each result that this thread is given: for what goes on to use them without asking for them
    again.
    """
    uses: list[Use] = []
    before, _noted.uses = _noted.uses, uses
    try:
        yield uses
    finally:
        _noted.uses = before


def uses_are_noted() -> bool:
    """Whether this thread notes down what it is given."""
    return _noted.uses is not None


def address(t: Tensor) -> int:
    """Where t's values begin."""
    return storage_address(t) + int(t.storage_offset()) * t.itemsize


# Where a tensor's storage begins.
storage_address: Callable[[Tensor], int] = torch._C._data_address  # type: ignore[attr-defined]


def prepared(kind: Hashable, sources: Sequence[Tensor | None], make: Callable[[], T]) -> T:
    """make(), or what it gave before for the same kind and unchanged sources.

    kind: names what is made, with everything that make() takes beside the sources. sources[0] is not None; one result
    of each kind is kept for it. A result shares no memory with the sources: it would keep them, and itself, for ever.
    """
    if _noted.uses is None:
        return _prepared(kind, sources, make)[1]
    with _disable_current_modes():  # Whoever notes down what is done with the result is not to see how it came about.
        state, result = _prepared(kind, sources, make)
    _noted.uses.append(Use(result, functools.partial(_holds, state, sources)))
    return result


def _prepared(kind: Hashable, sources: Sequence[Tensor | None], make: Callable[[], T]) -> tuple[list[Any], T]:
    assert sources[0] is not None
    _, record = _known(sources[0])
    found = record.results.get(kind)
    if found is None or not _holds(found[0], sources):
        found = record.results[kind] = ([_state(t) for t in sources], make())
    return found


def _holds(state: list[Any], sources: Sequence[Tensor | None]) -> bool:
    return all(map(_is_unchanged, state, sources))


def _known(t: Tensor) -> tuple[_Storage, _Record]:
    storage = t.untyped_storage()
    known = _storages.get(storage)
    if known is None:
        known = _storages.setdefault(storage, _Storage())
    geometry = t.storage_offset(), t.shape, t.stride(), t.dtype
    record = known.records.get(geometry)
    return known, record if record is not None else known.records.setdefault(geometry, _Record())


def _state(t: Tensor | None) -> Any:
    """Of a small tensor a copy, of a large one the number of its values."""
    if t is None:
        return None
    return t.detach().clone() if _is_small(t) else _number(t)


def _is_unchanged(state: Any, t: Tensor | None) -> bool:
    if t is None or state is None:
        return t is state
    if isinstance(state, int):
        return not _is_small(t) and state == _number(t)
    return state.shape == t.shape and torch.equal(state, t)


def _is_small(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.numel() * t.element_size() < _SMALL


def _number(t: Tensor) -> int:
    """A number that stays the same as long as t's memory holds those values."""
    storage, record = _known(t)
    if not torch._C._is_cow_tensor(t):  # type: ignore[attr-defined]
        storage.writes += 1
        if not _resizes_storages():
            with suppress(RuntimeError):  # Of memory that is not torch's own: it stays unmarked.
                torch._lazy_clone(t.detach())
    writes = storage.writes
    if record.writes != writes:
        checksum = _checksum(t.detach())
        if not _equal(record.checksum, checksum):
            record.number, record.checksum = next(_numbers), checksum
        record.writes = writes
    return record.number


def _resizes_storages() -> bool:
    """Whether FSDP may be at work, which frees and fills the storages of weights again: torch then fails on marked ones
    ("ctx != nullptr INTERNAL ASSERT FAILED").
    """
    return "torch.distributed.fsdp" in sys.modules and torch.distributed.is_initialized()


def _checksum(t: Tensor) -> tuple[Tensor, ...]:
    """Sums of the bits as integers, by column: no change of one value leaves them as they are."""
    if not t.is_contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.contiguous_format):
        t = t.contiguous()
    values = t.as_strided((t.numel(),), (1,))
    if values.storage_offset() * values.element_size() % 8:
        values = values.clone()
    row = _COLUMNS * 8 // values.element_size()
    inside = values.numel() // row * row
    return values[:inside].view(torch.int64).view(-1, _COLUMNS).sum(0), values[inside:].clone()


def _equal(before: tuple[Tensor, ...], now: tuple[Tensor, ...]) -> bool:
    return len(before) == len(now) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, now, strict=True)
    )
