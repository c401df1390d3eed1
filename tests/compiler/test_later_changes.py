"""torch.compile(model, backend="fastunet") of graphs that go on to change images in place, and of odd arguments."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import compare, compare_grads, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastunet


class Layer(nn.Module):
    """A convolution with a norm; what is done with it is for others to say."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x))


class LeakyThenAdded(Layer):
    """Legal since torch keeps a leaky ReLU's argument, unless it is in place."""

    def forward(self, x: Tensor) -> Any:
        y = F.leaky_relu(super().forward(x), 0.1)
        y += x
        return y


class LeakyThenChangedByAView(Layer):
    def forward(self, x: Tensor) -> Any:
        y = F.leaky_relu(super().forward(x), 0.1)
        y.flatten(1).mul_(2)
        return y


class JoinedThenChanged(Layer):
    """Legal since torch.cat copies."""

    def __init__(self) -> None:
        super().__init__(8)

    def forward(self, x: Tensor) -> Any:
        a, b = x * self.bn.weight[:, None, None], x * 2
        y = super().forward(torch.cat([a, b], dim=1))
        return y, a.relu_()


class UpsampledThenChanged(Layer):
    """What leaves the graph is upsampled, and something later changes: it gets its former strides before."""

    def forward(self, x: Tensor) -> Any:
        y = F.relu(super().forward(x))
        z = F.relu(y * y.mean((2, 3), keepdim=True), inplace=True)
        return y, F.interpolate(y, scale_factor=2), z


class PaddedInACheckpoint(Layer):
    """What leaves the region stays within the graph."""

    def inner(self, x: Tensor) -> Tensor:
        return F.pad(F.relu(self.bn(self.conv(x))), [0, 1, 0, 1], "replicate")

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


LATER = [LeakyThenAdded, LeakyThenChangedByAView, JoinedThenChanged, UpsampledThenChanged, PaddedInACheckpoint]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", LATER)
def test_training_is_as_without(kind: type[nn.Module], last: bool, force: bool) -> None:
    torch.manual_seed(0)
    format = torch.channels_last if last else torch.contiguous_format
    plain = kind().double().train().to(memory_format=format)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64).contiguous(memory_format=format)
    torch._dynamo.reset()
    compiled: Any = torch.compile(copy.deepcopy(plain), backend="fastunet", options={"force": force})
    (outputs, grads), (actual, actual_grads) = step(plain, x), step(compiled, x)
    compare(outputs, actual, 1e-11)
    compare_grads(grads, actual_grads, 1e-12)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_what_leaves_may_be_changed_as_without(last: bool) -> None:
    plain, x, grads = nn.Sequential(Layer(), nn.LeakyReLU()).double().train(), torch.randn(2, 4, 8, 8).double(), []
    net = copy.deepcopy(plain)
    for model, forward in (
        (plain, plain),
        (net, fastunet.compile(net) if last else torch.compile(net, backend="fastunet")),
    ):
        y = forward(x)
        y += 1
        y.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    compare_grads(*grads, 1e-12)


def test_explain_answers_for_the_device_and_the_backend_it_is_asked_about() -> None:
    net, x = nn.Sequential(Layer(), nn.ReLU()).train(), torch.randn(1, 4, 8, 8)
    assert fastunet.explain(net, x).replaced == 1
    assert fastunet.explain(net, x, device="cuda").replaced == 0
    with fastunet.backend("aten"):
        assert fastunet.explain(net, x).replaced == 0


def test_a_factor_that_changes_between_calls_is_left() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1)

    def up(x: Tensor, factor: float) -> Tensor:
        return F.interpolate(conv(x), scale_factor=factor, mode="bilinear", recompute_scale_factor=True)

    compiled, x = torch.compile(up, backend="fastunet"), torch.randn(1, 3, 16, 16)
    for factor in (1.5, 1.75):
        compare([up(x, factor)], [compiled(x, factor)], 1e-5)


def test_edges_of_no_width_leave_an_image_in_torchs_strides() -> None:
    def flat(x: Tensor) -> Tensor:
        return F.pad(x.transpose(2, 3), [0, 0, 0, 0], "replicate").view(x.shape[0], -1)

    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(torch.compile(flat, backend="fastunet")(x), flat(x))
