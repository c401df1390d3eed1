"""cuDNN's graph API as an provider, with a cuDNN that notes what it is told and computes with torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastunet.benchmarks import cudnn_graph
from fastunet.benchmarks.cases import Layer, meta_unet, unet_layers
from fastunet.benchmarks.providers import Provider, Unavailable, layer_providers
from fastunet.benchmarks.runs import check_layer, device_inputs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYERS = {layer.name: layer for layer in unet_layers(meta_unet(3, 2, (8, 16)), 2, 12, 20)}


def graph_baseline(layer: Layer) -> Provider:
    return next(each for each in layer_providers(layer, CPU, torch.float16) if each.name == "cudnn graph")


class NotSupported(Exception):
    pass


class FakeTensor:
    def __init__(self, **given: Any) -> None:
        self.given = given

    def set_output(self, is_output: bool) -> FakeTensor:
        self.given["is_output"] = is_output
        return self

    def set_data_type(self, kind: str) -> FakeTensor:
        self.given["data_type"] = kind
        return self

    def set_dim(self, dim: list[int]) -> FakeTensor:
        self.given["dim"] = dim
        return self

    def set_stride(self, stride: list[int]) -> FakeTensor:
        self.given["stride"] = stride
        return self


class FakeGraph:
    """Its plans are numbers; those in `failing` do not build. execute_plan_at_index computes with torch."""

    def __init__(self, failing: tuple[int, ...] = (), count: int = 3, **options: Any) -> None:
        self.options, self.failing, self.count = options, failing, count
        self.nodes: list[tuple[str, dict[str, Any]]] = []
        self.executed: list[int] = []
        self.workspaces: list[int] = []

    def tensor(self, **given: Any) -> FakeTensor:
        return FakeTensor(**given)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name in ("conv_fprop", "bias", "relu"):

            def node(**given: Any) -> FakeTensor:
                self.nodes.append((name, given))
                return FakeTensor(of=name)

            return node
        if name in ("validate", "build_operation_graph", "check_support"):
            return lambda: self.nodes.append((name, {}))
        raise AttributeError(name)

    def create_execution_plans(self, modes: list[str]) -> None:
        self.nodes.append(("create_execution_plans", {"modes": modes}))

    def get_execution_plan_count(self) -> int:
        return self.count

    def build_plan_at_index(self, index: int) -> None:
        if index in self.failing:
            raise NotSupported(f"plan {index} does not build")

    def get_workspace_size_plan_at_index(self, index: int) -> int:
        return 100 * index

    def execute_plan_at_index(self, pack: dict[Any, torch.Tensor], workspace: torch.Tensor, index: int, *, handle: Any):
        self.executed.append(index)
        self.workspaces.append(workspace.numel())
        named = {tensor.given.get("name", "y"): t for tensor, t in pack.items()}
        kernel = named["weight"].shape[2]
        y = torch.nn.functional.conv2d(named["x"], named["weight"], named["bias"].flatten(), padding=kernel // 2)
        relu = any(name == "relu" for name, _ in self.nodes)
        named["y"].copy_(y.relu() if relu else y)


def fake_cudnn(**options: Any) -> Any:
    kinds = SimpleNamespace(BFLOAT16="bf16", HALF="half", FLOAT="float")
    return SimpleNamespace(
        data_type=kinds,
        heur_mode=SimpleNamespace(A="A", B="B"),
        cudnnGraphNotSupportedError=NotSupported,
        pygraph=lambda **given: FakeGraph(**options, **given),
    )


def test_the_graph_is_conv_bias_relu_in_nhwc() -> None:
    conv = cudnn_graph.describe(fake_cudnn(), "handle", (2, 8, 5, 7), (16, 8, 3, 3), torch.bfloat16, relu=True)
    assert conv.graph.options == {
        "handle": "handle",
        "io_data_type": "bf16",
        "intermediate_data_type": "float",
        "compute_data_type": "float",
    }
    x, weight, bias = (conv.tensors[name].given for name in ("x", "weight", "bias"))
    for given, shape in ((x, (2, 8, 5, 7)), (weight, (16, 8, 3, 3)), (bias, (1, 16, 1, 1))):
        like = torch.empty(shape).contiguous(memory_format=torch.channels_last)
        if shape[2] > 1:  # torch's strides of dimensions of one element mean nothing.
            assert given["stride"] == list(like.stride())
        assert (given["dim"], given["data_type"]) == (list(shape), "bf16")
    assert bias["stride"] == [16, 1, 16, 16]
    (conv_name, of_conv), (bias_name, of_bias), (relu_name, of_relu) = conv.graph.nodes
    assert (conv_name, bias_name, relu_name) == ("conv_fprop", "bias", "relu")
    assert (of_conv["image"].given, of_conv["weight"].given) == (x, weight)
    assert (of_conv["padding"], of_conv["stride"], of_conv["dilation"]) == ([1, 1], [1, 1], [1, 1])
    assert of_bias["input"].given == {"of": "conv_fprop"}
    assert of_bias["bias"].given == bias
    assert of_relu["input"].given == {"of": "bias"}
    y = {"of": "relu", "is_output": True, "data_type": "bf16", "dim": [2, 16, 5, 7], "stride": [560, 1, 112, 16]}
    assert conv.tensors["y"].given == y
    head = cudnn_graph.describe(fake_cudnn(), None, (2, 8, 5, 7), (2, 8, 1, 1), torch.float16, relu=False)
    assert [name for name, _ in head.graph.nodes] == ["conv_fprop", "bias"]
    assert head.graph.nodes[0][1]["padding"] == [0, 0]
    assert head.tensors["y"].given["data_type"] == "half"


def test_the_fastest_plan_that_builds_is_kept() -> None:
    cudnn = fake_cudnn(failing=(1,), count=4)
    conv = cudnn_graph.describe(cudnn, None, (2, 8, 5, 7), (16, 8, 3, 3), torch.float16, relu=True)
    offered = []

    def choose(runs: Any) -> int:
        offered.extend(runs)
        return max(runs)

    call = cudnn_graph.Conv(cudnn, conv, torch.float16, CPU, None, choose)
    x, weight, bias = (torch.randn(shape).half() for shape in ((2, 8, 5, 7), (16, 8, 3, 3), (16,)))
    for _ in range(2):
        y = call(x, weight, bias)
    assert offered == [0, 2, 3]
    assert conv.graph.executed == [3, 3]
    assert set(conv.graph.workspaces) == {300}
    assert ("create_execution_plans", {"modes": ["A", "B"]}) in conv.graph.nodes
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("failing", "count", "reason"), [((0, 1), 2, "plan 1 does not build"), ((), 0, "propose none")]
)
def test_no_plan_is_a_reason(failing: tuple[int, ...], count: int, reason: str) -> None:
    cudnn = fake_cudnn(failing=failing, count=count)
    conv = cudnn_graph.describe(cudnn, None, (2, 8, 5, 7), (16, 8, 3, 3), torch.float16, relu=True)
    with pytest.raises(cudnn_graph.NoPlan, match=reason):
        cudnn_graph.plan(cudnn, conv)


def test_where_there_is_no_graph_api(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not torch.float32" in cudnn_graph.unsupported(CUDA, torch.float32)
    monkeypatch.setitem(sys.modules, "cudnn", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cudnn_graph.unsupported(CUDA, torch.float16) == "nvidia-cudnn-frontend is not installed"


@pytest.mark.parametrize("name", ["inc.c2", "up1.c1", "outc", "down1.c1"])
def test_the_graph_does_its_layers_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Concatenation before and pooling after are the layer's, and counted."""
    layer = LAYERS[name]
    inputs = device_inputs(layer, CPU, torch.float16)

    def conv(x_shape, weight_shape, dtype, device, *, relu):
        cudnn = fake_cudnn()
        graph = cudnn_graph.describe(cudnn, None, x_shape, weight_shape, dtype, relu=relu)
        return cudnn_graph.Conv(cudnn, graph, dtype, device, None, min)

    monkeypatch.setattr(cudnn_graph, "conv", conv)
    provider = graph_baseline(layer)
    check_layer(layer, inputs, provider.prepare(inputs)())


def test_a_layer_that_cudnn_refuses_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise cudnn_graph.NoPlan("three channels")

    monkeypatch.setattr(cudnn_graph, "conv", refuse)
    layer: Layer = LAYERS["inc.c1"]
    provider = graph_baseline(layer)
    with pytest.raises(Unavailable, match="three channels"):
        provider.prepare(device_inputs(layer, CPU, torch.float16))
