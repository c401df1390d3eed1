"""What the tests of torch.compile(model, backend="fastunet") share."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fastunet import compiler

# ATen's functions in float64: what is left of a difference is rounding.
FORCED = {"fallback": "eager", "force": True}


class Patterns:
    """A backend that finds patterns, replaces them like fastunet's, keeps the account, and runs the rest eagerly."""

    def __init__(self, *, force: bool = True) -> None:
        self.force = force
        self.found: list[Any] = []
        self.graphs = 0

    def __call__(self, graph_module: Any, inputs: Any) -> Any:
        self.found += compiler.replace_patterns(graph_module, force=self.force)
        self.graphs += 1
        return graph_module.forward

    @property
    def ops(self) -> list[str]:
        """The ops put in, in order."""
        return [str(pattern.op) for pattern in self.found if pattern.is_replaced]

    @property
    def descriptions(self) -> list[str]:
        """What they compute."""
        return [pattern.description for pattern in self.found if pattern.is_replaced]

    @property
    def reasons(self) -> list[str]:
        """Why the rest is left."""
        return [pattern.reason for pattern in self.found if not pattern.is_replaced]


def patterns_of(module: nn.Module, *inputs: Tensor, force: bool = True) -> Patterns:
    """What is found in module(*inputs), in its mode: with gradients in training, without in eval."""
    torch._dynamo.reset()
    patterns = Patterns(force=force)
    with torch.set_grad_enabled(module.training):
        torch.compile(copy.deepcopy(module), backend=patterns)(*inputs)
    return patterns


def assert_same(module: nn.Module, *inputs: Tensor, atol: float = 1e-11) -> Patterns:
    """module(*inputs) is the same compiled: the output, and in training all gradients and buffers, in float64."""
    torch._dynamo.reset()
    plain = copy.deepcopy(module).double()
    compiled = copy.deepcopy(plain)
    doubles = [x.double().clone().requires_grad_(module.training) for x in inputs]
    others = [x.detach().clone().requires_grad_(x.requires_grad) for x in doubles]
    patterns = Patterns()
    with torch.set_grad_enabled(module.training):
        expected, actual = flat(plain(*doubles)), flat(torch.compile(compiled, backend=patterns)(*others))
    compare(expected, actual, atol)
    if module.training:
        generator = torch.Generator().manual_seed(7)
        grads = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in expected]
        torch.autograd.backward(expected, grads)
        torch.autograd.backward(actual, grads)
        parameters = zip(plain.parameters(), compiled.parameters(), strict=True)
        pairs = [(a.grad, b.grad) for a, b in (*parameters, *zip(doubles, others, strict=True))]
        assert [a is None for a, _ in pairs] == [b is None for _, b in pairs]
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        largest = max(float(a.abs().max()) for a, _ in both)
        compare([a for a, _ in both], [b for _, b in both], atol * max(1.0, largest))
    compare(list(plain.buffers()), list(compiled.buffers()), atol)
    return patterns


def flat(outputs: Any) -> list[Tensor]:
    """The tensors of a module's output."""
    return [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def compare(expected: list[Tensor], actual: list[Tensor], atol: float) -> None:
    """Equal shapes, dtypes and values."""
    assert len(expected) == len(actual)
    for a, b in zip(expected, actual, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=atol)


def ops_run(call: Any) -> Counter:
    """How often the dispatcher ran each of fastunet's ops during call(); backwards are told by their name."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    names = (event.key for event in profiler.events() if event.key.startswith("fastunet::"))
    return Counter(name.removeprefix("fastunet::") for name in names)
