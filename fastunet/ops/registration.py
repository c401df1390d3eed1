"""How every op meets PyTorch: one construction, so that each op's file holds only what is its own.

An op's arguments are stated once, as a NamedTuple, from which its schema is made. It is `Library.define`d with one
implementation for all devices, which is given what `dispatch` chose; a fake that does shape and stride arithmetic only
(a fake that calls an ATen convolution would record that convolution's shape guards); its `torch.autograd.Function` at
the Autograd key, where opcheck, fullgraph compilation and export all see a plain op; and an explicit kernel at the
Autocast keys. Its backward is a second op, which refuses to be differentiated again: left to itself it would silently
give a zero.

Where more than plain reverse mode is asked for, within torch.func's transforms and forward-mode AD, an op is its
composition of torch functions, which has every derivative and batching rule.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fastunet import checks, dispatch, measuring, torch_private
from fastunet.torch_private import in_forward_mode, in_transform

NAMESPACE = "fastunet"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}

# A tensor that the op changes in place.
Changed = typing.Annotated[Tensor | None, "changed"]
_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    float: "float",
    float | None: "float?",
    bool: "bool",
    list[bool]: "bool[]",
    str: "str",
    str | None: "str?",
}


@dataclass(frozen=True)
class Op:
    """A registered op; call it as `op(*arguments)`, arguments an instance of its NamedTuple.

    overload: that of the dispatcher, which gives an empty tensor for each result that was not asked for. implementation
    and composition take the arguments' NamedTuple, and give None there.
    """

    name: str
    arguments: type[Any]
    results: int
    overload: Any
    implementation: Callable[[Any, dispatch.Choice], Any]
    composition: Callable[[Any], Any] | None
    is_torchs: Callable[[Any], bool]

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    def below_autograd(self, *args: Any) -> Any:
        """Call the implementation from the op's own Function's forward."""
        with torch_private.below_autograd():
            return self.overload(*args)

    def invoke(self, args: Any) -> Any:
        """Call the op as `op(*args)` does, by the shortest way where nothing but the values of tensors counts.

        The dispatcher costs the host some 20 µs a call for an op written in Python. Without autocast, transforms, modes
        and tracing it has nothing to add: inference runs the implementation, and a step with gradients that dispatch
        leaves to ATen runs torch's own functions, so that it is to the letter what plain torch does, cuDNN's batch norm
        included. Results not asked for may be None.
        """
        if torch.compiler.is_compiling() or not is_plain_call(args):
            return self.overload(*args)
        if not _is_recorded(args):
            choice = args.choice()
            if choice.unmeasured is not None:
                choice = measuring.settle(self.invoke, args, choice)
            return self.implementation(args, choice)
        return self.composition(args) if _is_torchs(self, args) else self.overload(*args)  # type: ignore[misc]


_OPS: dict[Any, Op] = {}


def schema_of(name: str, arguments: type[Any], results: int) -> str:
    """Return the schema of an op whose arguments are the fields of a NamedTuple, and whose results are tensors."""
    changed = iter("abcdefgh")
    parts = []
    for field, hint in typing.get_type_hints(arguments, include_extras=True).items():
        is_changed = typing.get_origin(hint) is typing.Annotated
        parts.append(f"Tensor({next(changed)}!)? {field}" if is_changed else f"{_SCHEMA_TYPES[hint]} {field}")
    tensors = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    return f"{name}({', '.join(parts)}) -> {tensors}"


def define(
    name: str,
    arguments: type[Any],
    results: int,
    *,
    implementation: Callable[[Any, dispatch.Choice], Any],
    fake: Callable[[Any], Any],
    composition: Callable[[Any], Any] | None = None,
    autograd: type[Function] | None = None,
    is_torchs: Callable[[Any], bool] = lambda args: False,
    choose: Callable[[Any], dispatch.Choice] = lambda args: args.choice(),
) -> Op:
    """Register an op and return it.

    arguments: a NamedTuple, by default with a method `choice(*, training=False)`, what `dispatch` chooses for it.
    implementation and fake give a tensor, or a tuple of `results`, None for those not asked for. `composition` computes
    the same by torch functions alone; a backward op has none. Without `autograd` a gradient raises. `is_torchs(args)`:
    a step with gradients that is left to ATen runs the composition.
    """
    _LIBRARY.define(schema_of(name, arguments, results))
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    implementation = _of_empty_batches(_with_plain_vectors(arguments, implementation), fake)
    composition = composition and _with_plain_vectors(arguments, composition)
    op = _OPS[overload] = Op(name, arguments, results, overload, implementation, composition, is_torchs)

    def computed(compute: Callable[[Any], Any]) -> Callable[..., Any]:
        return lambda *args: _without_none(compute(arguments(*args)), args)

    def run(given: Any) -> Any:
        choice = choose(given)
        if choice.unmeasured is not None and composition is not None:  # A backward goes by what its forward measured.
            choice = measuring.settle(op.invoke, given, choice)
        return implementation(given, choice)

    _LIBRARY.impl(name, computed(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", computed(fake), lib=_LIBRARY)
    function = autograd or _not_differentiable(name, op, is_backward=composition is None)
    compose = None if composition is None else computed(composition)
    if compose is not None:
        # The key above all others, Autocast's too, which is in force within transforms of torch.func alone.
        _LIBRARY.impl(name, compose, "FuncTorchDynamicLayerFrontMode")

    def kernel(*args: Any) -> Any:
        if in_forward_mode():
            if compose is not None:
                return compose(*args)
            if any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
                raise RuntimeError(
                    f"{NAMESPACE}::{name} has no forward-mode derivative: run the op's forward within the same dual "
                    "level as its backward, or use torch.func"
                )
        # A Function below means that a gradient will be asked for: only then is anything kept for it.
        return function.apply(*args) if _is_recorded(args) else op.below_autograd(*args)

    _LIBRARY.impl(name, kernel, "Autograd")
    return op


def define_backward(
    op: Op,
    arguments: type[Any],
    gradients: Sequence[str],
    *,
    implementation: Callable[[Any, dispatch.Choice], tuple[Tensor | None, ...]],
) -> Op:
    """Register the backward of an op, of which dispatch chooses as for a forward with the arguments that both have.

    arguments: a NamedTuple of the outputs' gradients, what was kept, and at last the mask that says which gradients are
    asked for, of the op's arguments of these names.
    """
    shared = [name for name in arguments._fields if name in op.arguments._fields]

    def choose(args: Any) -> dispatch.Choice:
        return op.arguments(**{name: getattr(args, name) for name in shared}).choice(training=True)

    def gradient(args: Any, name: str) -> Tensor | None:
        like = getattr(args, name, None)
        if like is None and name == "bias":  # It is not kept; the first tensor is the gradient of an output.
            return args.weight.new_empty(next(t for t in args if t is not None).shape[1])
        return None if like is None else torch.empty_like(like)

    def fake(args: Any) -> tuple[Tensor | None, ...]:
        return tuple(gradient(args, name) if needed else None for name, needed in zip(gradients, args[-1], strict=True))

    name, results = f"{op.name}_backward", len(gradients)
    return define(name, arguments, results, implementation=implementation, fake=fake, choose=choose)


def registered() -> list[Op]:
    """Return all ops that were defined."""
    return [*_OPS.values()]


def op_named(name: str) -> Op:
    """Return a registered op."""
    return _OPS[getattr(getattr(torch.ops, NAMESPACE), name).default]


def call_of(overload: Any, args: Sequence[Any]) -> tuple[Op, Any] | None:
    """Return the op and the arguments of a call that the dispatcher saw, or None of another's op."""
    op = _OPS.get(overload)
    return None if op is None else (op, op.arguments(*args))


def _is_torchs(op: Op, args: Any) -> bool:
    """Whether a step with gradients is torch's own."""
    if args[0].shape[0] == 0 or not op.is_torchs(args):
        return False
    choice = args.choice(training=True)
    if choice.unmeasured is not None:
        choice = measuring.settle(op.invoke, args, choice)
    slow = dispatch.aten_is_slow(args[0], getattr(args, "weight", None), getattr(args, "stride", 1))
    return choice.implementation == "aten" and not slow


_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain_call(args: Sequence[Any]) -> bool:
    """Return whether no subclass, mode, transform or autocast is to see what is done with these arguments."""
    return is_unseen(args) and not checks.autocasts(args[0].device.type)


def is_unseen(args: Sequence[Any]) -> bool:
    """Return whether no subclass, mode or transform is to see it; autocast may."""
    for a in args:
        if isinstance(a, Tensor) and type(a) not in _PLAIN:
            return False
    return (
        torch_private.dispatch_modes() == 0
        and torch_private.function_modes() == 0
        and not in_forward_mode()
        and not in_transform()
        and not torch_private.is_profiling()
    )


def _without_none(results: Any, args: Sequence[Any]) -> Any:
    """Put an empty tensor for each result that was not asked for: an op's schema has a fixed number of them."""
    if not isinstance(results, tuple):
        return results
    like = next(a for a in args if isinstance(a, Tensor))
    return tuple(like.new_empty(0) if t is None else t for t in results)


def _with_plain_vectors(kind: type[Any], compute: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap compute(args, ...) so that it only sees vectors of parameters as kernels, aten.native_*, mkldnn.* and the
    gradient of torch's batch norm take them.

    They read each vector as if it were contiguous. A strided, expanded or overlapping one is copied, and one that the
    op writes, as running statistics are, is written back.
    """
    hints = [*typing.get_type_hints(kind, include_extras=True).values()]
    tensors = [i for i, hint in enumerate(hints) if hint in (Tensor, Tensor | None, Changed)]
    written = {i for i in tensors if hints[i] is Changed}

    def run(args: Any, *others: Any) -> Any:
        strided = [i for i in tensors if (t := args[i]) is not None and t.dim() == 1 and not t.is_contiguous()]
        if not strided:
            return compute(args, *others)
        plain = list(args)
        for i in strided:
            plain[i] = args[i].contiguous()
        results = compute(kind(*plain), *others)
        for i in written.intersection(strided):
            if not torch.equal(args[i], plain[i]):
                args[i].copy_(plain[i])
        return results

    return run


def _of_empty_batches(implementation: Callable, fake: Callable) -> Callable:
    """Wrap the implementation so that it sees no batch without images, by whose number some divide: its results are
    empty, and gradients of parameters zeros.
    """

    def run(args: Any, choice: dispatch.Choice) -> Any:
        if not any(isinstance(t, Tensor) and t.dim() == 4 and t.shape[0] == 0 for t in args):
            return implementation(args, choice)
        results = fake(args)
        for result in (results,) if isinstance(results, Tensor) else results:
            if result is not None:
                result.zero_()
        return results

    return run


def check_untransformed(what: str) -> None:
    """Raise ConfigError where derivatives are asked for that `what`, for inference alone, would leave out."""
    if in_forward_mode() or in_transform():
        raise checks.ConfigError(
            f"{what} is for inference: expected a call outside of torch.func and forward-mode AD, which take the model "
            "it was made of"
        )


def _is_recorded(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def define_autocast(
    op: Op,
    *,
    cast: Sequence[str],
    parameters: Callable[[Any], Sequence[str]] = lambda args: (),
    rule: Callable[[Any], Any] | None = None,
) -> None:
    """Run op, at the Autocast keys, with the arguments of the names `cast` in the autocast dtype.

    `parameters(args)` are cast as well, into the memory format of the first argument, except where the op prepares them
    once: a cast one is another tensor at every call.
    `rule(args)`, if given, is called first and answers for the op where it returns something else than None.
    As torch's own rules, float64 and integer tensors are left as they are.
    """
    for device, key in _AUTOCAST_KEYS.items():

        def kernel(*values: Any, device: str = device) -> Any:
            args = op.arguments(*values)
            if in_forward_mode():  # Of functions that autocast has rules for.
                return _without_none(op.composition(args), values)  # type: ignore[misc]
            answer = rule(args) if rule is not None else None
            if answer is not None:
                return answer
            dtype = torch.get_autocast_dtype(device)
            args = args._replace(**{name: _cast(getattr(args, name), dtype) for name in cast})
            is_recorded = _is_recorded(args)
            if is_recorded and _is_torchs(op, args):  # Again of functions with rules.
                return _without_none(op.composition(args), values)  # type: ignore[misc]
            if is_recorded or not args.choice().prepares:
                format = torch.channels_last if suggests_channels_last(args[0]) else torch.preserve_format
                args = args._replace(**{name: _cast(getattr(args, name), dtype, format) for name in parameters(args)})
            torch.set_autocast_enabled(device, False)
            try:
                return op.overload(*args)
            finally:
                torch.set_autocast_enabled(device, True)

        _LIBRARY.impl(op.name, kernel, key)


def _cast(value: Any, dtype: torch.dtype, format: torch.memory_format = torch.preserve_format) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
        return value
    return value.to(dtype, memory_format=format if value.dim() == 4 else torch.preserve_format)


def _not_differentiable(name: str, op: Op, *, is_backward: bool) -> type[Function]:
    reason = "fastunet's ops have no second derivative" if is_backward else "it is for inference"
    hint = "transforms of torch.func (grad, jvp, hessian) differentiate torch's own functions in its place"

    class NotDifferentiable(Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return op.below_autograd(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(f"{NAMESPACE}::{name} cannot be differentiated: {reason}; {hint}")

    return NotDifferentiable


def memory_format(*tensors: Tensor | None) -> torch.memory_format:
    """Return channels_last if any of the tensors is, else contiguous: the format of a torch convolution of them."""
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
    return torch_private.suggest_memory_format(t) == torch.channels_last


def empty_in(format: torch.memory_format, like: Tensor, *shape: int) -> Tensor:
    """Return an uninitialised tensor of that shape and format, of like's dtype and device."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=format)


def strided_like(t: Tensor, like: Tensor) -> Tensor:
    """Return t with like's strides, as the fakes of the backward ops promise."""
    return t if t.stride() == like.stride() else torch.empty_like(like, dtype=t.dtype).copy_(t)
