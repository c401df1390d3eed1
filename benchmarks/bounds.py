"""Results with bounds: a float64 value, and how far from it a correct float32 computation of it may lie.

A `Bounded` goes through the steps of an op as the op itself does. Each step adds the roundings of its own, and carries
on what came in: a product of a and b is off by |a| eb + |b| ea + ea eb, a sum of K terms by the sum of their errors and
6 sqrt(K) roundings (`fastunet.testing` has the reasons). Where a step decides (an activation's sign, a pool's winner)
and the bounds leave the decision open, what depends on it is part of the error. Bounds are wide where steps follow each
other, and hold for every order of summation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.testing import UNIT_ROUNDOFF, conv_tolerance

_U = UNIT_ROUNDOFF[torch.float32]
# Roundings that a sum has beside those that grow with its length: partial sums of tiles, splits and lanes are merged.
_MERGING = 16
# Relative error of float32 exp, reciprocal and reciprocal root, in units of _U: two units in the last place, and spare.
_SPECIAL = 8


@dataclass(frozen=True)
class Bounded:
    """value and error, float64 tensors of one shape."""

    value: Tensor
    error: Tensor

    @staticmethod
    def exact(t: Tensor) -> Bounded:
        """t as it is."""
        return Bounded(t.double(), torch.zeros_like(t, dtype=torch.float64))

    @property
    def size(self) -> Tensor:
        """The largest magnitude the computed number may have."""
        return self.value.abs() + self.error

    def rounded(self, roundings: float = 1) -> Bounded:
        """After so many float32 roundings of its own size."""
        return Bounded(self.value, self.error + roundings * _U * self.size)

    def stored(self, dtype: torch.dtype) -> Bounded:
        """After rounding to dtype."""
        underflow = 2.0**-25 if dtype == torch.float16 else 0.0
        return Bounded(self.value, self.error + UNIT_ROUNDOFF[dtype] * self.size + underflow)

    def __add__(self, other: Bounded) -> Bounded:
        return Bounded(self.value + other.value, self.error + other.error).rounded()

    def __sub__(self, other: Bounded) -> Bounded:
        return Bounded(self.value - other.value, self.error + other.error).rounded()

    def __mul__(self, other: Bounded) -> Bounded:
        error = self.value.abs() * other.error + self.error * other.size
        return Bounded(self.value * other.value, error).rounded()

    def __truediv__(self, other: Bounded) -> Bounded:
        quotient = self.value / other.value
        # Of a divisor that may be zero nothing is known.
        least = (other.value.abs() - other.error).clamp(min=0)
        return Bounded(quotient, (self.error + quotient.abs() * other.error) / least).rounded(_SPECIAL)

    def __getitem__(self, index: int | slice | tuple) -> Bounded:
        return Bounded(self.value[index], self.error[index])

    def scaled(self, factor: float) -> Bounded:
        """Times a number without error, such as one over a count."""
        return Bounded(self.value * factor, self.error * abs(factor)).rounded()

    def sum(self, dims: Sequence[int], *, keepdim: bool = False) -> Bounded:
        """Over dims, in any order."""
        terms = math.prod(self.value.shape[d] for d in dims)
        total = self.value.sum([*dims], keepdim=keepdim)
        own = (6 * math.sqrt(terms) + _MERGING) * _U * self.size.sum([*dims], keepdim=keepdim)
        return Bounded(total, self.error.sum([*dims], keepdim=keepdim) + own)

    def inverse_root(self, eps: float) -> Bounded:
        """1 / sqrt(self + eps) of a variance, which is never negative."""
        value = (self.value + eps).rsqrt()
        largest = ((self.value - self.error).clamp(min=0) + eps).rsqrt()
        return Bounded(value, largest - value).rounded(_SPECIAL)

    def sigmoid(self) -> Bounded:
        """Its slope is 1/4 at most; exp's argument has a rounding as well."""
        value = self.value.sigmoid()
        return Bounded(value, self.error / 4 + (self.size + _SPECIAL) * _U * value).rounded(_SPECIAL)

    def softmax(self) -> Bounded:
        """Over the channels. A logit that is off by e moves each log-probability by 2 e at most."""
        value = self.value.softmax(1)
        off = 2 * self.error.amax(1, keepdim=True)
        distance = self.value.amax(1, keepdim=True) - self.value
        own = (3 * distance.amax(1, keepdim=True) + 6 * math.sqrt(value.shape[1]) + 2 * _SPECIAL) * _U
        return Bounded(value, value * torch.expm1(off + own))

    def activate(self, slope: float | None) -> Bounded:
        """No activation (None), ReLU (0) or LeakyReLU: it magnifies no error, unless its slope is above 1."""
        if slope is None:
            return self
        return Bounded(torch.where(self.value <= 0, self.value * slope, self.value), self.error * max(1.0, slope))

    def pool(self) -> Bounded:
        """The maxima of 2x2 windows: a maximum is off by no more than the worst of its window."""
        return Bounded(F.max_pool2d(self.value, 2), F.max_pool2d(self.error, 2))


def join(*parts: Bounded) -> Bounded:
    """Side by side along the channels."""
    return Bounded(torch.cat([p.value for p in parts], 1), torch.cat([p.error for p in parts], 1))


def bilinear(
    product: Callable[[Tensor, Tensor], Tensor],
    a: Bounded,
    b: Bounded,
    terms: int,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    allow_tf32: bool = False,
) -> Bounded:
    """product(a, b), sums of `terms` products each, plus a bias [C], stored as dtype."""
    value, magnitude = product(a.value, b.value), product(a.size, b.size)
    if bias is not None:
        value, magnitude = value + bias.double()[:, None, None], magnitude + bias.double().abs()[:, None, None]
    error = conv_tolerance(value, magnitude, terms + 1, dtype, allow_tf32=allow_tf32)
    carried = torch.zeros_like(value)
    if bool(a.error.any()):
        carried += product(a.error, b.size)
    if bool(b.error.any()):
        carried += product(a.value.abs(), b.error)
    return Bounded(value, error + (1 + UNIT_ROUNDOFF[dtype]) * carried)


def activation_grad(grad: Bounded, before: Bounded, slope: float | None) -> Bounded:
    """The gradient of what went into the activation, `before`; open where that may have either sign."""
    if slope is None:
        return grad
    passed = torch.where(before.value > 0, 1.0, slope)
    is_open = (before.error > 0) & (before.value.abs() <= before.error)
    error = grad.error * passed + torch.where(is_open, abs(1 - slope) * grad.size, 0.0)
    result = Bounded(grad.value * passed, error)
    return result.rounded() if slope else result


def pool_grad(grad: Tensor, pooled_from: Bounded) -> Bounded:
    """The gradient of max_pool2x2's input; open in windows where the bounds leave more than one winner."""
    leaf = pooled_from.value.detach().clone().requires_grad_()
    (value,) = torch.autograd.grad(F.max_pool2d(leaf, 2), leaf, grad.double())
    height, width = (2 * size for size in grad.shape[2:])
    window = (..., slice(height), slice(width))
    low, high = pooled_from.value - pooled_from.error, pooled_from.value + pooled_from.error
    contenders = (high[window] >= _spread(F.max_pool2d(low, 2))).double()
    # Without an error there is no doubt: of equal values the first wins.
    doubted = (4 * F.avg_pool2d(contenders, 2) > 1.5) & (F.max_pool2d(pooled_from.error, 2) > 0)
    error = torch.zeros_like(value)
    error[window] = contenders * _spread(doubted.double() * grad.double().abs())
    return Bounded(value, error)


def _spread(windows: Tensor) -> Tensor:
    """Each value four times, over its 2x2 window."""
    return windows.repeat_interleave(2, 2).repeat_interleave(2, 3)
