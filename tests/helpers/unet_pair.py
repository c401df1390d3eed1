"""A UNet and its reference model, changed alike, and what is to be the same of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastunet
from fastunet.testing import UNIT_ROUNDOFF, assert_within, random_cotangent

FEATURES = (4, 6, 8)
SHAPE = (2, 2, 13, 18)
# In unit roundoffs of the largest value: thirteen convolutions and as many norms follow each other, whose sums of up to
# 145 products are each off by 6 sqrt(145) = 72 of them; there and back that is 1,900.
ROUNDOFFS = 2**12


def moved(model: Any) -> Any:
    """The model with other statistics than a new one's, by which its ReLUs still give more than zeros."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.bias, 0, 0.5)
    return model


def pair(change: Callable[[Any], Any] | None = None, **options: Any) -> tuple[Any, Any]:
    """The model and its reference, both changed by the same function, with other statistics than a new model's."""
    torch.manual_seed(0)
    model = moved(fastunet.UNet(2, 3, **{"features": FEATURES, **options})).to(memory_format=torch.contiguous_format)
    nets = [model.double(), model.to_reference()]
    for i, net in enumerate(nets):
        net(torch.ones(SHAPE, dtype=torch.float64))  # What a net remembers of itself is to be forgotten by the change.
        torch.manual_seed(1)
        nets[i] = ((change and change(net)) or net).double()
    return nets[0], nets[1]


def assert_near(actual: Tensor, reference: Tensor, largest: float | None = None) -> None:
    largest = float(reference.detach().abs().max()) if largest is None else largest
    assert_within(actual, reference, ROUNDOFFS * UNIT_ROUNDOFF[reference.dtype] * largest)


def call(net: Any, x: Tensor) -> Tensor:
    torch.manual_seed(2)  # Of dropout.
    return net(x)


def assert_trains_alike(model: Any, reference: Any, x: Tensor) -> None:
    """One step: the output, every gradient, the buffers after it."""
    images = [x.clone().requires_grad_() for _ in range(2)]
    ours, expected = (call(net, image) for net, image in zip((model, reference), images, strict=True))
    assert_near(ours, expected)
    cotangent = random_cotangent(expected)
    ours.backward(cotangent)
    expected.backward(cotangent)
    parameters = [dict(net.named_parameters()) for net in (model, reference)]
    assert parameters[0].keys() == parameters[1].keys()
    pairs = [
        (images[0].grad, images[1].grad),
        *((p.grad, parameters[1][name].grad) for name, p in parameters[0].items()),
    ]
    assert [a is None for a, _ in pairs] == [b is None for _, b in pairs]
    largest = max(float(b.abs().max()) for _, b in pairs if b is not None)
    for a, b in pairs:
        if b is not None:
            assert_near(a, b, largest)
    for a, b in zip(model.buffers(), reference.buffers(), strict=True):
        assert_near(a, b) if b.is_floating_point() else assert_within(a, b, 0)


def put(path: str, make: Callable[[], nn.Module]) -> Callable[[Any], None]:
    """Put a new module in the place of another."""
    return lambda net: net.set_submodule(path, make())


def wrap(path: str, make: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    """Put what is made of a module into its place."""
    return lambda net: net.set_submodule(path, make(net.get_submodule(path)))


def patched(path: str, name: str = "forward") -> Callable[[Any], None]:
    """A method of the instance that gives twice what its class's gives."""

    def change(net: Any) -> None:
        module = net.get_submodule(path)
        old = getattr(module, name)
        setattr(module, name, lambda *args: 2 * old(*args))

    return change


def subclassed(path: str) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        module = net.get_submodule(path)
        kind = type(module)
        module.__class__ = type("Doubled", (kind,), {"forward": lambda self, *args: 2 * kind.forward(self, *args)})

    return change


class Doubled(nn.Module):
    """What some other package wraps modules in."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor) -> Tensor:
        return 2 * self.inner(*args)


def modules_of(net: nn.Module) -> list[str]:
    return [name for name, _ in net.named_modules() if name]


def called(**options: Any) -> list[str]:
    """The modules of such a model, each of which runs when it is called."""
    return modules_of(fastunet.UNet(1, 1, **{"features": FEATURES, **options}))
