"""How every op meets PyTorch: one construction, so that each op's file holds only what is its own.

An op is `Library.define`d with one implementation for all devices, which asks `dispatch` what to run; a fake that
does shape and stride arithmetic only (a fake that calls an ATen convolution would record that convolution's shape
guards); its `torch.autograd.Function` at the Autograd key, where opcheck, fullgraph compilation and export all see a
plain op; and an explicit kernel at the Autocast keys. Its backward is a second op, which refuses to be differentiated
again: left to itself it would silently give a zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import Function

from fastunet import dispatch

NAMESPACE = "fastunet"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
# By op, what finds its weight among its arguments, and whether they say that there will be a backward.
_WEIGHT: dict[str, Callable[..., tuple[Tensor | None, bool]]] = {}


def define(
    schema: str,
    *,
    implementation: Callable,
    fake: Callable,
    autograd: type[Function] | None = None,
    weight: Callable[..., tuple[Tensor | None, bool]] | None = None,
) -> Callable:
    """Register an op from its schema and return it. Without `autograd` it is a backward op: a second derivative
    raises. `weight(*args)` gives what `dispatch.choose` is told: the weight, and whether there will be a backward.
    """
    name = schema.partition("(")[0]
    if weight is not None:
        _WEIGHT[name] = weight
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    function = autograd or _once_differentiable(name, op)

    def kernel(*args: Any) -> Any:
        # A Function below means that a gradient will be asked for: only then is anything kept for it.
        return function.apply(*args) if _is_recorded(args) else below_autograd(op, *args)

    _LIBRARY.impl(name, kernel, "Autograd")
    return op


def _is_recorded(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def choice_for(name: str, x: Tensor, args: Sequence[Any], *, training: bool = False) -> dispatch.Choice:
    """What `dispatch` chooses for an op with these arguments, x among them its activation, and in training."""
    weight, keeps = _WEIGHT[name](*args) if name in _WEIGHT else (None, False)
    return dispatch.choose(name, x, weight, training=training or keeps)


def below_autograd(op: Callable, *args: Any) -> Any:
    """Call the op's implementation from its own Function's forward."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def define_autocast(
    op: Any, *, cast: tuple[int, ...], parameters: tuple[int, ...] = (), rule: Callable | None = None
) -> None:
    """At the Autocast keys, run op with the tensor arguments at the positions `cast` in the autocast dtype.

    `parameters` are cast as well, except where the op prepares them once: a cast one is another tensor at every call.
    `rule(*args)`, if given, is called first and answers for the op where it returns something else than None.
    As torch's own rules, float64 and integer tensors are left as they are.
    """
    name = op.name().partition("::")[2].partition(".")[0]
    for device, key in _AUTOCAST_KEYS.items():

        def kernel(*args: Any, device: str = device, key: str = key) -> Any:
            answer = rule(*args) if rule is not None else None
            if answer is not None:
                return answer
            dtype = torch.get_autocast_dtype(device)
            values = [_cast(a, dtype) if i in cast else a for i, a in enumerate(args)]
            is_prepared = not _is_recorded(args) and choice_for(name, values[0], args).prepares
            if not is_prepared:
                values = [_cast(a, dtype) if i in parameters else a for i, a in enumerate(values)]
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
                return op(*values)

        _LIBRARY.impl(name, kernel, key)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
        return value
    return value.to(dtype)


def _once_differentiable(name: str, op: Callable) -> type[Function]:
    class OnceDifferentiable(Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return below_autograd(op, *args)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(
                f"{NAMESPACE}::{name} cannot be differentiated: fastunet's ops have no second derivative"
            )

    return OnceDifferentiable


def memory_format(*tensors: Tensor | None) -> torch.memory_format:
    """channels_last if any of the tensors is, else contiguous: the format a torch convolution of them returns."""
    if any(t is not None and suggests_channels_last(t) for t in tensors):
        return torch.channels_last
    return torch.contiguous_format


def suggests_channels_last(t: Tensor) -> bool:
    """Whether torch takes a 4-D tensor for channels_last: where it is contiguous either way, or neither, as torch does
    by the order of its strides.
    """
    is_channels_last = t.is_contiguous(memory_format=torch.channels_last)
    if is_channels_last != t.is_contiguous():
        return is_channels_last
    return suggest_memory_format(t) == torch.channels_last


def empty_in(format: torch.memory_format, like: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor of that shape and format, of like's dtype and device."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=format)


def none_like(t: Tensor) -> Tensor:
    """Stands for a tensor not asked for: an op's schema has a fixed number of returns."""
    return t.new_empty(0)


def strided_like(t: Tensor, like: Tensor) -> Tensor:
    """t with like's strides, as the fakes of the backward ops promise."""
    return t if t.stride() == like.stride() else torch.empty_like(like, dtype=t.dtype).copy_(t)
