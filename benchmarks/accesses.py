"""The bytes one launch of a kernel moves, from its grid and blocks, without running it.

Two borders are counted. Between multiprocessors and L2: what all programs together load and store, lanes that are
masked, and the parts of a box outside its tensor, left out. No load is taken to hit L1, so for kernels that gather
through pointers it is an upper bound; boxes do not pass through L1. Between L2 and memory: each distinct byte once a
launch. That takes L2 to keep a tile of pixels and its halo while its neighbours run, which launch orders see to, and
the weights throughout (at most 19 MB in the classic net): a lower bound, as near as that holds. Sectors that are
fetched for part of their 32 bytes are counted by that part.

The counts are exact: tests run the kernels in Triton's interpreter, Gluon's on a model of the hardware, and count every
access.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fastunet.kernels import gpu
from torch import Tensor

from .access_counts import COUNTS, tensor_of


@dataclass(frozen=True)
class Traffic:
    """Bytes. read, written: from and to memory. loaded, stored: from and to L2 by the multiprocessors."""

    read: int = 0
    written: int = 0
    loaded: int = 0
    stored: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.read + other.read,
            self.written + other.written,
            self.loaded + other.loaded,
            self.stored + other.stored,
        )

    @property
    def memory(self) -> int:
        """Read and written."""
        return self.read + self.written


def traffic_of(launch: gpu.Launch) -> Traffic:
    """What the launch moves. KeyError for a kernel without a count."""
    accesses = COUNTS[launch.kernel.fn.__name__](launch.arguments, launch.grid)
    loaded, read = _bytes(launch, accesses.loads, accesses.distinct)
    stored, written = _bytes(launch, accesses.stores, accesses.distinct)
    return Traffic(read, written, loaded, stored)


def _bytes(launch: gpu.Launch, counts: Mapping[str, int], distinct: Mapping[str, int]) -> tuple[int, int]:
    moved = once = 0
    for name, count in counts.items():
        tensor = tensor_of(launch.arguments[name])
        if tensor is not None:
            moved += count * tensor.element_size()
            once += distinct.get(name, min(count, tensor.numel())) * tensor.element_size()
    return moved, once


def copies_of(launch: gpu.Launch, given: Iterable[Tensor | None]) -> Traffic:
    """What it took to copy tensors into the order in which the launch reads them: of all it has, those not `given`."""
    storages = {t.untyped_storage()._cdata for t in given if t is not None}
    copied = 0
    for argument in launch.arguments.values():
        tensor = tensor_of(argument)
        if tensor is not None and tensor.untyped_storage()._cdata not in storages:
            copied += tensor.numel() * tensor.element_size()
    return Traffic(copied, copied, copied, copied)
