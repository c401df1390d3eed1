"""Whether a model is still the one that something was made of: all but the values of its weights."""

from __future__ import annotations

import operator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .prepared import storage_address


class ModelState:
    """Of what modules a model is made, how they are set, their hooks, and where their parameters and buffers lie.

    `model.parameters()` walks through all modules, which takes as long as a small image's kernels: here the walk is
    made once, and what it found is compared from then on.

    tensors: parameters and buffers, each once. The model itself is not held.
    """

    def __init__(self, model: nn.Module) -> None:
        root, *self._inner = model.modules()
        self._types = [*map(type, self._inner)]
        self._settings = [vars(module) for module in (root, *self._inner)]
        self._set = [*map(dict, self._settings)]
        inner = [value for of in self._settings for value in of.values() if isinstance(value, dict)]
        self._owners = [owned for owned in inner if owned]
        self._empty = [owned for owned in inner if not owned]
        self._owned = self._now_owned()
        self.tensors = [*{id(t): t for t in self._owned if isinstance(t, Tensor)}.values()]
        self._places = self._now_places()

    def _now_owned(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._owners))]

    def _now_places(self) -> list[Any]:
        ways = (storage_address, Tensor.storage_offset, Tensor.numel, Tensor.stride)
        return [*chain.from_iterable(map(way, self.tensors) for way in ways)]

    def holds(self) -> bool:
        """Whether all that is as it was; not what the values are."""
        now = self._now_owned()
        return (
            len(now) == len(self._owned)
            and all(map(operator.is_, now, self._owned))
            and not any(self._empty)
            and [*map(type, self._inner)] == self._types
            and self._has_settings()
            and self._now_places() == self._places
        )

    def _has_settings(self) -> bool:
        try:
            return self._settings == self._set
        except (RuntimeError, ValueError):  # Of a tensor or array, which another has taken the place of.
            return False


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to on that kind of device, None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
