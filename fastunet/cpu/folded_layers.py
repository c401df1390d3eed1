"""The convolutions of a small net in inference: ATen's, with batch norms folded into weights that are kept.

Where arithmetic is little, calls are what a net costs the host: an op's more than its layers', a norm's as much as a
convolution's.
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
    """What ATen's convolution takes in inference, and whether a norm comes after it that is not in the weight."""

    weight: Tensor
    bias: Tensor | None
    needs_norm: bool


class Folding:
    """The layers of a net, (conv, norm) each, for inference; as long as its modules stay as they are."""

    def __init__(self, layers: Sequence[tuple[Any, Any]]) -> None:
        self.layers = layers
        self._sources = [t for conv, norm in layers for t in (conv.weight, conv.bias, *(statistics_of(norm) or ()))]
        # With everything that the folded layers are made of beside the sources.
        self._kind = ("folded layers", *(_needs_norm(norm) or getattr(norm, "eps", None) for _, norm in layers))

    def folded(self) -> Iterator[FoldedLayer]:
        """Return them as they are now, in order. They are kept until a parameter changes, and all asked for at once."""
        return iter(prepared(self._kind, self._sources, lambda: [_fold(*layer) for layer in self.layers]))


def _fold(conv: Any, norm: Any) -> FoldedLayer:
    weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach().clone()
    needs_norm, statistics = _needs_norm(norm), statistics_of(norm)
    if statistics is not None:
        expected = (weight.shape[:1], weight.dtype, weight.device)
        # What torch's batch norm refuses is left to it.
        needs_norm = any(t is not None and (t.shape, t.dtype, t.device) != expected for t in statistics)
        if not needs_norm:
            weight, bias = folding.fold_batch_norm(weight, *statistics, norm.eps)
    return FoldedLayer(weight.clone(memory_format=torch.channels_last), bias, needs_norm)


def _needs_norm(norm: Any) -> bool:
    return statistics_of(norm) is None and not isinstance(norm, nn.Identity)


def statistics_of(norm: Any) -> tuple[Any, Any, Any, Any] | None:
    """Return mean, variance, gamma and beta of a batch norm by running statistics, None of another norm."""
    if type(norm) is not nn.BatchNorm2d or norm.training or norm.running_mean is None:
        return None
    return norm.running_mean, norm.running_var, norm.weight, norm.bias


# Of few channels ATen's convolution is its own loop, which loses to oneDNN from so many pixels on.
_FEW_CHANNELS, _FEW_PIXELS = 4, 1024


def run_layer(norm: Any, act: Any, x: Tensor, folded: Iterator[FoldedLayer]) -> Tensor:
    """Compute act(norm(conv(x))) of the next of the folded layers."""
    weight, bias, needs_norm = next(folded)
    if x.shape[1] <= _FEW_CHANNELS and x.shape[2] * x.shape[3] > _FEW_PIXELS and dispatch.has_onednn():
        y = onednn.convolve(x, weight, bias)
    else:
        y = F.conv2d(x, weight, bias, padding=1)
    if needs_norm and isinstance(norm, nn.InstanceNorm2d):  # As a group norm of single channels it stays channels_last.
        y = F.group_norm(y, y.shape[1], norm.weight, norm.bias, norm.eps)
    elif needs_norm:
        y = norm.forward(y)
    return torch.relu_(y) if type(act) is nn.ReLU else act.forward(y)
