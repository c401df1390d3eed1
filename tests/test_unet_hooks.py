"""Hooks on any module of fastunet.UNet see, and change, what they would of its reference model."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules
from unet_pair import SHAPE, assert_near, called, modules_of, pair

from fastunet.testing import random_cotangent, random_input

X = random_input(SHAPE, dtype=torch.float64)


def before_call(found: list[Any], module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    found.append(args)
    return tuple(1.5 * t for t in args)


def after_call(found: list[Any], module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    found.append((*args, y))
    return 0.75 * y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", ["batch", None])
def test_each_module_alone_is_seen_and_changed_by_its_hooks(norm: str | None, dtype: torch.dtype) -> None:
    """By a hook before it, on what it gets; by one after it, on what it gives; and by none that has been removed."""
    options = {"norm": norm, "features": (4, 6)}
    model, reference = (net.eval().to(dtype) for net in pair(**options))
    x = X.to(dtype)
    with torch.no_grad():
        before = reference(x)
    for path in called(**options):
        results, seen = [], []
        for net in (model, reference):
            module, found = net.get_submodule(path), []
            hooks = [
                module.register_forward_pre_hook(functools.partial(before_call, found)),
                module.register_forward_hook(functools.partial(after_call, found)),
            ]
            with torch.no_grad():
                results.append(net(x))
            for hook in hooks:
                hook.remove()
            seen.append([t for tensors in found for t in tensors])
        assert len(seen[0]) == len(seen[1]) > 0
        for a, b in zip(*seen, strict=True):
            assert_near(a, b)
        assert_near(*results)
        assert not torch.equal(results[1], before)
    with torch.no_grad():
        assert_near(model(x), before)


REGISTERS: dict[str, tuple[str, dict[str, bool]]] = {
    "forward": ("register_forward_hook", {}),
    "forward with kwargs": ("register_forward_hook", {"with_kwargs": True}),
    "forward, always called": ("register_forward_hook", {"always_call": True}),
    "forward, first": ("register_forward_hook", {"prepend": True}),
    "before forward": ("register_forward_pre_hook", {}),
    "before forward with kwargs": ("register_forward_pre_hook", {"with_kwargs": True}),
    "backward": ("register_full_backward_hook", {}),
    "before backward": ("register_full_backward_pre_hook", {}),
}


def tensors_in(values: Any) -> Iterator[Tensor | None]:
    for value in values:
        if isinstance(value, Tensor) or value is None:
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors_in(value)


@pytest.mark.parametrize("kind", REGISTERS)
@pytest.mark.parametrize("which", ["all", "every third"])
def test_hooks_see_what_the_references_see(kind: str, which: str) -> None:
    """Which module, in which order, with which values; the model is in training, so that backward hooks fire."""
    register, options = REGISTERS[kind]
    nets, seen = pair(), []
    for net in nets:
        events: list[tuple[str, list[Tensor | None]]] = []
        names = modules_of(net)
        for name in names[2::3] if which == "every third" else names:
            note = lambda _, *given, name=name, events=events: events.append((name, [*tensors_in(given)]))  # noqa: E731
            getattr(net.get_submodule(name), register)(note, **options)
        y = net(X.clone().requires_grad_())
        y.backward(random_cotangent(y))
        seen.append(events)
    ours, expected = seen
    assert [name for name, _ in ours] == [name for name, _ in expected]
    assert len(ours) > 5
    largest = max(float(t.abs().max()) for _, tensors in expected for t in tensors if t is not None)
    for (_, a), (_, b) in zip(ours, expected, strict=True):
        assert [t is None for t in a] == [t is None for t in b]
        for s, t in zip(a, b, strict=True):
            if s is not None:
                assert_near(s, t, largest)


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_of_all_modules(kind: str) -> None:
    nets, seen = pair(), []
    for net in nets:
        names = {module: name for name, module in net.named_modules()}
        events: list[str] = []
        register = getattr(of_all_modules, f"register_module_{kind}")
        hook = register(lambda module, *_, names=names, events=events: events.append(names[module]))
        try:
            y = net(X.clone().requires_grad_())
            y.backward(random_cotangent(y))
        finally:
            hook.remove()
        seen.append(events)
    assert seen[0] == seen[1]
    assert len(seen[0]) == len([*nets[0].modules()])


def test_a_hook_that_is_always_called_is_called_when_the_model_fails() -> None:
    counts = []
    for net in pair():
        seen: list[str] = []
        net.inc.register_forward_hook(lambda *_, seen=seen: seen.append("inc"), always_call=True)
        with pytest.raises((ValueError, RuntimeError)):
            net(random_input((1, 7, 16, 16), dtype=torch.float64))
        counts.append(len(seen))
    assert counts == [1, 1]
