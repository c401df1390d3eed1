"""Weights prepared for inference (folded, composed, packed), kept as long as what they were made of does not change.

Every way in which torch changes a weight is seen: a new tensor, in-place ops, load_state_dict, and writes that version
counters miss, through `.data` or of inference tensors. For that a weight's storage is marked copy-on-write, without a
second owner: the first write takes the mark away and copies nothing. As long as all weights that something was made of
have their marks, a few passes over them tell that it holds, which are loops in C. A weight without the mark is compared
by a checksum, at the cost of reading it once; storages that torch did not allocate (shared memory, NumPy's) or that
FSDP resizes take no mark and are compared each time. On a GPU the checksum waits for it, and the mark does not. Not
seen is a write by other means than torch, such as a NumPy array of the weight made earlier.

What is kept belongs to the weight's storage: it goes with it, and is no part of a module's state_dict, copies or
pickles. The tensor itself is not referred to, not even weakly, which would keep `torch.utils.swap_tensors` from it.
"""

from __future__ import annotations

import functools
import itertools
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastunet import torch_private
from fastunet.torch_private import is_marked, storage_address

T = TypeVar("T")

# 64-bit words in a row of the checksum: a prime, so that values which change places change columns.
_COLUMNS = 4093


class _Record:
    """What is known of a tensor: its values at some moment, by their number, and how many writes had been found then;
    and what was made of it.
    """

    def __init__(self) -> None:
        self.number = 0
        self.writes = 0
        self.checksum: tuple[Tensor, ...] = ()
        self.results: dict[Hashable, tuple[_State, Any]] = {}


class _Storage:
    """How often a storage's mark was found missing, and the tensors in it, which share the mark, by their geometry."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.writes = 0
        self.records: dict[Hashable, _Record] = {}
        self._watch = weakref.ref(storage, self._end)

    def _end(self, _: Any) -> None:
        self.writes = -1  # Another may begin where this one did, with its mark.


_storages: weakref.WeakKeyDictionary[torch.UntypedStorage, _Storage] = weakref.WeakKeyDictionary()
_numbers = itertools.count(1)


class _Recorded(threading.local):
    """What this thread records of what it was given, or None."""

    uses: list[Use] | None = None


_recorded = _Recorded()


class Use(NamedTuple):
    """A result that was given, and what tells whether it still holds."""

    result: Any
    holds: Callable[[], bool]


@contextmanager
def uses_recorded() -> Iterator[list[Use]]:
    """Within the block, each result that this thread is given: for what goes on to use them without asking for them
    again.
    """
    uses: list[Use] = []
    before, _recorded.uses = _recorded.uses, uses
    try:
        yield uses
    finally:
        _recorded.uses = before


_GEOMETRY = (storage_address, Tensor.storage_offset, Tensor.size, Tensor.stride)
_WRITES = operator.attrgetter("writes")
_is_absent = functools.partial(operator.is_, None)


def places(tensors: Sequence[Tensor]) -> list[Any]:
    """Return where each tensor's values are, and in what order: of the same lists, equal when none has moved."""
    return [*itertools.chain.from_iterable(map(each, tensors) for each in _GEOMETRY)]


class _State:
    """What the values of tensors were: by their numbers, of vectors also by themselves, and by the marks that say so
    without looking at each.
    """

    def __init__(self, sources: Sequence[Tensor | None]) -> None:
        self.numbers = [*map(_number, sources)]
        self.checksums = [None if t is None else _known(t)[1].checksum for t in sources]
        self.absent = [*map(_is_absent, sources)]
        self._see_marks(sources)

    def _see_marks(self, sources: Sequence[Tensor | None]) -> None:
        present = [t for t in sources if t is not None]
        self.places = places(present)
        self.storages = [_known(t)[0] for t in present]
        self.writes = [*map(_WRITES, self.storages)]

    def holds(self, sources: Sequence[Tensor | None]) -> bool:
        present = [t for t in sources if t is not None]
        if (
            all(map(is_marked, present))
            and [*map(_WRITES, self.storages)] == self.writes
            and [*map(_is_absent, sources)] == self.absent
            and places(present) == self.places
        ):
            return True
        if not all(map(self._is_same, sources, self.numbers, self.checksums)):
            return False
        self._see_marks(sources)
        return True

    @staticmethod
    def _is_same(t: Tensor | None, number: int | None, checksum: tuple[Tensor, ...] | None) -> bool:
        if _number(t) == number:
            return True
        # A compiled graph makes vectors anew at each call, as where it moves a bias from a convolution to its norm.
        if t is None or checksum is None or t.dim() > 1 or t.dtype != checksum[-1].dtype:
            return False
        return all(map(torch.equal, _known(t)[1].checksum, checksum))


def prepared(kind: Hashable, sources: Sequence[Tensor | None], make: Callable[[], T]) -> T:
    """Return make(), or what it gave before for the same kind and unchanged sources.

    kind: names what is made, with everything that make() takes beside the sources. sources[0] is not None; one result
    of each kind is kept for it. A result shares no memory with the sources: it would keep them, and itself, for ever.
    """
    if _recorded.uses is None:
        return _prepared(kind, sources, make)[1]
    with torch_private.without_modes():  # Whoever records what is done with the result is not to see how it was made.
        state, result = _prepared(kind, sources, make)
    _recorded.uses.append(Use(result, functools.partial(state.holds, sources)))
    return result


def _prepared(kind: Hashable, sources: Sequence[Tensor | None], make: Callable[[], T]) -> tuple[_State, T]:
    assert sources[0] is not None
    _, record = _known(sources[0])
    found = record.results.get(kind)
    if found is None or not found[0].holds(sources):
        found = (_State(sources), make())
        if sources[0].is_cuda:  # The next call may be on another stream.
            torch.cuda.current_stream(sources[0].device).synchronize()
        record.results[kind] = found
    return found


def _known(t: Tensor) -> tuple[_Storage, _Record]:
    storage = t.untyped_storage()
    known = _storages.get(storage)
    if known is None:
        known = _storages.setdefault(storage, _Storage(storage))
    geometry = t.storage_offset(), t.shape, t.stride(), t.dtype
    record = known.records.get(geometry)
    return known, record if record is not None else known.records.setdefault(geometry, _Record())


def _number(t: Tensor | None) -> int | None:
    """Return a number that stays the same as long as t's memory holds those values."""
    if t is None:
        return None
    storage, record = _known(t)
    if not is_marked(t):
        storage.writes += 1
        # FSDP frees and fills the storages of weights again, at which torch fails where they are marked
        # ("ctx != nullptr INTERNAL ASSERT FAILED").
        if "torch.distributed.fsdp" not in sys.modules or not torch.distributed.is_initialized():
            with suppress(RuntimeError):  # Of memory that is not torch's own: it stays unmarked.
                torch_private.mark(t.detach())
    writes = storage.writes
    if record.writes != writes:
        checksum = _checksum(t.detach())
        if not (record.checksum and all(map(torch.equal, record.checksum, checksum))):
            record.number, record.checksum = next(_numbers), checksum
        record.writes = writes
    return record.number


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
