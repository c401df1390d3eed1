"""Whether a model is still the one that something was found out of: all but the values of its weights."""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastunet.checks import autocasts
from fastunet.cpu.weight_cache import places


class Memo:
    """What a module found out of itself, with the state that it holds for; no part of its copies and pickles."""

    def __init__(self) -> None:
        self.known: tuple[ModelState, dict[Any, Any]] | None = None

    def answer(self, model: nn.Module, question: Any, ask: Callable[[], Any]) -> Any:
        """Return what ask() gives, or gave before for the same question while the model's structure stays as it is."""
        known = self.known  # Read once: a shallow copy, which shares it, may run in another thread.
        if known is None or not known[0].is_of(model) or not known[0].holds():
            known = self.known = ModelState(model), {}
        answers = known[1]
        found = answers.get(question)
        if found is None:
            if len(answers) >= _MOST_ANSWERS:
                answers.clear()
            found = answers[question] = ask()
        return found

    def __deepcopy__(self, memo: Any) -> Memo:
        return Memo()

    def __reduce__(self) -> tuple[type[Memo], tuple[()]]:
        return Memo, ()


# Images of ever new sizes are not to fill the memory.
_MOST_ANSWERS = 1024
_KIND = operator.attrgetter("shape", "dtype")


class ModelState:
    """Of what modules a model is made, how they are set, their hooks, kernel shapes and, if asked, tensors' addresses.

    A walk through all modules costs as much as a small image's kernels: here it is made once, and what it found is
    compared from then on, in a few passes that are loops in C.

    tensors: parameters and buffers, each once. The model itself is not held.
    """

    def __init__(self, model: nn.Module, *, addresses: bool = False) -> None:
        root, *self._inner = model.modules()
        self._types = [*map(type, self._inner)]
        self._settings = [vars(module) for module in (root, *self._inner)]
        self._set = [*map(dict, self._settings)]
        inner = [value for of in self._settings for value in of.values() if isinstance(value, dict)]
        self._owners = [owned for owned in inner if owned]
        self._empty = [owned for owned in inner if not owned]
        self._owned = self._now_owned()
        self.tensors = [*{id(t): t for t in self._owned if isinstance(t, Tensor)}.values()]
        self._weights = [t for t in self.tensors if not is_lazy(t) and t.dim() == 4]
        self._kinds = [*map(_KIND, self._weights)]
        self._addresses = places(self.tensors) if addresses else None

    def _now_owned(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._owners))]

    def is_of(self, model: nn.Module) -> bool:
        """Return whether it is of this model, and not of one that is, or was, a shallow copy of it."""
        return self._settings[0] is vars(model)

    def holds(self) -> bool:
        """Return whether all that is as it was; not what the values are."""
        now = self._now_owned()
        return (
            len(now) == len(self._owned)
            and all(map(operator.is_, now, self._owned))
            and not any(self._empty)
            and [*map(type, self._inner)] == self._types
            and self._has_settings()
            and [*map(_KIND, self._weights)] == self._kinds
            and (self._addresses is None or places(self.tensors) == self._addresses)
        )

    def _has_settings(self) -> bool:
        try:
            return self._settings == self._set
        except (RuntimeError, ValueError):  # Of a tensor or array, which another has taken the place of.
            return False


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return what autocast casts to on that kind of device, None where it is off."""
    return torch.get_autocast_dtype(device) if autocasts(device) else None
