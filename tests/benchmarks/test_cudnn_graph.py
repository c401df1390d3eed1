"""cuDNN's graph API as a provider, with a cuDNN that notes what it is told and computes with torch."""

from __future__ import annotations

import sys
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


def fake_graph(failing: tuple[int, ...], count: int) -> MagicMock:
    """Its plans are numbers; those in `failing` do not build. execute_plan_at_index computes with torch."""
    graph = MagicMock()
    graph.tensor.side_effect = lambda name, **given: MagicMock(**given)
    graph.get_execution_plan_count.return_value = count
    graph.get_workspace_size_plan_at_index.side_effect = lambda index: 100 * index

    def build(index: int) -> None:
        if index in failing:
            raise NotSupported(f"plan {index} does not build")

    def execute(pack: dict[Any, torch.Tensor], workspace: torch.Tensor, index: int, *, handle: Any) -> None:
        assert (workspace.numel(), handle) == (max(1, 100 * (count - 1)), "handle")
        x, weight, bias, out = pack.values()
        y = torch.nn.functional.conv2d(x, weight, bias.flatten(), padding=weight.shape[2] // 2)
        out.copy_(y.relu() if graph.relu.called else y)

    graph.build_plan_at_index.side_effect, graph.execute_plan_at_index.side_effect = build, execute
    return graph


def install(monkeypatch: pytest.MonkeyPatch, failing: tuple[int, ...] = (1,), count: int = 3) -> list[MagicMock]:
    """The graphs that are made: each of so many plans, of which some do not build."""
    made: list[MagicMock] = []
    cudnn = MagicMock(cudnnGraphNotSupportedError=NotSupported, create_handle=lambda: "handle")
    cudnn.data_type = SimpleNamespace(BFLOAT16="bf16", HALF="half", FLOAT="float")
    cudnn.pygraph.side_effect = lambda **options: made.append(fake_graph(failing, count)) or made[-1]
    monkeypatch.setitem(sys.modules, "cudnn", cudnn)
    return made


def test_the_graph_is_conv_bias_relu_in_nhwc(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = install(monkeypatch)
    cudnn_graph.conv((2, 8, 5, 7), (16, 8, 3, 3), torch.bfloat16, CPU, relu=True)
    cudnn_graph.conv((2, 8, 5, 7), (2, 8, 1, 1), torch.float16, CPU, relu=False)
    graph, head = graphs
    types = {"io_data_type": "bf16", "intermediate_data_type": "float", "compute_data_type": "float"}
    cudnn: Any = sys.modules["cudnn"]
    assert cudnn.pygraph.call_args_list[0].kwargs == {"handle": "handle", **types}
    graph.create_execution_plans.assert_called_once_with([cudnn.heur_mode.A, cudnn.heur_mode.B])
    conv, bias = graph.conv_fprop.call_args.kwargs, graph.bias.call_args.kwargs
    for tensor, shape in ((conv["image"], (2, 8, 5, 7)), (conv["weight"], (16, 8, 3, 3))):
        like = torch.empty(shape).contiguous(memory_format=torch.channels_last)
        assert (tensor.dim, tensor.stride, tensor.data_type) == (list(shape), list(like.stride()), "bf16")
    assert (bias["bias"].dim, bias["bias"].stride) == ([1, 16, 1, 1], [16, 1, 16, 16])
    assert (conv["padding"], conv["stride"], conv["dilation"]) == ([1, 1], [1, 1], [1, 1])
    assert bias["input"] is graph.conv_fprop.return_value
    assert graph.relu.call_args.kwargs["input"] is graph.bias.return_value
    assert (head.relu.called, head.conv_fprop.call_args.kwargs["padding"]) == (False, [0, 0])


def test_the_fastest_plan_that_builds_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = install(monkeypatch)

    def samples(runs: Any, clock: Any, *, rounds: int) -> dict[str, list[float]]:
        assert list(runs) == ["0", "2"]
        return {"0": [2.0], "2": [1.0]}

    monkeypatch.setattr(cudnn_graph, "interleaved_samples", samples)
    call = cudnn_graph.conv((2, 8, 5, 7), (16, 8, 3, 3), torch.float16, CPU, relu=True)
    x, weight, bias = (torch.randn(shape).half() for shape in ((2, 8, 5, 7), (16, 8, 3, 3), (16,)))
    for _ in range(2):
        y = call(x, weight, bias)
    assert [each.args[2] for each in graphs[0].execute_plan_at_index.call_args_list] == [2, 2]
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
def test_the_graph_does_its_layers_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Concatenation before and pooling after are the layer's, and counted."""
    install(monkeypatch)
    inputs = device_inputs(LAYERS[name], CPU, torch.float16)
    check_layer(LAYERS[name], inputs, provider_of(name).prepare(inputs)())
