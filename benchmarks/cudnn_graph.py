"""Convolution, bias and ReLU as one plan of cuDNN's graph API: what cuDNN itself can fuse.

Needs `nvidia-cudnn-frontend` (`import cudnn`), which is looked for when asked. Tensors are NHWC in 16 bits, sums in
float32. Of the plans that cuDNN's heuristics A and B propose, the fastest by the clock is taken, as cudnn.benchmark
does for eager convolutions.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastunet.measuring.timing import clock_of, interleaved_samples

from .results import Unavailable

_DTYPES = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF"}
# Plans that are timed, in the heuristics' order: each is compiled, and the good ones come first.
_MOST_PLANS = 8


def unsupported(device: torch.device, dtype: torch.dtype) -> str:
    """Why there is no graph API for that device and dtype, or "" where there is."""
    if device.type != "cuda":
        return f"the device is {device.type}, not cuda"
    if dtype not in _DTYPES:
        return f"the graph is of float16 or bfloat16, not {dtype}: torch's setting for TF32 does not reach it"
    if importlib.util.find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed"
    return ""


def conv(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, relu: bool
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return conv(x, weight, bias) for tensors of these shapes: 'same' padding and, if wanted, ReLU; nothing is stored
    between. It takes x [N, Cin, H, W] and weight [Cout, Cin, k, k] with odd k channels_last, and bias [Cout].

    The plan is chosen at the first call. Unavailable where cuDNN refuses.
    """
    cudnn = importlib.import_module("cudnn")
    handle = cudnn.create_handle()
    if device.type == "cuda":
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    io, single = getattr(cudnn.data_type, _DTYPES[dtype]), cudnn.data_type.FLOAT
    graph = cudnn.pygraph(handle=handle, io_data_type=io, intermediate_data_type=single, compute_data_type=single)
    c_out, padding = weight_shape[0], [weight_shape[2] // 2] * 2
    y_shape = (x_shape[0], c_out, *x_shape[2:])
    operands = [
        graph.tensor(name=name, dim=list(shape), stride=_nhwc_strides(shape), data_type=io)
        for name, shape in (("x", x_shape), ("weight", weight_shape), ("bias", (1, c_out, 1, 1)))
    ]
    image, weight, bias = operands
    y = graph.conv_fprop(image=image, weight=weight, padding=padding, stride=[1, 1], dilation=[1, 1])
    y = graph.bias(input=y, bias=bias)
    y = graph.relu(input=y) if relu else y
    y.set_output(True).set_data_type(io).set_dim(list(y_shape)).set_stride(_nhwc_strides(y_shape))
    plans = _plans(cudnn, graph)
    # Shared by all plans: launches on one stream take turns.
    size = max(graph.get_workspace_size_plan_at_index(index) for index in plans)
    workspace = torch.empty(max(1, size), dtype=torch.uint8, device=device)

    def execute(index: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = torch.empty(y_shape, dtype=dtype, device=device, memory_format=torch.channels_last)
        pack = dict(zip((*operands, y), (x, weight, bias.view(1, -1, 1, 1), out), strict=True))
        graph.execute_plan_at_index(pack, workspace, index, handle=handle)
        return out

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if len(plans) > 1:
            runs = {str(index): [lambda index=index: execute(index, x, weight, bias)] for index in plans}
            samples = interleaved_samples(runs, clock_of(device), rounds=7)
            plans[:] = [min(plans, key=lambda index: statistics.median(samples[str(index)]))]
        return execute(plans[0], x, weight, bias)

    return call


def _nhwc_strides(shape: tuple[int, ...]) -> list[int]:
    _, c, h, w = shape
    return [h * w * c, 1, w * c, c]


def _plans(cudnn: Any, graph: Any) -> list[int]:
    """Build the plans that the heuristics propose; the indices of those that could be. Unavailable if none could."""
    refusals = (RuntimeError, cudnn.cudnnGraphNotSupportedError)
    built, reason = [], "its heuristics propose none"
    try:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.B])
        graph.check_support()
    except refusals as error:
        raise Unavailable(f"cuDNN has no plan for it: {error}") from error
    for index in range(min(_MOST_PLANS, graph.get_execution_plan_count())):
        try:
            graph.build_plan_at_index(index)
            built.append(index)
        except refusals as error:
            reason = str(error)
    if not built:
        raise Unavailable(f"cuDNN has no plan for it: {reason}")
    return built
