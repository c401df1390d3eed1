"""Every public op as a piece of work: forward and backward, ours and torch's composition of the same."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastunet
from fastunet.dispatch import selected_backend
from fastunet.reference import functional as reference
from fastunet.testing import parity, random_cotangent

from .harness.timing import sets_past_cache
from .opponents import Run, dtype_name, our_backends
from .steps import DIRECTIONS
from .suite import Options, Work

# n, c, h, w, c_out.
SIZES = {"cpu": (2, 32, 64, 64, 32), "cuda": (4, 64, 256, 256, 64)}
TORCH = "torch"
# Tensors of float64 that a check holds at once, as many as the op's inputs and outputs this many times.
_CHECK = 12


def op_works(ops: Sequence[str], options: Options) -> list[Work]:
    """For each of the ops, dtypes, directions: ours and torch's, which are compared within a group."""
    cases = [case for case in parity.cases_of(*SIZES[options.device.type]) if case.op in ops]
    return [
        work
        for case in cases
        for dtype in options.dtypes()
        for direction in DIRECTIONS[: 2 if case.backward else 1]
        for work in _op_works(label_of(case), case, dtype, direction, options.device)
    ]


def label_of(case: parity.Case) -> str:
    """Batch norm comes in two forms."""
    return f"{case.op}-given-statistics" if case.options.get("training") is False else case.op


def _op_works(label: str, case: parity.Case, dtype: torch.dtype, direction: str, device: torch.device) -> list[Work]:
    kind = dtype_name(dtype)
    implementations = [*our_backends(device, dtype), (TORCH, selected_backend(), "")]
    elements = sum(math.prod(shape) for shape in case.shapes.values())
    flops = forward_flops(case) * (1 if direction == "forward" else 2)
    info = {
        "op": case.op,
        "shapes": {name: list(shape) for name, shape in case.shapes.items()},
        "options": dict(case.options),
        "direction": direction,
        "dtype": kind,
        "layout": "NHWC",
        "input_bytes": elements * dtype.itemsize,
    }
    return [
        Work(
            name=f"{label}-{kind}-{direction}-{name}",
            group=f"{label} {kind} {direction}",
            prepare=functools.partial(_prepare, case, dtype, direction, device, backend, name == TORCH),
            flops=flops,
            memory=_CHECK * 8 * 2 * elements,
            info={**info, "implementation": name},
            unavailable=obstacle,
        )
        for name, backend, obstacle in implementations
    ]


def forward_flops(case: parity.Case) -> int:
    """Each weight is multiplied, and its product added, once at every pixel of its input; the rest is not counted."""
    n, _, h, w = next(iter(case.shapes.values()))
    weights = {name: math.prod(shape) for name, shape in case.shapes.items() if "weight" in name}
    low = n * math.prod(case.shapes["low"][2:]) * weights.pop("up_weight") if "low" in case.shapes else 0
    return 2 * (n * h * w * sum(weights.values()) + low)


def run_reference(op: str, inputs: Mapping[str, Tensor], buffers: Mapping[str, Tensor], options: Any) -> Any:
    """As parity.run_op, by torch's functions."""
    if op == "double_conv3x3_bias_relu":
        x, *parameters = inputs.values()
        y = reference.conv3x3_bias_relu(reference.conv3x3_bias_relu(x, *parameters[:2]), *parameters[2:])
        return (y, reference.max_pool2x2(y)) if options.get("pool") else y
    if op == "conv_transpose2x2_concat_conv3x3_relu":
        skip, low, up_weight, up_bias, weight, bias = inputs.values()
        up = F.pad(reference.conv_transpose2x2(low, up_weight, up_bias), [0, skip.shape[3] % 2, 0, skip.shape[2] % 2])
        return reference.concat_conv3x3_bias_relu(skip, up, weight, bias, **options)
    if op == "conv3x3_relu_conv1x1":
        x, weight, bias, head_weight, head_bias = inputs.values()
        activation = "sigmoid" if options.get("sigmoid") else None
        return reference.conv1x1(
            reference.conv3x3_bias_relu(x, weight, bias), head_weight, head_bias, activation=activation
        )
    return getattr(reference, op)(*inputs.values(), *buffers.values(), **options)


def _prepare(
    case: parity.Case, dtype: torch.dtype, direction: str, device: torch.device, backend: str, is_torch: bool
) -> list[Run]:
    function = run_reference if is_torch else parity.run_op
    # Torch's composition rounds after every step, as ours does where ATen runs it; the bounds are to know that.
    with fastunet.backend("aten" if is_torch else backend):
        parity.check(case, dtype, device, allow_tf32=device.type == "cuda", run=function)
    inputs = {name: _nhwc(t) for name, t in parity.make_inputs(case.shapes, dtype, device).items()}
    copies = sets_past_cache(list(inputs.values()), device)
    sets = [inputs, *({name: t.clone() for name, t in inputs.items()} for _ in range(copies - 1))]
    buffers = _buffers(case, device)
    make = _backward if direction == "backward" else _forward
    return [make(case, each, buffers, function, backend) for each in sets]


def _nhwc(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def _buffers(case: parity.Case, device: torch.device) -> dict[str, Tensor]:
    if case.buffers is None:
        return {}
    return {
        "running_mean": torch.zeros(case.buffers, device=device),
        "running_var": torch.ones(case.buffers, device=device),
    }


def _forward(
    case: parity.Case, inputs: dict[str, Tensor], buffers: dict[str, Tensor], function: Any, backend: str
) -> Run:
    def run() -> Any:
        with torch.no_grad(), fastunet.backend(backend):
            return function(case.op, inputs, buffers, case.options)

    return run


def _backward(
    case: parity.Case, inputs: dict[str, Tensor], buffers: dict[str, Tensor], function: Any, backend: str
) -> Run:
    leaves = {name: t.requires_grad_() if name != "target" else t for name, t in inputs.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]
    with fastunet.backend(backend):
        outputs = parity.outputs_of(function(case.op, leaves, buffers, case.options))
    cotangents = [random_cotangent(y, seed=i) for i, y in enumerate(outputs)]

    def run() -> Any:
        with fastunet.backend(backend):
            return torch.autograd.grad(outputs, wanted, cotangents, retain_graph=True)

    return run
