"""Convolutions of inference on the CPU, with weights that are folded and prepared once.

oneDNN works on weights in blocks. torch's own convolutions bring them into that order at every call; these keep them.
In float32 a second input is added to the sum of the first instead of being joined to it, and wide convolutions are left
to Winograd's algorithm, whose transformed weights are kept. The activation is a pass of
its own, over values still in the cache: oneDNN's ReLU turns NaN into 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet import dispatch
from fastunet.cpu import folding, winograd
from fastunet.cpu.weight_cache import prepared

# Inputs of up to so many values for each image are joined.
_FEW_VALUES = 1 << 14
# A padding or dilation.
_ONE = [1, 1]
# The bits of bfloat16's minus infinity as an integer: of the numbers whose sign bit is set, only NaN's are greater. A
# threshold on integers takes a quarter of the time of torch's ReLU in bfloat16.
_MINUS_INFINITY = -128


class Norm(NamedTuple):
    """A batch norm by given statistics, [Cout] each; its beta is the convolution's bias."""

    mean: Tensor
    variance: Tensor
    gamma: Tensor | None
    eps: float


def norm_of(mean: Tensor | None, variance: Tensor | None, gamma: Tensor | None, eps: float) -> Norm | None:
    """The norm of an op's optional arguments."""
    return None if mean is None or variance is None else Norm(mean, variance, gamma, eps)


def activate_(y: Tensor, slope: float | None) -> Tensor:
    """Apply the activation of that slope in place: None is the identity, 0 ReLU, above 0 LeakyReLU."""
    if slope is None:
        return y
    if slope == 0 and y.device.type == "cpu" and y.dtype == torch.bfloat16:
        F.threshold(y.view(torch.int16), _MINUS_INFINITY, 0, inplace=True)
        return y
    return F.leaky_relu_(y, slope) if slope else F.relu_(y)


def conv3x3(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    slope: float | None,
    stride: int = 1,
) -> Tensor:
    """activation(norm(conv2d([x, up], weight, stride=stride, padding=1)) + bias) in x's dtype; the arguments as the ops
    have them.
    """
    # In 16 bits the sum of the first input would be rounded before the second's; of small ones a copy costs less than
    # a second call.
    if up is not None and (x.dtype != torch.float32 or x[0].numel() <= _FEW_VALUES):
        x, up = torch.cat([x, up], dim=1), None
    if stride == 1 and dispatch.winograd_wins(x, weight):
        return activate_(_convolve_winograd([x] if up is None else [x, up], weight, bias, norm), slope)

    def make() -> tuple[Tensor | None, Tensor, Tensor | None]:
        folded, shift = _folded(weight, bias, norm)
        packed = None if up is None else pack(folded[:, x.shape[1] :], up, stride)
        return packed, pack(folded[:, : x.shape[1]], x, stride), _as(shift, x)

    kind = ("conv3x3", x.dtype, x.shape[1], stride, None if norm is None else norm.eps)
    of_up, of_x, shift = prepared(kind, _sources(weight, bias, norm), make)
    y = convolve(x, of_x, shift, stride)
    if up is not None and of_up is not None:
        y = _convolve_add_(y, up, of_up, stride)
    return activate_(y, slope)


def conv_transpose2x2(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv_transpose2d(x, weight, bias, stride=2) in x's dtype."""

    def make() -> tuple[Tensor, Tensor | None]:
        plain, shift = _folded(weight, bias, None)
        return _pack_transpose(plain, x, padding=0), _as(shift, x)

    packed, shift = prepared(("conv_transpose2x2", x.dtype), [weight, bias], make)
    return _convolve_transpose(x, packed, shift, padding=0)


def conv_transpose2x2_concat_conv3x3(
    skip: Tensor,
    low: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    slope: float | None,
) -> Tensor:
    """conv3x3(skip, up, ...) of up = conv_transpose2d(low, up_weight, up_bias, stride=2), padded with zeros below and
    right to skip's size, which is never computed: the two weights are composed.
    """
    is_wide = dispatch.winograd_wins(skip, weight[:, : skip.shape[1]])
    side = winograd.side_of_tiles(skip, weight[:, : skip.shape[1]]) if is_wide else 0

    def make() -> ComposedLayer:
        return compose(skip, low, up_weight, up_bias, *_folded(weight, bias, norm), side)

    kind = ("conv_transpose2x2_concat_conv3x3", skip.dtype, side, None if norm is None else norm.eps)
    layer = prepared(kind, [*_sources(weight, bias, norm), up_weight, up_bias], make)
    return activate_(convolve_composed(layer, skip, low, side), slope)


class ComposedLayer(NamedTuple):
    """An upsampling with the convolution after it: the weight of both, the skip's, and what the biases add."""

    composed: Tensor
    of_skip: Tensor
    shift: Tensor | None
    border: Tensor | None


def compose(
    skip: Tensor,
    low: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    side: int = 0,
) -> ComposedLayer:
    """Prepare weights and bias in float32, the norm folded in, for images like skip and low; side: of Winograd's tiles,
    0 for oneDNN.
    """
    split = skip.shape[1]
    of_up = weight[:, split:]
    border = None
    if up_bias is not None:
        of_bias = folding.upsampled_bias(up_bias.detach().float(), of_up)
        inner, border = of_bias[:, 1, 1], folding.border_of(of_bias)
        shift = inner if shift is None else shift + inner
    composed = _pack_transpose(folding.compose_upsampling(up_weight.detach().float(), of_up), low, padding=1)
    of_skip = winograd.transformed(weight[:, :split], side) if side else pack(weight[:, :split], skip)
    return ComposedLayer(composed, of_skip, _as(shift, skip), _as(border, skip))


def convolve_composed(layer: ComposedLayer, skip: Tensor, low: Tensor, side: int = 0) -> Tensor:
    """Return the convolution of [skip, the upsampled low], before its activation."""
    odd = [size % 2 for size in skip.shape[2:]]
    y = _convolve_transpose(low, layer.composed, layer.shift, padding=1, output_padding=odd)
    if layer.border is not None:
        y = folding.add_border_(y, layer.border)
    if side:
        return y.add_(winograd.convolve_transformed([skip], [layer.of_skip], None, side))
    return _convolve_add_(y, skip, layer.of_skip)


def _convolve_winograd(inputs: list[Tensor], weight: Tensor, bias: Tensor | None, norm: Norm | None) -> Tensor:
    side = winograd.side_of_tiles(inputs[0], weight)

    def make() -> tuple[list[Tensor], Tensor | None]:
        folded, shift = _folded(weight, bias, norm)
        shares = folded.split([x.shape[1] for x in inputs], dim=1)
        return [winograd.transformed(share, side) for share in shares], shift

    kind = ("winograd", side, inputs[0].shape[1], None if norm is None else norm.eps)
    factors, shift = prepared(kind, _sources(weight, bias, norm), make)
    return winograd.convolve_transformed(inputs, factors, shift, side)


def _sources(weight: Tensor, bias: Tensor | None, norm: Norm | None) -> list[Tensor | None]:
    return [weight, bias, *(norm[:3] if norm is not None else ())]


def _folded(weight: Tensor, bias: Tensor | None, norm: Norm | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution with its norm, in float32."""
    weight, shift = weight.detach().float(), None if bias is None else bias.detach().to(torch.float32, copy=True)
    if norm is None:
        return weight.clone(), shift  # Packing asks for memory to write to, which `prepared` would take for a write.
    gamma = None if norm.gamma is None else norm.gamma.detach().float()
    return folding.fold_batch_norm(weight, norm.mean.float(), norm.variance.float(), gamma, shift, norm.eps)


def _as(t: Tensor | None, x: Tensor) -> Tensor | None:
    return None if t is None else t.to(x.dtype)


def pack(weight: Tensor, x: Tensor, stride: int = 1) -> Tensor:
    """Return a 3x3 weight in the order in which oneDNN multiplies images like x by it."""
    weight = weight.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._reorder_convolution_weight(weight, _ONE, [stride] * 2, _ONE, 1, list(x.shape))


def _pack_transpose(weight: Tensor, low: Tensor, *, padding: int) -> Tensor:
    reorder = torch.ops.mkldnn._reorder_convolution_transpose_weight
    return reorder(weight.to(low.dtype), [padding] * 2, [0, 0], [2, 2], _ONE, 1, list(low.shape))


def convolve(x: Tensor, packed: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """Return conv2d(x, packed, bias, stride=stride, padding=1); packed may also be a plain weight."""
    geometry = (_ONE, [stride] * 2, _ONE, 1)
    return torch.ops.mkldnn._convolution_pointwise.default(x, packed, bias, *geometry, "none", [], "")


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return conv2d(x, weight, bias) of a 1x1 weight as it is."""
    return torch.ops.mkldnn._convolution_pointwise.default(x, weight, bias, [0, 0], _ONE, _ONE, 1, "none", [], "")


def _convolve_add_(y: Tensor, x: Tensor, packed: Tensor, stride: int = 1) -> Tensor:
    """y += conv2d(x, weight, stride=stride, padding=1)."""
    geometry = (_ONE, [stride] * 2, _ONE, 1)
    return torch.ops.mkldnn._convolution_pointwise_(y, x, packed, None, *geometry, "add", 1.0, None, [], "")


def _convolve_transpose(
    x: Tensor, packed: Tensor, bias: Tensor | None, *, padding: int, output_padding: Sequence[int] = (0, 0)
) -> Tensor:
    """conv_transpose2d of stride 2."""
    arguments: list[Any] = [[padding] * 2, list(output_padding), [2, 2], _ONE, 1, "none", [], ""]
    return torch.ops.mkldnn._convolution_transpose_pointwise(x, packed, bias, *arguments)
