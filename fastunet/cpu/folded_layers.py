"""The layers of a small net in inference: weights with batch norms folded in and upsamplings composed, kept as oneDNN
takes them.

Where arithmetic is little, calls are what a net costs the host, and asking whether weights have changed: here it is
asked once for the whole net.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet import dispatch
from fastunet.cpu import folding, onednn
from fastunet.cpu.weight_cache import prepared


class FoldedLayer(NamedTuple):
    """What a convolution takes in inference, packed or not, and whether a norm comes after it that is not in it."""

    weight: Tensor
    bias: Tensor | None
    is_packed: bool
    needs_norm: bool

    def convolve(self, x: Tensor) -> Tensor:
        """Return conv2d(x, weight, bias, padding=1)."""
        if self.is_packed:
            return onednn.convolve(x, self.weight, self.bias)
        return F.conv2d(x, self.weight, self.bias, padding=1)


class Layer(NamedTuple):
    """A 3x3 convolution, its norm, the `ConvTranspose2d` that is composed with it, and an image of its size."""

    conv: Any
    norm: Any
    up: Any
    image: Tensor  # [N, 1, H, W], without memory of its own


class Folding:
    """The layers of a net for inference, as long as its modules stay as they are."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self._sources = []
        kinds: list[Any] = ["folded layers"]
        for conv, norm, up, image in layers:
            self._sources += [conv.weight, conv.bias, *(statistics_of(norm) or ())]
            self._sources += [] if up is None else [up.weight, up.bias]
            # With everything that the layer is made of beside the sources.
            kinds.append((_needs_norm(norm) or getattr(norm, "eps", None), up is not None, _packs(conv.weight, image)))
        self._kind = tuple(kinds)

    def folded(self) -> Iterator[FoldedLayer | onednn.ComposedLayer]:
        """Return them as they are now, in order. They are kept until a parameter changes, and all asked for at once."""
        return iter(prepared(self._kind, self._sources, lambda: [*map(_fold, self.layers)]))


def _fold(layer: Layer) -> FoldedLayer | onednn.ComposedLayer:
    conv, norm, up, image = layer
    weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach().clone()
    needs_norm, statistics = _needs_norm(norm), statistics_of(norm)
    if statistics is not None:
        expected = (weight.shape[:1], weight.dtype, weight.device)
        # What torch's batch norm refuses is left to it.
        needs_norm = any(t is not None and (t.shape, t.dtype, t.device) != expected for t in statistics)
        if not needs_norm:
            weight, bias = folding.fold_batch_norm(weight, *statistics, norm.eps)
    if up is not None and not needs_norm:
        skip = image.expand(-1, weight.shape[1] - up.weight.shape[1], -1, -1)
        low = image[:, :, ::2, ::2].expand(-1, up.weight.shape[0], -1, -1)
        return onednn.compose(skip, low, up.weight, up.bias, weight, bias)
    # A copy in any case: what is kept is not to share memory with its sources.
    weight = weight.clone(memory_format=torch.channels_last)
    is_packed = _packs(weight, image)
    packed = onednn.pack(weight, image.expand(-1, weight.shape[1], -1, -1)) if is_packed else weight
    return FoldedLayer(packed, bias, is_packed, needs_norm)


# A call of oneDNN's has a fixed cost, twice ATen's: it is worth it from so many products for an image on. Of few
# channels ATen's convolution is its own loop, which loses from so many pixels on.
_FEW_PRODUCTS, _FEW_CHANNELS, _FEW_PIXELS = 1 << 22, 4, 1024


def _packs(weight: Tensor, image: Tensor) -> bool:
    """Whether oneDNN takes the weight, packed."""
    pixels = image.shape[2] * image.shape[3]
    is_worth_it = weight.numel() * pixels > _FEW_PRODUCTS or (weight.shape[1] <= _FEW_CHANNELS and pixels > _FEW_PIXELS)
    return dispatch.has_onednn() and image.numel() > 0 and is_worth_it


def _needs_norm(norm: Any) -> bool:
    return statistics_of(norm) is None and not isinstance(norm, nn.Identity)


def statistics_of(norm: Any) -> tuple[Any, Any, Any, Any] | None:
    """Return mean, variance, gamma and beta of a batch norm by running statistics, None of another norm."""
    if type(norm) is not nn.BatchNorm2d or norm.training or norm.running_mean is None:
        return None
    return norm.running_mean, norm.running_var, norm.weight, norm.bias


def run_layer(norm: Any, act: Any, x: Tensor, layer: FoldedLayer) -> Tensor:
    """Compute act(norm(conv(x)))."""
    y = layer.convolve(x)
    if layer.needs_norm and isinstance(norm, nn.InstanceNorm2d):  # As a group norm of single channels: channels_last.
        y = F.group_norm(y, y.shape[1], norm.weight, norm.bias, norm.eps)
    elif layer.needs_norm:
        y = norm.forward(y)
    return activate(act, y)


def activate(act: Any, y: Tensor) -> Tensor:
    """Compute act(y), in place where that is its way."""
    return torch.relu_(y) if type(act) is nn.ReLU else act.forward(y)
