"""Inputs that our kernels' backward computes anew: the same gradients to the bit from fewer kept tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_device import DEVICE, MARK
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fastunet
from fastunet import ops
from fastunet.ops import recompute
from fastunet.testing import assert_within, random_cotangent, random_input

pytestmark = [MARK, pytest.mark.usefixtures("ieee", "forced")]
# An image, its two levels' channels: 8 x 8 pixels and 4 x 4.
X, OUT = (2, 3, 8, 8), (2, 2, 8, 8)


def net(norm: str, **options: Any) -> fastunet.UNet:
    torch.manual_seed(0)
    model = fastunet.UNet(3, 2, features=(4, 6), norm=norm, **options).to(DEVICE)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None or isinstance(module, torch.nn.InstanceNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    return model.train()


def gradients(model: torch.nn.Module, autocast: bool) -> list[Tensor]:
    x = image().requires_grad_()
    with torch.autocast(DEVICE.type, torch.float16, enabled=autocast):
        y = model(x)
    y.backward(image(OUT, seed=1).to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def image(shape: tuple[int, ...] = X, **options: Any) -> Tensor:
    return random_input(shape, device=DEVICE, **options)


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert_within(a, b, 0)


@pytest.mark.parametrize(
    ("options", "autocast"),
    [
        ({"norm": "batch", "activation": "leaky_relu"}, False),
        ({"norm": "instance"}, False),
        ({"norm": "instance", "head": "sigmoid", "upsample": "bilinear"}, False),
        ({"norm": "batch"}, True),
    ],
    ids=str,
)
def test_gradients_are_those_of_kept_inputs(options: dict[str, Any], autocast: bool) -> None:
    actual = gradients(net(**options), autocast)
    with fastunet.recomputing(False):
        kept = gradients(net(**options), autocast)
    assert_same(actual, kept)


@pytest.mark.parametrize(("norm", "recomputes"), [("batch", True), ("instance", True), ("batch", False)])
def test_no_activation_is_kept(norm: str, recomputes: bool) -> None:
    """Of each pair of layers only the input and the two sums; of the net also what pooling and upsampling give. But
    where that is switched off, each pair's two outputs, the last one for the head.
    """
    model, x = net(norm), image()
    parameters = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, ...]] = {}

    def keep(t: Tensor) -> Tensor:
        if t.dim() == 4 and t.data_ptr() not in parameters:
            kept[t.data_ptr()] = tuple(t.shape)
        return t

    with fastunet.recomputing(recomputes), saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    level, below, doubled = (2, 4, 8, 8), (2, 6, 4, 4), (2, 4, 8, 8)
    expected = [X, *[level] * 2, (2, 4, 4, 4), *[below] * 2, doubled, *[level] * 2]
    expected += [] if recomputes else [*[level] * 2, *[below] * 2, *[level] * 2]
    assert sorted(kept.values()) == sorted(expected)
    assert y.requires_grad


def two_layers(x: Tensor, weights: list[Tensor], gamma: Tensor, beta: Tensor, between: Any = None) -> Tensor:
    y = ops.conv3x3_instance_norm_relu(x, weights[0], gamma, beta)
    if between is not None:
        y = between(y)
    return ops.conv3x3_instance_norm_relu(y, weights[1], gamma, beta)


@pytest.fixture
def layers() -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """x, two weights, gamma and beta."""
    weights = [image((3, 3, 3, 3), seed=s).requires_grad_() for s in (1, 2)]
    gamma, beta = (image((3,), seed=s).requires_grad_() for s in (3, 4))
    return image(), weights, gamma, beta


def test_a_changed_activation_is_what_counts(layers: tuple) -> None:
    """Changed in place on its way, by autograd's leave or behind its back."""
    x, weights, gamma, beta = layers

    def doubled(y: Tensor) -> Tensor:
        with torch.no_grad():
            return y.mul_(2)

    changes = (doubled, lambda y: y.mul_(2), lambda y: y * 2)
    results = []
    for change in changes:
        z = two_layers(x, weights, gamma, beta, change)
        results.append(torch.autograd.grad(z, weights[1], random_cotangent(z))[0])
    assert_same(results[:1] * 2, results[1:])
    plain = torch.autograd.grad(two_layers(x, weights, gamma, beta), weights[1], random_cotangent(z))[0]
    assert not torch.equal(plain, results[0])


def test_a_parameter_changed_before_backward_raises(layers: tuple) -> None:
    x, weights, gamma, beta = layers
    z = two_layers(x, weights, gamma, beta)
    with torch.no_grad():
        beta.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward(random_cotangent(z))


def test_only_the_inputs_gradient_needs_no_values(layers: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastunet.kernels import norm

    x, weights, gamma, beta = layers
    x.requires_grad_()
    frozen = [weights[0], weights[1].detach()]
    z = two_layers(x, frozen, gamma, beta)
    expected = torch.autograd.grad(two_layers(x, weights, gamma, beta), x, random_cotangent(z))[0]
    monkeypatch.setattr(norm, "normalise", lambda *_, **__: pytest.fail("computed what nothing reads"))
    assert_within(torch.autograd.grad(z, x, random_cotangent(z))[0], expected, 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(layers: tuple, reentrant: bool) -> None:
    x, weights, gamma, beta = layers
    leaves = [x.requires_grad_(), *weights, gamma, beta]
    z = two_layers(x, weights, gamma, beta)
    expected = torch.autograd.grad(z, leaves, random_cotangent(z))
    first = ops.conv3x3_instance_norm_relu(x, weights[0], gamma, beta)
    second = checkpoint(
        lambda y: ops.conv3x3_instance_norm_relu(y, weights[1], gamma, beta), first, use_reentrant=reentrant
    )
    second.backward(random_cotangent(z))
    assert_same([t.grad for t in leaves], list(expected))


def test_backward_twice(layers: tuple) -> None:
    x, weights, gamma, beta = layers
    z = two_layers(x, weights, gamma, beta)
    first = torch.autograd.grad(z, weights, random_cotangent(z), retain_graph=True)
    assert_same(list(torch.autograd.grad(z, weights, random_cotangent(z))), list(first))


def test_what_is_remembered_goes_with_the_activation(layers: tuple) -> None:
    x, weights, gamma, beta = layers
    before = len(recompute._origins)
    y = ops.conv3x3_instance_norm_relu(x, weights[0], gamma, beta)
    assert len(recompute._origins) == before + 1
    del y
    assert len(recompute._origins) == before


def test_nothing_is_remembered_without_a_gradient_or_our_kernels(layers: tuple) -> None:
    x, weights, gamma, beta = layers
    before = len(recompute._origins)
    with torch.no_grad():
        a = ops.conv3x3_instance_norm_relu(x, weights[0], gamma, beta)
    with fastunet.backend("aten"):
        b = ops.conv3x3_instance_norm_relu(x, weights[0], gamma, beta)
    assert len(recompute._origins) == before, (a, b)
