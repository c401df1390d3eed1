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
    inputs = inputs_of(x, up)
    side = side_of(x, weight, stride)
    kind = ("conv3x3", x.dtype, inputs[0].shape[1], stride, side, None if norm is None else norm.eps)

    def make() -> Convolution:
        return prepare_conv3x3(inputs, *_folded(weight, bias, norm), stride)

    return prepared(kind, _sources(weight, bias, norm), make)(inputs, slope)


def inputs_of(x: Tensor, up: Tensor | None) -> list[Tensor]:
    """Return what the convolution of x, or of x and up, takes: the two as they are, or joined."""
    if up is None:
        return [x]
    return [torch.cat([x, up], dim=1)] if joins(x) else [x, up]


def joins(x: Tensor) -> bool:
    """Whether an input is joined to x: in 16 bits, where the sum of the first would be rounded before the second's, and
    where they are small, so that a copy costs less than a second call.
    """
    return x.dtype != torch.float32 or x[0].numel() <= _FEW_VALUES


class Convolution(NamedTuple):
    """A 3x3 convolution of one input or the sum of several's: the prepared weight of each, for Winograd's tiles of that
    side, or, of side 0, for oneDNN.
    """

    shares: list[Tensor]
    bias: Tensor | None
    stride: int
    side: int

    def __call__(self, inputs: Sequence[Tensor], slope: float | None, *, is_finite: bool = False) -> Tensor:
        """Return activation(conv2d(inputs)); is_finite: no value is infinite or NaN."""
        if self.side:
            return activate_(winograd.convolve_transformed(inputs, self.shares, self.bias, self.side), slope)
        fused = "relu" if is_finite and slope == 0 else "none"
        geometry = (_ONE, [self.stride] * 2, _ONE, 1)
        first, *others = zip(inputs, self.shares, strict=True)
        y = _convolve(*first, self.bias, *geometry, "none" if others else fused, [], "")
        for x, share in others:
            y = _convolve_add_(y, x, share, fused, self.stride)
        return y if fused == "relu" else activate_(y, slope)


def prepare_conv3x3(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, stride: int = 1) -> Convolution:
    """Prepare weight [Cout, Cin, 3, 3] and bias in float32 for inputs like these, which have Cin channels together."""
    side = side_of(inputs[0], weight, stride)
    parts = weight.split([x.shape[1] for x in inputs], dim=1)
    shares = [
        winograd.transformed(part, side) if side else _pack(part, x, stride)
        for part, x in zip(parts, inputs, strict=True)
    ]
    return Convolution(shares, _as(bias, inputs[0]), stride, side)


def side_of(x: Tensor, weight: Tensor, stride: int = 1) -> int:
    """Return the side of Winograd's tiles where its algorithm is the faster, else 0."""
    return winograd.side_of_tiles(x, weight) if stride == 1 and dispatch.winograd_wins(x, weight) else 0


def conv_transpose2x2(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv_transpose2d(x, weight, bias, stride=2) in x's dtype."""

    def make() -> tuple[Tensor, Tensor | None]:
        return prepare_conv_transpose2x2(x, weight, bias)

    return convolve_transpose2x2(prepared(("conv_transpose2x2", x.dtype), [weight, bias], make), x)


def prepare_conv_transpose2x2(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Prepare weight and bias for images like x."""
    plain, shift = _folded(weight, bias, None)
    return _pack_transpose(plain, x, padding=0), _as(shift, x)


def convolve_transpose2x2(weights: tuple[Tensor, Tensor | None], x: Tensor) -> Tensor:
    """Return conv_transpose2d(x, weight, bias, stride=2) by prepared weights."""
    return _convolve_transpose(x, *weights, padding=0)


def conv_transpose2x2_concat_conv3x3(
    skip: Tensor,
    low: Tensor,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    slope: float | None,
    up_first: bool,
) -> Tensor:
    """conv3x3(skip, up, ...), or of up and skip if up_first, of up = conv_transpose2d(low, up_weight, up_bias,
    stride=2), or low's pixels repeated without up_weight, padded with zeros below and right to skip's size, which is
    never computed: the two weights are composed.
    """
    side = side_of(skip, folding.split_joined(weight, skip, up_first)[0])

    def make() -> Composed:
        return compose(skip, low, up_weight, up_bias, *_folded(weight, bias, norm), up_first)

    kind = ("conv_transpose2x2_concat_conv3x3", skip.dtype, side, up_first, None if norm is None else norm.eps)
    layer = prepared(kind, [*_sources(weight, bias, norm), up_weight, up_bias], make)
    return layer([skip, low], slope)


class Composed(NamedTuple):
    """An upsampling with the convolution after it: the weight of both, the skip's, and what the biases add."""

    composed: Tensor
    of_skip: Convolution
    shift: Tensor | None
    border: Tensor | None

    def __call__(self, inputs: Sequence[Tensor], slope: float | None, *, is_finite: bool = False) -> Tensor:
        """Return the activated convolution of [skip, the upsampled low]; is_finite: no value is infinite or NaN."""
        skip, low = inputs
        odd = [size % 2 for size in skip.shape[2:]]
        y = _convolve_transpose(low, self.composed, self.shift, padding=1, output_padding=odd)
        if self.border is not None:
            y = folding.add_border_(y, self.border)
        if self.of_skip.side:
            return activate_(y.add_(self.of_skip([skip], None)), slope)
        fused = "relu" if is_finite and slope == 0 else "none"
        y = _convolve_add_(y, skip, self.of_skip.shares[0], fused)
        return y if fused == "relu" else activate_(y, slope)


def compose(
    skip: Tensor,
    low: Tensor,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    up_first: bool = False,
) -> Composed:
    """Prepare weights and bias in float32, the norm folded in, for images like skip and low."""
    of_skip, of_up = folding.split_joined(weight, skip, up_first)
    border = None
    if up_bias is not None:
        of_bias = folding.upsampled_bias(up_bias.detach().float(), of_up)
        inner, border = of_bias[:, 1, 1], folding.border_of(of_bias)
        shift = inner if shift is None else shift + inner
    up_weight = None if up_weight is None else up_weight.detach().float()
    composed = _pack_transpose(folding.compose_upsampling(up_weight, of_up), low, padding=1)
    return Composed(composed, prepare_conv3x3([skip], of_skip, None), _as(shift, skip), _as(border, skip))


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


def _pack(weight: Tensor, x: Tensor, stride: int = 1) -> Tensor:
    """Return a 3x3 weight in the order in which oneDNN multiplies images like x by it."""
    weight = weight.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._reorder_convolution_weight(weight, _ONE, [stride] * 2, _ONE, 1, list(x.shape))


def _pack_transpose(weight: Tensor, low: Tensor, *, padding: int) -> Tensor:
    reorder = torch.ops.mkldnn._reorder_convolution_transpose_weight
    return reorder(weight.to(low.dtype), [padding] * 2, [0, 0], [2, 2], _ONE, 1, list(low.shape))


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return conv2d(x, weight, bias) of a 1x1 weight as it is."""
    return _convolve(x, weight, bias, [0, 0], _ONE, _ONE, 1, "none", [], "")


def _convolve(*arguments: Any) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise.default(*arguments)


def _convolve_add_(y: Tensor, x: Tensor, packed: Tensor, fused: str, stride: int = 1) -> Tensor:
    """y += conv2d(x, weight, stride=stride, padding=1), then what is fused with it, "relu" or "none"."""
    geometry, unary = (_ONE, [stride] * 2, _ONE, 1), None if fused == "none" else fused
    return torch.ops.mkldnn._convolution_pointwise_(y, x, packed, None, *geometry, "add", 1.0, unary, [], "")


def _convolve_transpose(
    x: Tensor, packed: Tensor, bias: Tensor | None, *, padding: int, output_padding: Sequence[int] = (0, 0)
) -> Tensor:
    """conv_transpose2d of stride 2."""
    arguments: list[Any] = [[padding] * 2, list(output_padding), [2, 2], _ONE, 1, "none", [], ""]
    return torch.ops.mkldnn._convolution_transpose_pointwise(x, packed, bias, *arguments)
