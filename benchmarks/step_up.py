"""A step up in inference as one kernel, an upsampling composed with the convolution after it: what to measure of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fastunet
from fastunet import dispatch, ops
from fastunet.testing import parity
from fastunet.testing.parity import Case

from .cases import Layer
from .layer_runs import input_sets
from .steps import DTYPE

OP = "conv_transpose2x2_concat_conv3x3_relu"


def cases(layers: Sequence[Layer]) -> dict[str, Case]:
    """By the name of the convolution, of nets that upsample by transposed convolutions."""
    by_name = {layer.name: layer for layer in layers}
    found = {}
    for layer in layers:
        block, _, part = layer.name.partition(".")
        up = by_name.get(f"{block}.up")
        if part == "c1" and up is not None and up.op == "conv_transpose2x2":
            of_up = {"low": up.shapes["x"], "up_weight": up.shapes["weight"], "up_bias": up.shapes["bias"]}
            shapes = {"skip": layer.shapes["skip"], **of_up, **{k: layer.shapes[k] for k in ("weight", "bias")}}
            found[layer.name] = Case(OP, shapes, backward=False)
    return found


def obstacle(case: Case, device: torch.device) -> str | None:
    """Why no kernel computes it there, or None."""
    asked = [torch.empty((1, *case.shapes["skip"][1:]), device=device, dtype=DTYPE)]
    asked.append(torch.empty(case.shapes["weight"], device=device, dtype=DTYPE))
    with fastunet.backend("triton"):
        choice = dispatch.choose(OP, *asked)
    return None if choice.implementation == "triton" else choice.reason


def check(case: Case, device: torch.device) -> None:
    """AssertionError unless an image comes out right."""
    one_image = {k: (1, *shape[1:]) if k in ("skip", "low") else shape for k, shape in case.shapes.items()}
    with fastunet.backend("triton"):
        parity.check(replace(case, shapes=one_image), DTYPE, device)


def runs(case: Case, device: torch.device) -> tuple[list[Callable[[], Any]], list[Callable[[], Any]]]:
    """Calls of the kernel, and of the two ops as `auto` runs them, on inputs that take turns."""
    inputs = parity.make_inputs(case.shapes, DTYPE, device)
    images = {k: t.contiguous(memory_format=torch.channels_last) for k, t in inputs.items() if t.dim() == 4}
    sets = input_sets(inputs | images, device)
    return [_composed(each) for each in sets], [_two_steps(*each.values()) for each in sets]


def _composed(inputs: Mapping[str, Tensor]) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad(), fastunet.backend("triton"):
            ops.conv_transpose2x2_concat_conv3x3_relu(*inputs.values())

    return run


def _two_steps(
    skip: Tensor, low: Tensor, up_weight: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor
) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad(), fastunet.backend("auto"):
            up = ops.conv_transpose2x2(low, up_weight, up_bias)
            ops.concat_conv3x3_bias_relu(skip, up, weight, bias)

    return run
