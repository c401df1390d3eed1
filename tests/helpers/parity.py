"""What the tests of torch.compile(model, backend="fastunet") share."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from fastunet.benchmarks.dropin_models import MODELS, DropInModel
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fastunet.compiler import backend
from fastunet.reference import ReferenceUNet

ALL = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
FORCED = {"fallback": "eager", "force": True}


def built(model: DropInModel, width: int = 4) -> nn.Module:
    """The model with so many channels in its first level."""
    torch.manual_seed(0)
    return model.build(width)


def image(model: DropInModel, height: int = 32, width: int = 32, batch: int = 2) -> Tensor:
    """A batch of its images."""
    return torch.randn(batch, model.channels, height, width, generator=torch.Generator().manual_seed(3))


def large_image(model: DropInModel) -> Tensor:
    """A batch that leaves the deepest batch norm enough values: one of two values multiplies rounding by hundreds."""
    side = 96 if model.name.startswith("smp") else 32  # These go five levels down.
    return image(model, side, side)


LEVELS = (4, 8)
# The ops of such a U-Net in training, and in inference on the CPU.
IN_TRAINING = {"conv3x3": 6, "conv_transpose2x2": 1, "conv1x1": 1}
IN_INFERENCE = {
    "conv3x3": 4,
    "conv_transpose2x2_concat_conv3x3_relu": 1,
    "conv3x3_relu_conv1x1": 1,
}


def small_unet(**options: Any) -> ReferenceUNet:
    """A U-Net of two levels in plain PyTorch whose running statistics have moved."""
    torch.manual_seed(0)
    model = ReferenceUNet(1, 2, **{"features": LEVELS, **options})
    with torch.no_grad():
        model(torch.randn(2, 1, 16, 16))  # Moves the running statistics.
    return model


def small_image(batch: int = 2, height: int = 16, width: int = 18) -> Tensor:
    """A batch of images for it."""
    return torch.randn(batch, 1, height, width, generator=torch.Generator().manual_seed(1))


class Patterns:
    """A backend that finds patterns, replaces them like fastunet's, keeps the account, and runs the rest eagerly."""

    def __init__(self, *, force: bool = True) -> None:
        self.force = force
        self.found: list[Any] = []
        self.graphs = 0

    def __call__(self, graph_module: Any, inputs: Any) -> Any:
        self.found += backend.replace_patterns(graph_module, force=self.force)
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
        # Each layer for itself: with other sizes left open, code of one may serve another.
        torch.compile(copy.deepcopy(module), backend=patterns, dynamic=False)(*inputs)
    return patterns


def assert_same(module: nn.Module, *inputs: Tensor, atol: float = 1e-11) -> Patterns:
    """module(*inputs) is the same with every pattern replaced, in its mode: the output, and in training the gradients
    of inputs and parameters for random cotangents, and the buffers. In float64, so that what differs is no rounding;
    gradients to atol of the largest of the model, for a bias before a norm has rounding for a gradient and we zeros.
    """
    torch._dynamo.reset()
    plain, patterns = copy.deepcopy(module).double(), Patterns()
    replaced: Any = torch.compile(copy.deepcopy(plain), backend=patterns)
    results = []
    for net in (plain, replaced):
        images = [x.detach().double().clone().requires_grad_(module.training) for x in inputs]
        torch.manual_seed(11)  # The same dropout each time.
        with torch.set_grad_enabled(module.training):
            outputs = flat(net(*images))
        if module.training:
            generator = torch.Generator().manual_seed(7)
            cotangents = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
            torch.autograd.backward(outputs, cotangents)
        grads = [p.grad for p in net.parameters()] + [x.grad for x in images]
        results.append((outputs, grads, list(net.buffers())))
    (expected, grads, buffers), (actual, other_grads, other_buffers) = results
    compare(expected, actual, atol)
    compare_grads(grads, other_grads, atol)
    compare(buffers, other_buffers, atol)
    return patterns


def compare_grads(expected: list[Tensor | None], actual: list[Tensor | None], atol: float) -> None:
    """Gradients where there are any, to atol of the largest."""
    assert [g is None for g in expected] == [g is None for g in actual]
    pairs = [(a, b) for a, b in zip(expected, actual, strict=True) if a is not None and b is not None]
    largest = max((float(a.abs().max()) for a, _ in pairs), default=0.0)
    compare([a for a, _ in pairs], [b for _, b in pairs], atol * max(1.0, largest))


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


def step(net: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs and parameters' gradients of a training step, for random cotangents."""
    torch.manual_seed(11)
    outputs = flat(net(x))
    generator = torch.Generator().manual_seed(7)
    torch.autograd.backward(outputs, [torch.randn(y.shape, generator=generator) / y.numel() ** 0.5 for y in outputs])
    return [y.detach() for y in outputs], [p.grad for p in net.parameters()]
