"""What follows the sum of a 3x3 convolution inside its kernel, in float32, before anything is written.

A tile of sums is [P, N], pixels by channels, or [N, P]: `AXIS` is the axis of the channels. Channel numbers n [N]
beyond COUT are padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from fastunet.kernels.layout import dense
from fastunet.kernels.tiles import IDENTITY, LEAKY_RELU, RELU, activate
from torch import Tensor

# Classes a fused head may have: each is a pass over the tile in registers.
HEAD_CLASSES = 8
E4M3 = torch.float8_e4m3fn
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_LARGEST = tl.constexpr(torch.finfo(E4M3).max)


# fmt: off
@triton.jit
def load_channels(ptr, n, COUT, AXIS: tl.constexpr):
    """One float32 value per channel, zero beyond COUT, shaped to broadcast over a tile."""
    return tl.expand_dims(tl.load(ptr + n, mask=n < COUT, other=0.0).to(tl.float32), 1 - AXIS)


@triton.jit
def finish_sums(
    acc, n, COUT, bias_ptr, mean_ptr, variance_ptr, gamma_ptr, eps, negative_slope,
    ACTIVATION: tl.constexpr, AXIS: tl.constexpr,
):
    """activation((acc - mean) * gamma / sqrt(variance + eps) + bias), without what is None.

    Not acc * scale + shift: that would cancel where the mean is far larger than the deviation.
    """
    if mean_ptr is not None:
        scale = 1.0 / tl.sqrt(load_channels(variance_ptr, n, COUT, AXIS) + eps)
        if gamma_ptr is not None:
            scale *= load_channels(gamma_ptr, n, COUT, AXIS)
        acc = (acc - load_channels(mean_ptr, n, COUT, AXIS)) * scale
    if bias_ptr is not None:
        acc += load_channels(bias_ptr, n, COUT, AXIS)
    return activate(acc, negative_slope, ACTIVATION)


@triton.jit
def scale_to_e4m3(v, scale_ptr):
    """v times the reciprocal of scale, held to e4m3's range; NaN stays. Both round to the nearest, so that other
    devices have the same values.
    """
    v = v * tl.div_rn(1.0, tl.load(scale_ptr))
    return tl.where(v > _LARGEST, _LARGEST, tl.where(v < -_LARGEST, -_LARGEST, v))


@triton.jit
def store_head(
    out_ptr, weight_ptr, bias_ptr, acc, n, COUT, pixels, inside,
    CLASSES: tl.constexpr, SIGMOID: tl.constexpr, AXIS: tl.constexpr,
):
    """out[p, j] = sigmoid(sum over n of acc[p, n] * weight[j, n] + bias[j]) of the pixels [P] that are inside."""
    # Zero weights beyond COUT do not undo what the sums have there: beside an infinite pixel, NaN.
    acc = tl.where(tl.expand_dims(n < COUT, 1 - AXIS), acc, 0.0)
    for j in tl.static_range(CLASSES):
        z = tl.sum(acc * load_channels(weight_ptr + j * COUT, n, COUT, AXIS), AXIS)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + j).to(tl.float32)
        if SIGMOID:
            z = 1.0 / (1.0 + tl.exp(-z))
        tl.store(out_ptr + pixels * CLASSES + j, z.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def round_in_pairs(v, DTYPE: tl.constexpr):
    """v in DTYPE, by instructions for two values. A cast rounds one by one what is not only stored."""
    if _INTERPRETED or DTYPE.primitive_bitwidth != 16:
        v = v.to(DTYPE)
    elif DTYPE == tl.bfloat16:
        v = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [v], DTYPE.value, is_pure=True, pack=2)
    else:
        v = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [v], DTYPE.value, is_pure=True, pack=2)
    return v


@triton.jit
def _mean_and_m2(v, inside, count, AXIS: tl.constexpr):
    """Mean and M2 of the `count` values v that are inside [P], or of all where that is None."""
    mean = tl.sum(v if inside is None else tl.where(inside, v, 0.0), 1 - AXIS) / count
    deviation = v - tl.expand_dims(mean, 1 - AXIS)
    if inside is not None:
        deviation = tl.where(inside, deviation, 0.0)
    return mean, tl.sum(deviation * deviation, 1 - AXIS)


@triton.jit
def store_statistics(
    count_ptr, partial_ptr, y, tile, tiles, n, COUT, inside, is_whole, first_block, AXIS: tl.constexpr
):
    """Number, mean and M2, the sum of squared deviations, of one tile's values y as they are stored.

    count [tiles]; partial [2, tiles, COUT]: means, then M2s. The mean comes first and M2 is taken about it, both from
    registers: the difference of two large sums would have nothing left of a small variance (Chan et al. 1983).
    is_whole: all pixels are inside, as most tiles' are, and nothing needs masks.
    """
    v = y.to(tl.float32)
    count = tl.sum(inside.to(tl.float32), 0)
    if is_whole:
        mean, m2 = _mean_and_m2(v, None, count, AXIS)
    else:
        mean, m2 = _mean_and_m2(v, tl.expand_dims(inside, AXIS), count, AXIS)
    at = partial_ptr + tile.to(tl.int64) * COUT + n
    tl.store(at, mean, mask=n < COUT)
    tl.store(at + tiles.to(tl.int64) * COUT, m2, mask=n < COUT)
    if first_block:
        tl.store(count_ptr + tile, count)
# fmt: on


def activation_code(negative_slope: float | None) -> int:
    """Return ACTIVATION for a negative slope: None is no activation, 0 ReLU, anything else LeakyReLU."""
    if negative_slope is None:
        return IDENTITY.value
    return LEAKY_RELU.value if negative_slope else RELU.value


def precision(dtype: torch.dtype, allow_tf32: bool) -> str:
    """Return PRECISION of tl.dot: only float32 inputs have a choice."""
    return "tf32" if allow_tf32 and dtype == torch.float32 else "ieee"


@dataclass(frozen=True)
class Normalisation:
    """Batch norm by given statistics: (v - mean) * gamma / sqrt(variance + eps), before the bias. All [Cout]."""

    mean: Tensor
    variance: Tensor
    gamma: Tensor | None
    eps: float


@dataclass(frozen=True)
class Head:
    """A 1x1 convolution of the result: weight [classes, Cout, 1, 1], bias [classes] or None, then sigmoid or nothing.

    classes are at most HEAD_CLASSES.
    """

    weight: Tensor
    bias: Tensor | None
    sigmoid: bool


@dataclass(frozen=True)
class Statistics:
    """Where a convolution leaves the partial statistics of its output, by tile: count [T], partial [2, T, Cout]."""

    count: Tensor
    partial: Tensor

    @classmethod
    def empty(cls, rows: int, channels: int, device: torch.device) -> Statistics:
        """Return room for so many rows."""
        count, partial = (
            torch.empty(shape, dtype=torch.float32, device=device) for shape in ((rows,), (2, rows, channels))
        )
        return cls(count, partial)


@dataclass(frozen=True)
class Epilogue:
    """What a convolution does with its sums and where it writes: what is None is left out.

    y [N, Cout, H, W], pooled [N, Cout, H // 2, W // 2] and probabilities [N, classes, H, W] (with head) are packed. y
    and pooled may be in e4m3, each divided by a scale, one float32: both in the descriptor variant, y in the pointer
    variant.
    """

    y: Tensor | None
    bias: Tensor | None = None
    norm: Normalisation | None = None
    negative_slope: float | None = None
    pooled: Tensor | None = None
    head: Head | None = None
    probabilities: Tensor | None = None
    statistics: Statistics | None = None
    y_scale: Tensor | None = None
    pooled_scale: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the kernels' arguments; of y and pooled, for those that take pointers."""
        norm, head, statistics = self.norm, self.head, self.statistics
        return {
            "y_ptr": self.y,
            "pooled_ptr": self.pooled,
            "bias_ptr": dense(self.bias),
            "mean_ptr": norm and norm.mean.contiguous(),
            "variance_ptr": norm and norm.variance.contiguous(),
            "gamma_ptr": norm and dense(norm.gamma),
            "eps": 0.0 if norm is None else norm.eps,
            "negative_slope": float(self.negative_slope or 0),
            "head_ptr": self.probabilities,
            "head_weight_ptr": head and head.weight.reshape(head.weight.shape[:2]).contiguous(),
            "head_bias_ptr": head and dense(head.bias),
            "count_ptr": statistics and statistics.count,
            "partial_ptr": statistics and statistics.partial,
            "y_scale_ptr": self.y_scale,
            "pooled_scale_ptr": self.pooled_scale,
            "ACTIVATION": activation_code(self.negative_slope),
            "CLASSES": 0 if head is None else head.weight.shape[0],
            "SIGMOID": head is not None and head.sigmoid,
        }
