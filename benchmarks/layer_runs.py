"""A layer of a net, ready to be timed: its tensors on the device, its results compared with float64, its calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

import fastunet
from fastunet.testing import parity
from fastunet.testing.ops import Call

from .cases import Layer
from .harness.timing import sets_past_cache
from .steps import DTYPE

Inputs = dict[str, Tensor]
Runs = dict[str, list[Callable[[], Any]]]
Around = Callable[[], AbstractContextManager[Any]]


def prepare_layer(layer: Layer, sets: Sequence[Inputs], backends: Sequence[str], *, backward: bool) -> Runs:
    """By backend, one call of the layer, or of its backward, for each set of inputs.

    AssertionError unless the first backend's results are right.
    """
    with fastunet.backend(backends[0]):
        check_last_image(layer, sets[0], backward=backward)
    make = backward_run if backward else forward_run
    return {backend: [make(layer, backend, each) for each in sets] for backend in backends}


def layer_sets(layer: Layer, device: torch.device) -> list[Inputs]:
    """Random inputs of the layer, in sets."""
    return input_sets(device_inputs(layer, device), device)


def input_sets(inputs: Inputs, device: torch.device) -> list[Inputs]:
    """The inputs and as many copies as it takes for each to have left the cache before its next turn."""
    copies = sets_past_cache(list(inputs.values()), device)
    return [inputs, *({name: t.clone() for name, t in inputs.items()} for _ in range(copies - 1))]


def device_inputs(layer: Layer, device: torch.device, dtype: torch.dtype = DTYPE) -> Inputs:
    """As parity.make_inputs, made on the device, where it takes no time."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = {}
    for name, shape in layer.shapes.items():
        format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        t = torch.empty(shape, dtype=dtype, device=device, memory_format=format)
        inputs[name] = t.normal_(0, parity.scale_of(name, shape), generator=generator)
    return inputs


def check_last_image(layer: Layer, inputs: Inputs, *, backward: bool, around: Around = nullcontext) -> None:
    """AssertionError unless the last image of the batch comes out right, and the gradients of it alone.

    Only its cotangents are not zero, so that the parameters' gradients are those of one image, whatever the batch.
    around: a context for the direction that is checked, and that one alone.
    """
    leaves = _leaves(layer, inputs) if backward else inputs
    with torch.set_grad_enabled(backward), nullcontext() if backward else around():
        outputs = parity.outputs_of(parity.run_op(layer.op, leaves, {}, {}))
    cotangents = [_last_only(torch.randn_like(y)) for y in outputs] if backward else []
    with around() if backward else nullcontext():
        actual = parity.results_of(outputs, leaves, cotangents)
    last = {name: t[-1:] if _is_image(name) else t for name, t in actual.items()}
    images = {name: t[-1:] if _is_image(name) else t for name, t in inputs.items()}
    call = Call(layer.op, images, {}, {}, [g[-1:] for g in cotangents], **parity.how(layer.op, last))
    parity.compare(last, call, without=[] if layer.input_has_grad else ["grad x"])


def _is_image(name: str) -> bool:
    return "weight" not in name and "bias" not in name


def _last_only(cotangent: Tensor) -> Tensor:
    cotangent[:-1] = 0
    return cotangent


def _leaves(layer: Layer, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().requires_grad_(layer.input_has_grad or name != "x") for name, t in inputs.items()}


def forward_run(layer: Layer, backend: str, inputs: Mapping[str, Tensor]) -> Callable[[], Any]:
    """One call of the layer."""

    def run() -> None:
        with torch.no_grad(), fastunet.backend(backend):
            parity.run_op(layer.op, inputs, {}, {})

    return run


def backward_run(
    layer: Layer, backend: str, inputs: Mapping[str, Tensor], only: Sequence[str] = ()
) -> Callable[[], Any]:
    """One backward pass of the layer, with the graph kept, for random cotangents: all gradients, or `only` those."""
    leaves = _leaves(layer, inputs)
    with fastunet.backend(backend):
        outputs = parity.outputs_of(parity.run_op(layer.op, leaves, {}, {}))
    cotangents = [torch.randn_like(y) for y in outputs]
    wanted = [t for name, t in leaves.items() if t.requires_grad and (not only or name in only)]

    def run() -> None:
        with fastunet.backend(backend):
            torch.autograd.grad(outputs, wanted, cotangents, retain_graph=True)

    return run
