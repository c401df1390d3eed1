"""A U-Net's inference on the CPU as one graph, compiled by oneDNN for images of one size.

oneDNN's operators of torch ask oneDNN anew at every call how to compute, which on small images takes as long as the
convolution. Of a graph that TorchScript hands to oneDNN's graph compiler this is asked once.
"""

from __future__ import annotations

import functools
import io
import sys
import threading
import warnings
from collections.abc import Callable
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet.cpu import onednn
from fastunet.cpu.memory import keep_freed_memory, long_lived
from fastunet.cpu.prepared_net import LARGEST_PIXEL, LARGEST_SUM, LOW, MODULE, Layer, PreparedNet, StepUp
from fastunet.reference.unet import padding_to

# Blocks of freed memory that are kept from call to call: as large as glibc itself would come to keep.
_KEPT_BYTES = 32 << 20
# The share of a net's products beyond which Winograd's algorithm, which spares most of them, gains more.
_MOST_BY_WINOGRAD = 1 / 4
# From Python 3.14 on torch does not support TorchScript, which is deprecated.
_HAS_TORCHSCRIPT = hasattr(torch.jit, "enable_onednn_fusion") and sys.version_info < (3, 14)
# Whether graphs are handed on is a setting of the process.
_lock = threading.Lock()


def prepare(net: PreparedNet, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what computes the net of images like x: its graph, or its layers where they take less time, where values
    have no bounds, or where this build of torch leaves the graph to them.
    """
    products = [layer.conv.weight.numel() * layer.images[0].shape[2:].numel() for layer in net.layers]
    sides = [onednn.side_of(layer.images[0], layer.conv.weight) for layer in net.layers]
    by_winograd = sum(count for count, side in zip(products, sides, strict=True) if side)
    gains = _HAS_TORCHSCRIPT and by_winograd <= _MOST_BY_WINOGRAD * sum(products)
    if gains and net.folds_norms and net.is_bounded():
        graph = NetGraph(net, x)
        if graph.is_compiled:
            return graph
    return functools.partial(net.run, net.weights())


class NetGraph:
    """What a net computes of images like x, as long as nothing of either is changed."""

    def __init__(self, net: PreparedNet, x: Tensor) -> None:
        self.net, self._strides = net, _strides(*x.shape[1:])
        example = self._like_the_first(x)
        keep_freed_memory(_KEPT_BYTES)
        with _lock, long_lived(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            was_enabled = torch.jit.onednn_fusion_enabled()
            torch.jit.enable_onednn_fusion(True)
            try:
                traced = torch.jit.trace(_Net(net).eval(), example, check_trace=False)
                # What is traced stays for as long as the process, what is loaded does not.
                written = io.BytesIO()
                torch.jit.save(traced, written)
                written.seek(0)
                self._graph = torch.jit.freeze(torch.jit.load(written).eval())
                self._graph(example)  # Records shapes, by which the next execution compiles.
                self.is_compiled = "oneDNNFusionGroup" in str(self._graph.graph_for(example))
            finally:
                torch.jit.enable_onednn_fusion(was_enabled)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the net's output; by layers where a value might not be finite: oneDNN's ReLU turns NaN into 0."""
        y, smallest, largest, *sums = self._graph(self._like_the_first(x))
        is_moderate = max(float(largest), -float(smallest)) <= LARGEST_PIXEL
        if is_moderate and all(float(total) <= LARGEST_SUM for total in sums):
            return self.net.head.activate(y)
        return self.net(x)

    def _like_the_first(self, x: Tensor) -> Tensor:
        """Return x with the strides that the graph was compiled for, of which several mean the same."""
        x = x.contiguous(memory_format=torch.channels_last)
        return x.as_strided(x.shape, self._strides)


class _Net(nn.Module):
    """What is traced: the output, the smallest and largest value of the image, and sums of the lower levels."""

    def __init__(self, net: PreparedNet) -> None:
        super().__init__()
        self._net = net
        self._descent = [[_weights(layer, net.dtype) for layer in layers] for layers in net.descent]
        self._ascent = [_Step(step, net.dtype) for step in net.ascent]
        head = net.head.conv
        self._head = head.weight.to(net.dtype), None if head.bias is None else head.bias.to(net.dtype)
        weights = chain(*chain(*self._descent), *(step.weights() for step in self._ascent), self._head)
        for i, weight in enumerate(t for t in weights if t is not None):
            self.register_buffer(f"weight{i}", weight)  # Else the trace would have copies of its own.

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        checked = [*torch.aminmax(x)]
        x, skips = x.to(self._net.dtype), []
        for level, (first, second) in enumerate(self._descent):
            x = F.max_pool2d(x, 2, 2) if level else x
            x = _convolve(_convolve(x, *first), *second)
            checked += [x.sum()] if level >= LOW else []
            skips.append(x)
        skips.pop()
        for step in self._ascent:
            x = step(skips.pop(), x)
        return F.conv2d(x, *self._head), *checked


class _Step:
    """An upsampling and the two layers after it.

    The upsampling is a 1x1 convolution to four times the channels, whose pixels are moved to their places; the first
    layer adds up the convolutions of the skip and of the upsampled image, which nothing joins.
    """

    def __init__(self, step: StepUp, dtype: torch.dtype) -> None:
        self.step, self._second = step, _weights(step.second, dtype)
        self._up: tuple[Tensor, Tensor | None] | None = None
        if step.by != MODULE:
            taps, shift = step.up.weight.to(dtype), step.up.bias
            taps = taps.permute(2, 3, 1, 0).reshape(-1, taps.shape[0], 1, 1).contiguous()
            self._up = taps, None if shift is None else shift.to(dtype).repeat(4)
        # Sizes are found here: while it is traced, even those of a constant would be asked for at every call.
        n, _, h, w = step.low.shape
        c = 0 if self._up is None else self._up[0].shape[0] // 4
        # [N, h, w, 2, 2 C] of channels_last to [N, h, 2, w, 2 C], in as few views as can be.
        self._rows = [n, h, 2, w, 2 * c], [4 * c * h * w, 4 * c * w, 2 * c, 4 * c, 1]
        self._doubled = [n, c, 2 * h, 2 * w], _strides(c, 2 * h, 2 * w)
        up = self._upsampled(torch.zeros(step.low.shape, dtype=dtype, device="cpu"))
        self._padding = padding_to(up, step.first.images[0])
        weight, self._bias = _weights(step.first, dtype)
        parts = weight.split([weight.shape[1] - up.shape[1], up.shape[1]], dim=1)
        self._of_skip, self._of_up = (part.contiguous() for part in parts)

    def weights(self) -> list[Tensor | None]:
        """Return all that is made of the parameters."""
        return [*(self._up or ()), self._of_skip, self._of_up, self._bias, *self._second]

    def __call__(self, skip: Tensor, low: Tensor) -> Tensor:
        y = F.conv2d(skip, self._of_skip, self._bias, padding=1)
        up = self._upsampled(low)
        up = F.pad(up, self._padding) if any(self._padding) else up
        return _convolve(F.relu(F.conv2d(up, self._of_up, padding=1) + y), *self._second)

    def _upsampled(self, low: Tensor) -> Tensor:
        if self._up is None:
            return self.step.by_module(low)
        y = F.conv2d(low, *self._up).contiguous(memory_format=torch.channels_last)
        return y.as_strided(*self._rows).contiguous().as_strided(*self._doubled)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.relu(F.conv2d(x, weight, bias, padding=1))


def _weights(layer: Layer, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    weight, bias = layer.folded()
    return weight.to(dtype).contiguous(), None if bias is None else bias.to(dtype)


def _strides(c: int, h: int, w: int) -> list[int]:
    return [c * h * w, 1, c * w, c]
