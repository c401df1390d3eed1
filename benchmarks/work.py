"""What a layer has to do: the arithmetic, and the bytes that must pass between the GPU and its memory.

Two ways to run it are counted. Fused, it is one pass, which reads every input and parameter once and writes every
output once. Eager, every op of the composition is a pass of its own, which reads and writes all its tensors:

    cat (inputs -> joined), conv (joined, weight -> sum), bias or norm (sum -> sum), activation (sum -> y), pool
    (y -> pooled) for a convolution; conv and bias for a transposed convolution and the head.

Nothing is taken to stay in a cache from one pass to the next. Weights are read once a batch. The norm is inference's,
by given statistics; instance norm takes its own, for which eager reads the sum once more. An index that pooling leaves
for its gradient is not counted, nor is the padding of images whose sides 2**depth does not divide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .layers import UPSAMPLE, Layer


@dataclass(frozen=True)
class Pass:
    """Work over the batch: the layer's multiplications and additions, of which biases, norms, activations and pools
    count none, and bytes read and written.
    """

    name: str
    flops: int
    bytes: int


def fused_pass(layer: Layer, itemsize: int) -> Pass:
    """The layer with each byte of its tensors, of itemsize bytes an element, moved once: no implementation moves less.

    (It holds for instance norm too, but nothing that computes each sum once can reach it: the sums must all be there
    before the first is normalised.)
    """
    tensors = (*layer.inputs.values(), *layer.parameters.values(), *layer.outputs.values())
    return Pass(layer.op, layer.flops, _bytes(tensors, itemsize))


def eager_passes(layer: Layer, itemsize: int, *, instance_norm: bool = False) -> list[Pass]:
    """The layer's ops, each a pass of its own, in the order they run."""
    inputs, y = _bytes(layer.inputs.values(), itemsize), _bytes([layer.outputs["y"]], itemsize)
    if layer.op == UPSAMPLE:
        return [fused_pass(layer, itemsize)]
    passes = []
    if "up" in layer.inputs:
        passes.append(Pass("cat", 0, 2 * inputs))
    passes.append(Pass("conv", layer.flops, inputs + _bytes(layer.parameters.values(), itemsize) + y))
    is_conv3x3 = "conv3x3" in layer.op
    if is_conv3x3 and instance_norm:
        passes.append(Pass("statistics", 0, y))
    passes.append(Pass("bias or norm", 0, 2 * y))
    if is_conv3x3:
        passes.append(Pass("activation", 0, 2 * y))
    if "pooled" in layer.outputs:
        passes.append(Pass("pool", 0, y + _bytes([layer.outputs["pooled"]], itemsize)))
    return passes


def _bytes(shapes: Iterable[tuple[int, ...]], itemsize: int) -> int:
    return itemsize * sum(math.prod(shape) for shape in shapes)
