"""A U-Net for inference on the CPU: weights with batch norms folded in and upsamplings composed, kept as oneDNN and
Winograd's algorithm take them; whether they have changed is asked once for the whole net.

oneDNN's own ReLU saves a pass over the values, but turns NaN into 0. It is used where no NaN can come up: the weights
bound what moderate values grow to, and each call sees that the image is moderate and what the lower levels hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet import dispatch
from fastunet.cpu import folding, onednn
from fastunet.cpu.pooling import max_pool2x2
from fastunet.cpu.weight_cache import prepared
from fastunet.reference.unet import padding_to

# The largest value of an image that is called moderate, the largest sum of the values of a level from LOW on (there
# are few; looking at all would take a pass more), and the largest value that may come of them: so far below infinity
# that neither sums on the way reach it nor Winograd's transforms, which multiply by less than 2**16.
LARGEST_PIXEL, LARGEST_SUM, _LARGEST = 2.0**20, 2.0**30, 2.0**108
LOW = 2

# What computes an upsampling: its module, oneDNN, or the layer after it, with which it is composed.
MODULE, ONEDNN, COMPOSED = "module", "onednn", "composed"


class Prepared(NamedTuple):
    """What a layer is computed with: its convolution, whether the norm is not in it, and what upsamples before it."""

    convolution: onednn.Convolution | onednn.Composed | _Plain
    needs_norm: bool
    up: tuple[Tensor, Tensor | None] | None = None


class _Plain(NamedTuple):
    """A 3x3 convolution by ATen, called like oneDNN's."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, inputs: Sequence[Tensor], slope: float | None, *, is_finite: bool = False) -> Tensor:
        (x,) = inputs
        return onednn.activate_(F.conv2d(x, self.weight, self.bias, padding=1), slope)


class Layer(NamedTuple):
    """A 3x3 convolution, its norm and its activation; images: what inputs are like, in size, dtype and channels."""

    conv: Any
    norm: Any
    act: Any
    images: Sequence[Tensor]

    def __call__(self, prepared: Prepared, inputs: Sequence[Tensor], is_finite: bool) -> Tensor:
        """Compute act(norm(conv(inputs))); is_finite: no value of it is infinite or NaN."""
        slope = getattr(self.act, "negative_slope", 0.0)
        if not prepared.needs_norm:
            return prepared.convolution(inputs, slope, is_finite=is_finite)
        y = prepared.convolution(inputs, None)
        if isinstance(self.norm, nn.InstanceNorm2d):  # As a group norm of single channels: channels_last.
            y = F.group_norm(y, y.shape[1], self.norm.weight, self.norm.bias, self.norm.eps)
        else:
            y = self.norm.forward(y)
        return onednn.activate_(y, slope)

    def needs_norm(self) -> bool:
        """Return whether the norm cannot be folded into the weight, or torch's batch norm would refuse what it has."""
        weight, statistics = self.conv.weight, statistics_of(self.norm)
        if statistics is None:
            return not isinstance(self.norm, nn.Identity)
        expected = (weight.shape[:1], weight.dtype, weight.device)
        return any(t is not None and (t.shape, t.dtype, t.device) != expected for t in statistics)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return copies of weight and bias, the norm folded in if it can be."""
        weight, statistics = self.conv.weight.detach(), statistics_of(self.norm)
        if statistics is not None and not self.needs_norm():
            return folding.fold_batch_norm(weight, *statistics, self.norm.eps)
        return weight.clone(), None if self.conv.bias is None else self.conv.bias.detach().clone()

    def prepare(self) -> Prepared:
        """Prepare what is needed of the parameters as they are."""
        weight, bias = self.folded()
        if self.is_small():
            return Prepared(_Plain(weight.contiguous(memory_format=torch.channels_last), bias), self.needs_norm())
        return Prepared(onednn.prepare_conv3x3(self.images, weight, bias), self.needs_norm())

    def is_small(self) -> bool:
        """Return whether ATen computes it at less cost than oneDNN."""
        image, weight = self.images[0], self.conv.weight
        is_left = dispatch.choose("conv3x3_bias_relu", image, weight).implementation == "aten"
        return is_left and len(self.images) == 1 and image.dtype == torch.float32

    def grown(self, bound: float) -> float:
        """Return how large values up to `bound` may become by the layer; infinite where it does not end in a ReLU."""
        is_unknown = self.needs_norm() or type(self.act) is not nn.ReLU
        return math.inf if is_unknown else _largest_sum(*self.folded(), bound)

    def kind(self) -> tuple[Any, ...]:
        """Return what `prepare` depends on beside the parameters."""
        image = self.images[0]
        side = onednn.side_of(image, self.conv.weight)
        return image.shape[1], side, self.is_small(), self.needs_norm(), getattr(self.norm, "eps", None)


class StepUp(NamedTuple):
    """An upsampling of images like `low`, what computes it, and the two layers after it."""

    up: Any
    by: str
    low: Tensor
    first: Layer
    second: Layer

    def __call__(self, prepared: Prepared, skip: Tensor, low: Tensor, is_finite: bool) -> Tensor:
        """Compute the first layer of [skip, the upsampled low]."""
        if self.by == COMPOSED:
            return self.first(prepared, [skip, low], is_finite)
        if prepared.up is not None:
            up = onednn.convolve_transpose2x2(prepared.up, low)
        else:
            up = self.by_module(low)
        return self.first(prepared, onednn.inputs_of(skip, padded_to(up, skip)), is_finite)

    def by_module(self, low: Tensor) -> Tensor:
        """Return low upsampled by the module, whose weight, if it has one, is float32."""
        with torch.autocast("cpu", torch.bfloat16, enabled=low.dtype == torch.bfloat16):
            return self.up.forward(low)

    def prepare(self) -> Prepared:
        """Prepare what is needed of the parameters of the upsampling and the first layer."""
        if self.by == MODULE:
            return self.first.prepare()
        parameters = self.up.weight, self.up.bias
        if self.by == ONEDNN:
            return self.first.prepare()._replace(up=onednn.prepare_conv_transpose2x2(self.low, *parameters))
        composed = onednn.compose(self.first.images[0], self.low, *parameters, *self.first.folded())
        return Prepared(composed, self.first.needs_norm())

    def grown(self, bound: float) -> float:
        """Return how large values up to `bound` may become by the upsampling."""
        if isinstance(self.up, nn.ConvTranspose2d):
            return _largest_sum(self.up.weight.transpose(0, 1), self.up.bias, bound)
        return bound  # Interpolated, none grows.


class Weights(NamedTuple):
    """What was made of a net's parameters: its layers in their order, and the head's weight and bias; is_bounded:
    moderate values stay finite.
    """

    layers: list[Prepared]
    head: tuple[Tensor, Tensor | None]
    is_bounded: bool


class PreparedNet:
    """What a U-Net computes of images of one size in `dtype`, as long as its modules stay as they are.

    descent: the two layers of each level, the bottleneck's last; ascent: the steps up, the lowest first.
    """

    def __init__(
        self, descent: Sequence[Sequence[Layer]], ascent: Sequence[StepUp], head: Any, dtype: torch.dtype
    ) -> None:
        self.descent, self.ascent, self.head, self.dtype = descent, ascent, head, dtype
        self.layers = layers = [*chain(*descent), *chain(*(step[3:] for step in ascent))]
        self.folds_norms = not any(layer.needs_norm() for layer in layers)
        modules = [layer.conv for layer in layers] + [step.up for step in ascent if step.by != MODULE] + [head.conv]
        self._sources = [t for module in modules for t in (module.weight, module.bias)]
        self._sources += [t for layer in layers for t in statistics_of(layer.norm) or ()]
        # With everything that the weights are made of beside the sources.
        self._kind = ("net", dtype, *(layer.kind() for layer in layers), *(step.by for step in ascent))

    def __call__(self, x: Tensor, levels: list[Tensor] | None = None) -> Tensor:
        """Return the net's output of x, which is channels_last; what the steps up give is appended to levels."""
        return self.run(self.weights(), x, levels)

    def weights(self) -> Weights:
        """Return what was made of the parameters as they are now; it is kept until one changes."""
        return prepared(self._kind, self._sources, self._prepare)

    def run(self, weights: Weights, x: Tensor, levels: list[Tensor] | None = None) -> Tensor:
        """As a call, by these weights whatever the parameters are."""
        x, skips, layers = x.to(self.dtype), list[Tensor](), iter(weights.layers)
        is_finite = weights.is_bounded and max(float(x.amax()), -float(x.amin())) <= LARGEST_PIXEL
        for level, (first, second) in enumerate(self.descent):
            x = max_pool2x2(x) if level else x
            x = first(next(layers), [x], is_finite)
            x = second(next(layers), [x], is_finite)
            # After a ReLU none is negative, and the sum is as large as the largest.
            is_finite = is_finite and (level < LOW or float(x.sum()) <= LARGEST_SUM)
            skips.append(x)
        skips.pop()
        for step in self.ascent:
            x = step(next(layers), skips.pop(), x, is_finite)
            x = step.second(next(layers), [x], is_finite)
            if levels is not None:
                levels.append(x)
        convolve = F.conv2d if isinstance(weights.layers[-1].convolution, _Plain) else onednn.pointwise
        return self.head.activate(convolve(x, *weights.head))

    @torch.autocast("cpu", enabled=False)  # Weights are folded and composed in float32.
    def _prepare(self) -> Weights:
        layers = [layer.prepare() for layer in chain(*self.descent)]
        layers += chain.from_iterable((step.prepare(), step.second.prepare()) for step in self.ascent)
        weight, bias = self.head.conv.weight, self.head.conv.bias
        head = (
            weight.detach().to(self.dtype, copy=True),
            None if bias is None else bias.detach().to(self.dtype, copy=True),
        )
        fuses = any(isinstance(layer.convolution, onednn.Convolution) for layer in layers)
        return Weights(layers, head, fuses and self.is_bounded())

    def is_bounded(self) -> bool:
        """Return whether what comes of moderate values is finite, and after each activation a ReLU's."""
        bound, bounds, skips = LARGEST_PIXEL, list[float](), list[float]()
        for level, layers in enumerate(self.descent):
            for layer in layers:
                bounds.append(bound := layer.grown(bound))
            bound = bound if level < LOW else LARGEST_SUM
            skips.append(bound)
        skips.pop()
        for step in self.ascent:
            bounds.append(bound := max(skips.pop(), step.grown(bound)))
            bounds.append(bound := step.first.grown(bound))
            bounds.append(bound := step.second.grown(bound))
        return all(bound <= _LARGEST for bound in bounds)


def statistics_of(norm: Any) -> tuple[Any, Any, Any, Any] | None:
    """Return mean, variance, gamma and beta of a batch norm by running statistics, None of another norm."""
    if type(norm) is not nn.BatchNorm2d or norm.training or norm.running_mean is None:
        return None
    return norm.running_mean, norm.running_var, norm.weight, norm.bias


def padded_to(low: Tensor, skip: Tensor) -> Tensor:
    """Return low with the zeros around it that bring it to skip's size."""
    padding = padding_to(low, skip)
    return F.pad(low, padding) if any(padding) else low


def like(image: Tensor, channels: int) -> Tensor:
    """Return an image of that size, with one value in memory."""
    return image[:, :1].expand(-1, channels, -1, -1)


def _largest_sum(weight: Tensor, bias: Tensor | None, bound: float) -> float:
    """Return how large a sum of values up to `bound` by weight [Cout, ...] may be, infinite where a weight is NaN:
    Python's max may pass over NaN.
    """
    sums = weight.detach().double().abs().flatten(1).sum(1) * bound
    return float((sums if bias is None else sums + bias.detach().abs()).nan_to_num(math.inf).max())
