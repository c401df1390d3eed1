"""How every op meets PyTorch: one construction, so that each op's file holds only what is its own.

An op is `Library.define`d with one implementation for all devices, which asks `dispatch` what to run; a fake that
does shape and stride arithmetic only (a fake that calls an ATen convolution would record that convolution's shape
guards); its `torch.autograd.Function` at the Autograd key, where opcheck, fullgraph compilation and export all see a
plain op; and an explicit kernel at the Autocast keys. Its backward is a second op, which refuses to be differentiated
again: left to itself it would silently give a zero.

Where more than plain reverse mode is asked for, within torch.func's transforms and forward-mode AD, an op is its
composition of torch functions, which has every derivative and batching rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import Function, forward_ad

from fastunet import checks, dispatch

NAMESPACE = "fastunet"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
# By op, and by name.
_IMPLEMENTATIONS: dict[Any, Callable] = {}
_COMPOSITIONS: dict[str, Callable] = {}
# Names of ops whose gradients on ATen are torch's own.
_TORCHS: set[str] = set()
# By op, what finds its weight among its arguments, and whether they say that there will be a backward.
_WEIGHT: dict[str, Callable[..., tuple[Tensor | None, bool]]] = {}


def define(
    schema: str,
    *,
    implementation: Callable,
    fake: Callable,
    composition: Callable | None = None,
    autograd: type[Function] | None = None,
    weight: Callable[..., tuple[Tensor | None, bool]] | None = None,
    is_torchs: bool = False,
) -> Callable:
    """Register an op from its schema and return it.

    `composition` computes the same from the same arguments by torch functions alone; a backward op has none. Without
    `autograd` a gradient raises. `weight(*args)` gives what `dispatch.choose` is told: the weight, and whether there
    will be a backward. `is_torchs`: a step with gradients that is left to ATen runs the composition.
    """
    name = schema.partition("(")[0]
    if weight is not None:
        _WEIGHT[name] = weight
    if is_torchs:
        _TORCHS.add(name)
    _LIBRARY.define(schema)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    implementation = _with_plain_arguments(op, implementation, fake)
    _IMPLEMENTATIONS[op] = implementation
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    function = autograd or _not_differentiable(name, op, is_backward=composition is None)
    if composition is not None:
        # The key above all others, Autocast's too, which is in force within transforms of torch.func alone.
        _LIBRARY.impl(name, composition, "FuncTorchDynamicLayerFrontMode")
        _COMPOSITIONS[name] = composition

    def kernel(*args: Any) -> Any:
        if in_forward_mode():
            if composition is not None:
                return composition(*args)
            _refuse_tangents(name, args)
        # A Function below means that a gradient will be asked for: only then is anything kept for it.
        return function.apply(*args) if _is_recorded(args) else below_autograd(op, *args)

    _LIBRARY.impl(name, kernel, "Autograd")
    return op


def registered() -> list[Any]:
    """Return all ops that were defined."""
    return [*_IMPLEMENTATIONS]


def invoke(op: Any, *args: Any) -> Any:
    """Call a registered op as `op(*args)` does, by the shortest way where nothing but the values of tensors counts.

    The dispatcher costs the host some 20 µs a call for an op written in Python. Without autocast, transforms, modes and
    tracing it has nothing to add: inference runs the implementation, and a step with gradients that dispatch leaves to
    ATen runs torch's own functions, so that it is to the letter what plain torch does, cuDNN's batch norm included.
    """
    if torch.compiler.is_compiling() or not _is_plain_call(args):
        return op(*args)
    if not _is_recorded(args):
        return _IMPLEMENTATIONS[op](*args)
    if _is_torchs(op._opname, args[0], args):
        return _COMPOSITIONS[op._opname](*args)
    return op(*args)


def _is_torchs(name: str, x: Tensor, args: Sequence[Any]) -> bool:
    """Whether a step with gradients on an activation like x is torch's own."""
    if name not in _TORCHS or x.shape[0] == 0:
        return False
    weight, _ = _WEIGHT[name](*args) if name in _WEIGHT else (None, False)
    choice = dispatch.choose(name, x, weight, training=True)
    return choice.implementation == "aten" and not dispatch.aten_is_slow(x, weight)


_PLAIN = (Tensor, torch.nn.Parameter)


def _is_plain_call(args: Sequence[Any]) -> bool:
    """Whether no subclass, mode, transform or autocast is to see the op."""
    return (
        all(type(a) in _PLAIN for a in args if isinstance(a, Tensor))
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not in_forward_mode()
        and not in_transform()
        and not checks.autocasts(args[0].device.type)
        and not torch.autograd.profiler._is_profiler_enabled
    )


def _with_plain_arguments(op: Any, implementation: Callable, fake: Callable) -> Callable:
    """Wrap the implementation so that it only sees arguments as kernels, aten.native_* and mkldnn.* take them.

    They read each vector of parameters as if it were contiguous, and some divide by the number of images. A strided,
    expanded or overlapping vector is copied, and one that the op writes, as running statistics are, is written back. An
    empty batch has empty results, and zeros for gradients of parameters.
    """
    arguments = op._schema.arguments
    tensors = [i for i, argument in enumerate(arguments) if "Tensor" in str(argument.type)]
    written = {i for i in tensors if arguments[i].alias_info is not None and arguments[i].alias_info.is_write}

    def run(*args: Any) -> Any:
        strided = []
        for i in tensors:
            t = args[i]
            if t is None:
                continue
            if t.dim() == 1:
                if not t.is_contiguous():
                    strided.append(i)
            elif t.dim() == 4 and t.shape[0] == 0:
                results = fake(*args)
                for result in (results,) if isinstance(results, Tensor) else results:
                    result.zero_()
                return results
        if not strided:
            return implementation(*args)
        plain = list(args)
        for i in strided:
            plain[i] = args[i].contiguous()
        results = implementation(*plain)
        for i in written.intersection(strided):
            if not torch.equal(args[i], plain[i]):
                args[i].copy_(plain[i])
        return results

    return run


def in_forward_mode() -> bool:
    """Whether a level of forward-mode AD is active: any tensor may then carry a tangent, which a kernel would drop."""
    # Without that name every call would be right, but slow.
    return getattr(forward_ad, "_current_level", 0) >= 0


def in_transform() -> bool:
    """Whether a transform of torch.func is active: a tensor may then stand for a batch, which has no memory format."""
    return getattr(torch._C, "_are_functorch_transforms_active", lambda: False)()


def check_untransformed(what: str) -> None:
    """Raises ConfigError where derivatives are asked for that `what`, for inference alone, would leave out."""
    if in_forward_mode() or in_transform():
        raise checks.ConfigError(
            f"{what} is for inference: expected a call outside of torch.func and forward-mode AD, which take the model "
            "it was made of"
        )


def _refuse_tangents(name: str, args: Sequence[Any]) -> None:
    if any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
        raise RuntimeError(
            f"{NAMESPACE}::{name} has no forward-mode derivative: run the op's forward within the same dual level as "
            "its backward, or use torch.func"
        )


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

    `parameters` are cast as well, into the memory format of the first argument, except where the op prepares them once:
    a cast one is another tensor at every call.
    `rule(*args)`, if given, is called first and answers for the op where it returns something else than None.
    As torch's own rules, float64 and integer tensors are left as they are.
    """
    name = op.name().partition("::")[2].partition(".")[0]
    for device, key in _AUTOCAST_KEYS.items():

        def kernel(*args: Any, device: str = device, key: str = key) -> Any:
            if in_forward_mode():
                return _COMPOSITIONS[name](*args)  # Of functions that autocast has rules for.
            answer = rule(*args) if rule is not None else None
            if answer is not None:
                return answer
            dtype = torch.get_autocast_dtype(device)
            values = [_cast(a, dtype) if i in cast else a for i, a in enumerate(args)]
            is_recorded = _is_recorded(args)
            if is_recorded and device == "cuda" and _is_torchs(name, values[0], args):
                return _COMPOSITIONS[name](*args)  # Of functions that autocast has rules for.
            is_prepared = not is_recorded and choice_for(name, values[0], args).prepares
            if not is_prepared:
                format = torch.channels_last if suggests_channels_last(values[0]) else torch.preserve_format
                values = [_cast(a, dtype, format) if i in parameters else a for i, a in enumerate(values)]
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
                return op(*values)

        _LIBRARY.impl(name, kernel, key)


def _cast(value: Any, dtype: torch.dtype, format: torch.memory_format = torch.preserve_format) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
        return value
    return value.to(dtype, memory_format=format if value.dim() == 4 else torch.preserve_format)


def _not_differentiable(name: str, op: Callable, *, is_backward: bool) -> type[Function]:
    reason = "fastunet's ops have no second derivative" if is_backward else "it is for inference"
    hint = "transforms of torch.func (grad, jvp, hessian) differentiate torch's own functions in its place"

    class NotDifferentiable(Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return below_autograd(op, *args)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(f"{NAMESPACE}::{name} cannot be differentiated: {reason}; {hint}")

    return NotDifferentiable


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
