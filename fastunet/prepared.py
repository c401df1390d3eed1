"""Weights prepared for inference (folded, composed, packed), kept as long as what they were made of does not change.

Every way in which torch changes a weight is seen: a new tensor, in-place ops, load_state_dict, and writes that version
counters miss, through `.data` or of inference tensors. For that a weight's storage is marked copy-on-write, without a
second owner: the first write takes the mark away and copies nothing. A weight without the mark is compared by a
checksum, at the cost of reading it once; storages that torch did not allocate (shared memory, NumPy's) take no mark and
are compared each time. On a GPU the checksum waits for it, and the mark does not: whoever only wants to know where a
weight lies asks `address`, since `data_ptr` takes the mark away. Not seen is a write by other means than torch, such as
a NumPy array of the weight made earlier.

What is kept belongs to the weight: it goes with it, and is no part of a module's state_dict, copies or pickles.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")

# 64-bit words in a row of the checksum: a prime, so that values which change places change columns.
_COLUMNS = 4093
# Tensors of fewer bytes on the CPU are compared value by value.
_SMALL = 64 << 10


class _Record:
    """What is known of a tensor: its values at some moment, by their number, and where they were; and what was made of
    it: (the state of all it was made of, the result).
    """

    def __init__(self) -> None:
        self.number = 0
        self.place: tuple[object, ...] = ()
        self.checksum: tuple[Tensor, ...] = ()
        self.results: dict[Hashable, tuple[list[Any], Any]] = {}


_records: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# How often the mark was found missing, by storage: tensors that share one share the mark.
_writes: dict[int, int] = {}
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
    of each kind is kept for it.
    """
    if _noted.uses is None:
        return _prepared(kind, sources, make)[1]
    with _disable_current_modes():  # Whoever notes down what is done with the result is not to see how it came about.
        state, result = _prepared(kind, sources, make)
    _noted.uses.append(Use(result, functools.partial(_holds, state, sources)))
    return result


def _prepared(kind: Hashable, sources: Sequence[Tensor | None], make: Callable[[], T]) -> tuple[list[Any], T]:
    record = _record(sources[0])
    found = record.results.get(kind)
    if found is None or not _holds(found[0], sources):
        found = record.results[kind] = ([_state(t) for t in sources], make())
    return found


def _holds(state: list[Any], sources: Sequence[Tensor | None]) -> bool:
    return all(map(_is_unchanged, state, sources))


def _record(t: Tensor | None) -> _Record:
    record = _records.get(t)
    if record is None:
        record = _records[t] = _Record()
    return record


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
    """A number that stays the same as long as t is that tensor with those values."""
    record, place = _record(t), _place(t)
    if record.place != place:
        checksum = _checksum(t.detach())
        if not _equal(record.checksum, checksum):
            record.number, record.checksum = next(_numbers), checksum
        record.place = place
    return record.number


def _place(t: Tensor) -> tuple[object, ...]:
    """Where t's values are, and how often they may have been written: never the same where that cannot be told."""
    storage = t.untyped_storage()._cdata
    if not torch._C._is_cow_tensor(t):  # type: ignore[attr-defined]
        _writes[storage] = _writes.get(storage, 0) + 1
        with suppress(RuntimeError):  # Of memory that is not torch's own: it stays unmarked.
            torch._lazy_clone(t.detach())
    return storage, _writes[storage], t.storage_offset(), t.shape, t.stride()


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
