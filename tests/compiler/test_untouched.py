"""torch.compile(model, backend="fastunet") where nothing is gained: inductor gets the graph as Dynamo left it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import ALL, built, large_image
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastunet
from fastunet.compiler import backend, rewriting
from fastunet.compiler.rewriting import replicate_pad
from fastunet.dispatch import VOLUMES


def account(graph_module: Any) -> list[Any]:
    """All that a graph and its module are, by identity."""
    nodes = [(node, node.op, node.target, node.args, node.kwargs) for node in graph_module.graph.nodes]
    return [graph_module.graph, graph_module.forward.__func__, *nodes]


def handed_on(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """By graph, whether what the fallback gets is what Dynamo left."""
    untouched, left = [], []

    def run(name: str, graph_module: Any, inputs: Any, **options: Any) -> Any:
        assert (name, options) == ("inductor", {"config_patches": None})
        before, given = left.pop()
        untouched.append(given is graph_module and before == account(graph_module))
        return graph_module.forward

    def spied(graph_module: Any, inputs: Any) -> Any:
        left.append((account(graph_module), graph_module))
        return backend.fastunet_backend(graph_module, inputs)

    monkeypatch.setattr(backend, "run_backend", run)
    monkeypatch.setattr(backend, "default_fallback", lambda: "inductor")
    torch._dynamo.reset()
    torch.compile(model, backend=spied)(x)
    torch._dynamo.reset()
    return untouched


@ALL
def test_training_of_narrow_nets_on_the_cpu_is_inductors(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for interpolations, which have tests of their own (ops/test_interpolation.py)."""
    monkeypatch.setattr(rewriting, "keep_interpolations", lambda graph_module: None)
    if not model.is_installed():
        pytest.skip(f"needs {model.package}")
    untouched = handed_on(built(model).train(), large_image(model), monkeypatch)
    # It replicates edges, at which inductor itself fails: see test_inductor_trains_with_replicated_edges. Its code
    # breaks the graph at each upsampling.
    assert set(untouched) == ({True, False} if model.name == "MONAI BasicUNet" else {True})


def levels(wide: int) -> nn.Sequential:
    """A layer of 604 million products, one of half as many, and `wide` of 604, each of which Winograd's algorithm could
    compute.
    """
    layers = [nn.Conv2d(64, 64, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(64, 128, 3, padding=1)]
    return nn.Sequential(*layers, *(nn.Conv2d(128, 128, 3, padding=1) for _ in range(wide)))


@pytest.mark.parametrize(("wide", "share"), [(1, "30%"), (2, "43%")])
def test_winograds_algorithm_is_to_spare_a_third_of_the_graph(wide: int, share: str) -> None:
    """Three quarters of each wide layer: of all with one 3 in 10, with two 3 in 7."""
    rows = fastunet.explain(levels(wide).train(), torch.zeros(1, 64, 128, 128)).rows[-wide:]
    if wide == 1:
        assert [(row.implementation, row.replaced_by) for row in rows] == [("inductor", "")]
        assert f"would save {share} of the graph's multiplications" in rows[0].reason
    else:
        assert [row.implementation for row in rows] == ["winograd"] * wide


def test_a_graph_with_few_wide_layers_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 64, 128, 128)
    assert handed_on(levels(1).train(), x, monkeypatch) == [True]
    assert handed_on(levels(2).train(), x, monkeypatch) == [False]


@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d, lambda c: nn.InstanceNorm2d(c, affine=True)])
@pytest.mark.parametrize("activation", [nn.ReLU, lambda: nn.LeakyReLU(inplace=True)])
def test_an_activation_that_leaves_the_graph_with_a_gradient_is_the_ops(norm: Any, activation: Any) -> None:
    """Whose backward reads the result: inductor's would read a mask that is written for it."""
    layers = [nn.Conv2d(4, 4, 3, padding=1), norm(4), activation()]
    net, x = nn.Sequential(*layers, *copy.deepcopy(layers)).train(), torch.randn(1, 4, 8, 8)
    rows = fastunet.explain(net, x).rows
    assert [bool(row.replaced_by) for row in rows] == [False, True]
    assert "mask" in rows[1].reason
    rows = fastunet.explain(nn.Sequential(net, nn.AvgPool2d(2)), x).rows
    assert not any(row.replaced_by for row in rows), "here inductor fuses all"
    rows = fastunet.explain(net[:2] if isinstance(net[1], nn.Identity) else net[:-1], x).rows
    assert not rows[-1].replaced_by, "without an activation there is no mask"
    rows = fastunet.explain(net.requires_grad_(False), x).rows
    assert "mask" not in rows[1].reason


def somebodys_net_of_volumes() -> nn.Module:
    layers = [nn.MaxPool3d(2), nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True), nn.LeakyReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose3d(4, 4, 2, stride=2))


def net_of_volumes() -> nn.Module:
    return fastunet.UNet(1, 2, features=(4, 8, 16), norm="instance", dims=3)


@pytest.mark.parametrize("make", [somebodys_net_of_volumes, net_of_volumes], ids=["somebody's", "ours"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_graph_of_volumes_is_handed_on(make: Any, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make().train(training), torch.randn(1, 1, 8, 8, 8)
    for row in fastunet.explain(model, x).rows:
        assert VOLUMES in row.reason
        assert row.replaced_by == ""
    with torch.set_grad_enabled(training):
        assert handed_on(model, x, monkeypatch) == [True]


@pytest.mark.parametrize("widths", [(0, 0, 0, 0), (0, 1, 0, 1), (2, 0, 0, 3), (0, 0, 1, 0)], ids=str)
def test_edges_are_replicated_where_there_are_any(widths: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    y, expected = replicate_pad(x, widths), F.pad(x, widths, "replicate")
    assert torch.equal(y, expected)
    assert y.data_ptr() != x.data_ptr()
    cotangent = torch.randn_like(expected)
    grads = [torch.autograd.grad(each, x, cotangent)[0] for each in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-14, atol=1e-14)
    graph = make_fx(lambda t: replicate_pad(t, widths))(x.detach()).graph
    joined = sum(node.target is torch.ops.aten.cat.default for node in graph.nodes)
    assert joined == (any(widths[:2]) + any(widths[2:]))


@pytest.mark.parametrize("trains", [False, True])
def test_inductor_gets_no_pad_that_replicates(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would look up each pixel's place, also where no width is but 0."""
    given = []
    monkeypatch.setattr(backend, "run_backend", lambda name, graph, inputs, **options: given.append(graph) or graph)
    monkeypatch.setattr(backend, "default_fallback", lambda: "inductor")
    x = torch.randn(1, 2, 4, 4, requires_grad=trains)
    torch._dynamo.reset()
    y = torch.compile(lambda t: F.pad(t, [0, 0, 0, 0], "replicate") + 1, backend=backend.fastunet_backend)(x)
    torch._dynamo.reset()
    assert torch.equal(y, x + 1)
    assert next(node.target for node in given[0].graph.nodes if node.op == "call_function") is replicate_pad
