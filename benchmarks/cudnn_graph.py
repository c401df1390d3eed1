"""Convolution, bias and ReLU as one plan of cuDNN's graph API: what cuDNN itself can fuse.

Needs `nvidia-cudnn-frontend` (`import cudnn`), which is looked for when asked. Tensors are NHWC in 16 bits, sums in
float32. The plan is the first of those that cuDNN's heuristics A and B propose and that can be built.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

_DTYPES = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF"}


class NoPlan(RuntimeError):
    """cuDNN builds no plan for this graph."""


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
    between. It takes x [N, Cin, H, W] and weight [Cout, Cin, k, k] with odd k channels_last, and bias [Cout]. NoPlan
    where cuDNN refuses.
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
    try:
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.B])
    except (RuntimeError, cudnn.cudnnGraphNotSupportedError) as error:
        raise NoPlan(f"cuDNN has no plan for it: {error}") from error
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=device)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = torch.empty(y_shape, dtype=dtype, device=device, memory_format=torch.channels_last)
        tensors = dict(zip((*operands, y), (x, weight, bias.view(1, -1, 1, 1), out), strict=True))
        graph.execute(tensors, workspace, handle=handle)
        return out

    return call


def _nhwc_strides(shape: tuple[int, ...]) -> list[int]:
    _, c, h, w = shape
    return [h * w * c, 1, w * c, c]
