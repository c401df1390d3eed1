"""Runs a launch in Triton's interpreter and counts the bytes of every access, lane by lane."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from fastunet.benchmarks.access_counts import Traffic
from fastunet.kernels import gpu
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder


def with_memory(launch: gpu.Launch) -> gpu.Launch:
    """The launch on tensors of zeros, each argument in memory of its own, in place of those without memory."""
    arguments = {name: _with_memory(value) for name, value in launch.arguments.items()}
    return dataclasses.replace(launch, arguments=arguments)


def _with_memory(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).zero_()
    if hasattr(value, "block_shape"):  # A tensor descriptor, Triton's or Gluon's.
        return dataclasses.replace(value, base=_with_memory(value.base))
    return value


def counted(launch: gpu.Launch) -> Traffic:
    """What the launch, made by with_memory, is seen to access."""
    loads, stores = _Log(), _Log()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        loads.note(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        stores.note(pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):  # Zeros make NaN: no matter.
        patch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
        launch.run(torch.device("cpu"))
    return Traffic(loads.distinct(), stores.distinct(), loads.total, stores.total)


class _Log:
    """Bytes accessed, and the addresses of the elements by their size."""

    def __init__(self) -> None:
        self.total = 0
        self._addresses: dict[int, list[np.ndarray]] = {}

    def note(self, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        # A descriptor passes its mask as it is.
        taken = pointers.data[np.broadcast_to(getattr(mask, "data", mask), pointers.data.shape)]
        self.total += taken.size * size
        self._addresses.setdefault(size, []).append(taken)

    def distinct(self) -> int:
        """Bytes of different elements: no two tensors share memory."""
        return sum(size * np.unique(np.concatenate(found)).size for size, found in self._addresses.items())
