"""cuDNN's graph API as a provider, with a cuDNN that notes what it is told and computes with torch."""

from __future__ import annotations

import sys
from functools import partialmethod
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from fastunet.benchmarks import cudnn_graph
from fastunet.benchmarks.cases import unet_layers
from fastunet.benchmarks.providers import Provider, layer_providers
from fastunet.benchmarks.results import Unavailable
from fastunet.benchmarks.runs import check_layer, device_inputs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYERS = {layer.name: layer for layer in unet_layers(3, 2, (8, 16), 2, 12, 20)}


def provider_of(name: str) -> Provider:
    return next(each for each in layer_providers(LAYERS[name], CPU, torch.float16) if each.name == "cudnn graph")


class NotSupported(Exception):
    pass


def fake_tensor(**given: Any) -> MagicMock:
    """It also takes the setters of an output."""
    tensor = MagicMock()
    tensor.configure_mock(**given)
    return tensor


class FakeGraph:
    """Its plans are numbers; those in `failing` do not build. execute_plan_at_index computes with torch."""

    def __init__(self, failing: tuple[int, ...], count: int, **options: Any) -> None:
        self.options, self.failing, self.count = options, failing, count
        self.nodes: dict[str, dict[str, Any]] = {}
        self.executed: list[int] = []
        self.tensor = fake_tensor

    def _node(self, node: str, **given: Any) -> MagicMock:
        self.nodes[node] = given
        return fake_tensor(name="y", of=node)

    conv_fprop = partialmethod(_node, "conv")
    bias = partialmethod(_node, "bias")
    relu = partialmethod(_node, "relu")

    def validate(self) -> None: ...

    build_operation_graph = check_support = validate

    def create_execution_plans(self, modes: list[str]) -> None:
        assert modes == ["A", "B"]

    def get_execution_plan_count(self) -> int:
        return self.count

    def build_plan_at_index(self, index: int) -> None:
        if index in self.failing:
            raise NotSupported(f"plan {index} does not build")

    def get_workspace_size_plan_at_index(self, index: int) -> int:
        return 100 * index

    def execute_plan_at_index(self, pack: dict[Any, torch.Tensor], workspace: torch.Tensor, index: int, *, handle: Any):
        assert (workspace.numel(), handle) == (max(1, 100 * (self.count - 1)), "handle")
        self.executed.append(index)
        named = {tensor.name: t for tensor, t in pack.items()}
        kernel = named["weight"].shape[2]
        y = torch.nn.functional.conv2d(named["x"], named["weight"], named["bias"].flatten(), padding=kernel // 2)
        named["y"].copy_(y.relu() if "relu" in self.nodes else y)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """The graphs that are made: each of three plans, of which the middle one does not build."""
    return install(monkeypatch)


def install(monkeypatch: pytest.MonkeyPatch, failing: tuple[int, ...] = (1,), count: int = 3) -> list[FakeGraph]:
    made: list[FakeGraph] = []

    def pygraph(**options: Any) -> FakeGraph:
        made.append(FakeGraph(failing, count, **options))
        return made[-1]

    cudnn = SimpleNamespace(
        data_type=SimpleNamespace(BFLOAT16="bf16", HALF="half", FLOAT="float"),
        heur_mode=SimpleNamespace(A="A", B="B"),
        cudnnGraphNotSupportedError=NotSupported,
        create_handle=lambda: "handle",
        pygraph=pygraph,
    )
    monkeypatch.setitem(sys.modules, "cudnn", cudnn)  # type: ignore[arg-type]
    return made


def test_the_graph_is_conv_bias_relu_in_nhwc(graphs: list[FakeGraph]) -> None:
    cudnn_graph.conv((2, 8, 5, 7), (16, 8, 3, 3), torch.bfloat16, CPU, relu=True)
    cudnn_graph.conv((2, 8, 5, 7), (2, 8, 1, 1), torch.float16, CPU, relu=False)
    graph, head = graphs
    types = {"io_data_type": "bf16", "intermediate_data_type": "float", "compute_data_type": "float"}
    assert graph.options == {"handle": "handle", **types}
    conv, bias = graph.nodes["conv"], graph.nodes["bias"]
    for tensor, shape in ((conv["image"], (2, 8, 5, 7)), (conv["weight"], (16, 8, 3, 3))):
        like = torch.empty(shape).contiguous(memory_format=torch.channels_last)
        assert (tensor.dim, tensor.stride, tensor.data_type) == (list(shape), list(like.stride()), "bf16")
    assert (bias["bias"].dim, bias["bias"].stride) == ([1, 16, 1, 1], [16, 1, 16, 16])
    assert (conv["padding"], conv["stride"], conv["dilation"]) == ([1, 1], [1, 1], [1, 1])
    assert (bias["input"].of, graph.nodes["relu"]["input"].of) == ("conv", "bias")
    assert (list(head.nodes), head.nodes["conv"]["padding"]) == (["conv", "bias"], [0, 0])


def test_the_fastest_plan_that_builds_is_kept(graphs: list[FakeGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    def samples(runs: Any, clock: Any, *, rounds: int) -> dict[str, list[float]]:
        assert list(runs) == ["0", "2"]
        return {"0": [2.0], "2": [1.0]}

    monkeypatch.setattr(cudnn_graph, "interleaved_samples", samples)
    call = cudnn_graph.conv((2, 8, 5, 7), (16, 8, 3, 3), torch.float16, CPU, relu=True)
    x, weight, bias = (torch.randn(shape).half() for shape in ((2, 8, 5, 7), (16, 8, 3, 3), (16,)))
    for _ in range(2):
        y = call(x, weight, bias)
    assert graphs[0].executed == [2, 2]
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("failing", "count", "reason"), [((0, 1), 2, "plan 1 does not build"), ((), 0, "propose none")]
)
def test_no_plan_makes_the_provider_unavailable(
    failing: tuple[int, ...], count: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, failing, count)
    with pytest.raises(Unavailable, match=reason):
        provider_of("inc.c1").prepare(device_inputs(LAYERS["inc.c1"], CPU, torch.float16))()


def test_where_there_is_no_graph_api(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not torch.float32" in cudnn_graph.unsupported(CUDA, torch.float32)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cudnn_graph.unsupported(CUDA, torch.float16) == "nvidia-cudnn-frontend is not installed"


@pytest.mark.parametrize("name", ["inc.c2", "up1.c1", "outc"])
@pytest.mark.usefixtures("graphs")
def test_the_graph_does_its_layers_work(name: str) -> None:
    """Concatenation before and pooling after are the layer's, and counted."""
    inputs = device_inputs(LAYERS[name], CPU, torch.float16)
    check_layer(LAYERS[name], inputs, provider_of(name).prepare(inputs)())
