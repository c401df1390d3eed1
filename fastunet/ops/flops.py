"""FLOPs of the ops, forward and backward, for torch.utils.flop_counter: those of the convolutions they stand for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from math import prod
from typing import Any

COUNTER = "torch.utils.flop_counter"


def register_formulas(ops: Iterable[Any]) -> None:
    """Have FlopCounterMode count these ops. Its module is waited for: importing it imports triton, if there is one."""
    formulas = {
        op.overload.overloadpacket: _formula(op.arguments._fields) for op in ops if "weight" in op.arguments._fields
    }
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER], formulas)
    else:
        sys.meta_path.insert(0, _OnImport(formulas))


def _register(counter: Any, formulas: dict[Any, Callable[..., int]]) -> None:
    for op, formula in formulas.items():
        counter.register_flop_formula(op)(formula)


class _OnImport(MetaPathFinder):
    """Registers the formulas as soon as the counter is imported."""

    def __init__(self, formulas: dict[Any, Callable[..., int]]) -> None:
        self.formulas = formulas

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _register(module, self.formulas)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _formula(names: Sequence[str]) -> Callable[..., int]:
    def flops(*args: Any, **_: Any) -> int:
        """Count those of an op's arguments, each tensor as its shape."""
        given = dict(zip(names, args, strict=True))
        total = _flops(given["x" if "x" in given else "skip"], given["weight"], given.get("stride", 1))
        if "output_mask" in given:  # Of x, up where there is one, and weight, in this order; then of others.
            *of_images, of_weight = given["output_mask"][: names.index("weight") - names.index("x") + 1]
            total *= any(of_images) + of_weight
        if "head_weight" in given:
            total += _flops(given["x"], given["head_weight"])
        if given.get("up_weight") is not None:
            total += _flops(given["low"], given["up_weight"])
        return total

    return flops


def _flops(image: Any, weight: Any, stride: int = 1) -> int:
    """Of a convolution by that stride, or a transposed one that doubles the size, and of each of its gradients."""
    return 2 * image[0] * prod((side + stride - 1) // stride for side in image[2:]) * prod(weight)
