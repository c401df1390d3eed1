"""Convolution, bias and ReLU as one plan of cuDNN's graph API: what cuDNN itself can fuse.

Needs `nvidia-cudnn-frontend` (`import cudnn`), which is looked for when asked. Tensors are NHWC in 16 bits, sums in
float32. Of the plans that cuDNN's heuristics A and B propose, the fastest by the clock is taken, as cudnn.benchmark
does for eager convolutions.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .harness.timing import CudaClock, interleaved_samples

_DTYPES = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF"}
# Plans that are timed, in the heuristics' order: each is compiled, and the good ones come first.
_MOST_PLANS = 8


class NoPlan(RuntimeError):
    """cuDNN builds no plan for this graph."""


@dataclass(frozen=True)
class ConvGraph:
    """The graph, its tensors by name ("x", "weight", "bias", "y"), and the shape of y."""

    graph: Any
    tensors: Mapping[str, Any]
    output_shape: tuple[int, ...]


def unsupported(device: torch.device, dtype: torch.dtype) -> str:
    """Why there is no graph API for that device and dtype, or "" where there is."""
    if device.type != "cuda":
        return f"the device is {device.type}, not cuda"
    if dtype not in _DTYPES:
        return f"the graph is of float16 or bfloat16, not {dtype}: torch's setting for TF32 does not reach it"
    if importlib.util.find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed"
    return ""


def nhwc_strides(shape: tuple[int, ...]) -> list[int]:
    """Of a tensor [N, C, H, W] whose channels are next to each other."""
    _, c, h, w = shape
    return [h * w * c, 1, w * c, c]


def describe(
    cudnn: Any, handle: Any, x_shape: tuple[int, ...], weight_shape: tuple[int, ...], dtype: torch.dtype, *, relu: bool
) -> ConvGraph:
    """conv2d(x, weight), 'same' padding, plus bias, and ReLU if wanted: one output, nothing stored between.

    x_shape: [N, Cin, H, W]; weight_shape: [Cout, Cin, k, k] with odd k.
    """
    io, single = getattr(cudnn.data_type, _DTYPES[dtype]), cudnn.data_type.FLOAT
    graph = cudnn.pygraph(handle=handle, io_data_type=io, intermediate_data_type=single, compute_data_type=single)
    c_out, padding = weight_shape[0], weight_shape[2] // 2
    shapes = {"x": x_shape, "weight": weight_shape, "bias": (1, c_out, 1, 1)}
    tensors = {
        name: graph.tensor(name=name, dim=list(shape), stride=nhwc_strides(shape), data_type=io)
        for name, shape in shapes.items()
    }
    y = graph.conv_fprop(
        image=tensors["x"],
        weight=tensors["weight"],
        padding=[padding, padding],
        stride=[1, 1],
        dilation=[1, 1],
    )
    y = graph.bias(input=y, bias=tensors["bias"])
    if relu:
        y = graph.relu(input=y)
    output_shape = (x_shape[0], c_out, *x_shape[2:])
    y.set_output(True).set_data_type(io).set_dim(list(output_shape)).set_stride(nhwc_strides(output_shape))
    return ConvGraph(graph, {**tensors, "y": y}, output_shape)


def plan(cudnn: Any, conv: ConvGraph) -> list[int]:
    """Build the plans that the heuristics propose; the indices of those that could be. NoPlan if none could."""
    try:
        conv.graph.validate()
        conv.graph.build_operation_graph()
        conv.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.B])
        conv.graph.check_support()
    except (RuntimeError, cudnn.cudnnGraphNotSupportedError) as error:
        raise NoPlan(f"cuDNN has no plan for it: {error}") from error
    built, reason = [], "its heuristics propose none"
    for index in range(min(_MOST_PLANS, conv.graph.get_execution_plan_count())):
        try:
            conv.graph.build_plan_at_index(index)
        except (RuntimeError, cudnn.cudnnGraphNotSupportedError) as error:
            reason = str(error)
            continue
        built.append(index)
    if not built:
        raise NoPlan(f"cuDNN has no plan for it: {reason}")
    return built


def fastest(runs: Mapping[int, Callable[[], Any]]) -> int:
    """The index of the run with the least median, by events on the GPU."""
    samples = interleaved_samples({str(index): [run] for index, run in runs.items()}, CudaClock(), rounds=7)
    return min(runs, key=lambda index: statistics.median(samples[str(index)]))


class Conv:
    """conv(x, weight, bias) for tensors of one shape; the plan is chosen at the first call.

    choose: picks one of the runs, by plan index. device: where outputs and workspaces are made.
    """

    def __init__(
        self,
        cudnn: Any,
        conv: ConvGraph,
        dtype: torch.dtype,
        device: torch.device,
        handle: Any,
        choose: Callable[[Mapping[int, Callable[[], Any]]], int] = fastest,
    ) -> None:
        self._conv, self._dtype, self._device, self._handle = conv, dtype, device, handle
        self._choose, self._plans = choose, plan(cudnn, conv)
        # Shared by all plans: launches on one stream take turns.
        size = max(conv.graph.get_workspace_size_plan_at_index(index) for index in self._plans)
        self._workspace = torch.empty(max(1, size), dtype=torch.uint8, device=device)
        self._chosen: int | None = None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x [N, Cin, H, W] and weight channels_last, bias [Cout]; all of the graph's dtype."""
        if self._chosen is None:
            runs = {i: lambda i=i: self._execute(i, x, weight, bias) for i in self._plans}
            self._chosen = self._choose(runs) if len(runs) > 1 else self._plans[0]
        return self._execute(self._chosen, x, weight, bias)

    def _execute(self, index: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = torch.empty(
            self._conv.output_shape, dtype=self._dtype, device=self._device, memory_format=torch.channels_last
        )
        given = {"x": x, "weight": weight, "bias": bias.view(1, -1, 1, 1), "y": y}
        pack = {self._conv.tensors[name]: t for name, t in given.items()}
        self._conv.graph.execute_plan_at_index(pack, self._workspace, index, handle=self._handle)
        return y


def conv(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, relu: bool
) -> Conv:
    """A Conv on the current stream of a CUDA device. NoPlan where cuDNN refuses."""
    cudnn = importlib.import_module("cudnn")
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    return Conv(cudnn, describe(cudnn, handle, x_shape, weight_shape, dtype, relu=relu), dtype, device, handle)
