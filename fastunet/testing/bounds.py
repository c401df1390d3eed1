"""Expected results: a float64 value, and how far from it a correct float32 computation of it may lie.

An `Expected` goes through the steps of an op as the op itself does. Each step adds its own roundings, and carries on
what came in: a product of a and b is off by |a| eb + |b| ea + ea eb, a sum of K terms by the sum of their errors and
6 sqrt(K) roundings (the package has the reasons). Where a step decides (an activation's sign, a pool's winner) and the
bounds leave the decision open, what depends on it is part of the error. Bounds are wide where steps follow each other,
and hold for every order of summation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .budget import FP32_SMALLEST, UNIT_ROUNDOFF, stored, sum_error

_U = UNIT_ROUNDOFF[torch.float32]
# Relative error of float32 division and reciprocal root, in units of _U: two units in the last place, and spare.
_SPECIAL = 8


@dataclass(frozen=True)
class Expected:
    """A float64 reference and, of the same shape, how far from it a correct result may lie. It unpacks into the two."""

    value: Tensor
    tolerance: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.value, self.tolerance))

    @staticmethod
    def exact(t: Tensor) -> Expected:
        """Take t as it is."""
        return Expected(t.double(), torch.zeros_like(t, dtype=torch.float64))

    @staticmethod
    def of(operand: Operand) -> Expected:
        """Take a tensor as it is, and an expected result as one."""
        return operand if isinstance(operand, Expected) else Expected.exact(operand)

    @property
    def size(self) -> Tensor:
        """Return the largest magnitude the computed number may have."""
        return self.value.abs() + self.tolerance

    def __len__(self) -> int:
        return len(self.value)

    def where(self, condition: Tensor) -> Expected:
        """Set to zero, without an error, where the condition is false."""
        return Expected(*(torch.where(condition, t, 0.0) for t in self))

    def rounded(self, roundings: float | Tensor = 1) -> Expected:
        """Round so many times to float32, each by its own size."""
        return Expected(self.value, self.tolerance + roundings * _U * self.size)

    def stored(self, dtype: torch.dtype) -> Expected:
        """Round to dtype."""
        return Expected(self.value, stored(self.value, self.tolerance, dtype))

    def __add__(self, other: Expected) -> Expected:
        return Expected(self.value + other.value, self.tolerance + other.tolerance).rounded()

    def __sub__(self, other: Expected) -> Expected:
        return Expected(self.value - other.value, self.tolerance + other.tolerance).rounded()

    def __mul__(self, other: Expected) -> Expected:
        error = self.value.abs() * other.tolerance + self.tolerance * other.size
        return Expected(self.value * other.value, error).rounded()

    def __truediv__(self, other: Expected) -> Expected:
        quotient = self.value / other.value
        # Of a divisor that may be zero nothing is known.
        least = (other.value.abs() - other.tolerance).clamp(min=0)
        return Expected(quotient, (self.tolerance + quotient.abs() * other.tolerance) / least).rounded(_SPECIAL)

    def __getitem__(self, index: int | slice | tuple) -> Expected:
        return Expected(self.value[index], self.tolerance[index])

    def scaled(self, factor: float) -> Expected:
        """Multiply by a number without error, such as one over a count."""
        return Expected(self.value * factor, self.tolerance * abs(factor)).rounded()

    def sum(self, dims: Sequence[int], *, keepdim: bool = False, merging: int = 0) -> Expected:
        """Sum over dims, in any order. merging: roundings beside those of additions, of partial results merged."""
        terms = math.prod(self.value.shape[d] for d in dims)
        total = self.value.sum([*dims], keepdim=keepdim)
        own = (6 * math.sqrt(terms) + merging) * _U * self.size.sum([*dims], keepdim=keepdim)
        return Expected(total, self.tolerance.sum([*dims], keepdim=keepdim) + own)

    def inverse_root(self, eps: float) -> Expected:
        """Compute 1 / sqrt(self + eps) of a variance, which is never negative."""
        value = (self.value + eps).rsqrt()
        largest = ((self.value - self.tolerance).clamp(min=0) + eps).rsqrt()
        return Expected(value, largest - value).rounded(_SPECIAL)

    def sigmoid(self, *, two_sided: bool = False) -> Expected:
        """Compute s = 1/(1 + exp(-z)) of logits z that are off by E; two_sided: exp(z)/(1 + exp(z)) below 0.

        With u the unit roundoff of float32: exp(t) is off by (2|t| + 4) u relatively, since exp2(t * log2(e)) rounds
        its constant and its product, and GPUs' exp2 is good to 2^-22. A division is good to 2 ulp, 4u. What is below
        2^-126 may be lost. The slope is s(1 - s), and within E of z at most exp(E) times that; exp(-z) weighs 1 - s in
        the sum, which is rounded once:
            error = E exp(E) s(1 - s) + s ((1 - s)(2|z| + 4) + 5) u + 2^-126
        Below 0 of two sides exp(z) weighs s in the sum beside the 1 that it has as a factor, and a product is rounded
        more: (1 + s)(2|z| + 4) + 6.
        """
        z, error = self
        value, other = z.sigmoid(), (-z).sigmoid()
        of_exp, others = other, torch.full_like(z, 5)
        if two_sided:
            of_exp, others = torch.where(z < 0, 1 + value, other), torch.where(z < 0, 6.0, others)
        own = value * (of_exp * (2 * z.abs() + 4) + others) * _U + FP32_SMALLEST
        return Expected(value, error * error.exp() * value * other + own)

    def softmax(self) -> Expected:
        """Compute p_k = exp(t_k) / sum of exp(t_j) over the channels, t = z - max(z), of logits z that are off by E.

        Errors d_j of the logits make it p_k exp(d_k) / sum of p_j exp(d_j), within a factor exp(E_k + A) of p_k for
        A = log(sum of p_j exp(E_j)). t_k is rounded too, so r_k = (3|t_k| + 4) u is exp(t_k)'s own error; C positive
        terms are summed, and a quotient errs by 4:
            error = p_k (exp(E_k + A) - 1 + r_k + sum of p_j r_j + (6 sqrt(C) + 4) u) + 2^-126
        """
        z, error = self
        value, distance = z.softmax(1), z.amax(1, keepdim=True) - z
        spread = error + (value * error.exp()).sum(1, keepdim=True).log()
        own = (3 * distance + 4 + 4) * _U + self.softmax_sum_error(value, distance)
        return Expected(value, value * (spread.expm1() + own) + FP32_SMALLEST)

    @staticmethod
    def softmax_sum_error(p: Tensor, distance: Tensor) -> Tensor:
        """Return the relative error of a softmax's sum of exponentials: the mean of theirs, and that of adding them up.

        p is the softmax, distance that of each logit from the largest.
        """
        of_terms = (p * (3 * distance + 4)).sum(1, keepdim=True)
        return (of_terms + 6 * math.sqrt(p.shape[1])) * _U

    def activate(self, slope: float | None) -> Expected:
        """Apply no activation (None), ReLU (0) or LeakyReLU: it magnifies no error, unless its slope is above 1."""
        if slope is None:
            return self
        value = torch.where(self.value <= 0, self.value * slope if slope else 0.0, self.value)
        return Expected(value, self.tolerance * max(1.0, slope))

    def pool(self) -> Expected:
        """Return the maxima of 2x2 windows: a maximum is off by no more than the worst of its window."""
        return Expected(F.max_pool2d(self.value, 2), F.max_pool2d(self.tolerance, 2))


# A tensor stands for itself, without an error.
Operand = Tensor | Expected


def join(*parts: Expected) -> Expected:
    """Concatenate along the channels."""
    return Expected(torch.cat([p.value for p in parts], 1), torch.cat([p.tolerance for p in parts], 1))


def bilinear(
    product: Callable[[Tensor, Tensor], Tensor],
    a: Operand,
    b: Operand,
    terms: int,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    is_stored: bool = True,
    **rounds: Any,
) -> Expected:
    """Compute product(a, b), sums of `terms` products each, plus a bias [C]; is_stored: as dtype, by default the
    tensors'. rounds: allow_tf32 and tensor_cores, as `sum_error` takes them.
    """
    if dtype is None:
        dtype = next(t.dtype for t in (a, b) if isinstance(t, Tensor))
    a, b = Expected.of(a), Expected.of(b)
    value, magnitude = product(a.value, b.value), product(a.size, b.size)
    if bias is not None:
        value, magnitude = value + bias.double()[:, None, None], magnitude + bias.double().abs()[:, None, None]
    error = sum_error(magnitude, terms + 1, dtype, **rounds)
    if bool(a.tolerance.any()):
        error = error + product(a.tolerance, b.size)
    if bool(b.tolerance.any()):
        error = error + product(a.value.abs(), b.tolerance)
    return Expected(value, error).stored(dtype) if is_stored else Expected(value, error)


def activation_grad(grad: Expected, before: Expected, slope: float | None) -> Expected:
    """Return the gradient of what went into the activation, `before`; open where that may have either sign."""
    if slope is None:
        return grad
    passed = torch.where(before.value <= 0, slope, 1.0)
    is_open = (before.tolerance > 0) & (before.value.abs() <= before.tolerance)
    error = grad.tolerance * passed + torch.where(is_open, abs(1 - slope) * grad.size, 0.0)
    result = Expected(grad.value * passed, error)
    return result.rounded() if slope else result


def pool_grad(grad: Tensor, pooled_from: Expected) -> Expected:
    """Return the gradient of max_pool2x2's input; open in windows where the bounds leave more than one winner."""
    leaf = pooled_from.value.detach().clone().requires_grad_()
    (value,) = torch.autograd.grad(F.max_pool2d(leaf, 2), leaf, grad.double())
    height, width = (2 * size for size in grad.shape[2:])
    window = (..., slice(height), slice(width))
    low, high = pooled_from.value - pooled_from.tolerance, pooled_from.value + pooled_from.tolerance
    contenders = (high[window] >= _spread(F.max_pool2d(low, 2))).double()
    # Without an error there is no doubt: of equal values the first wins.
    doubted = (4 * F.avg_pool2d(contenders, 2) > 1.5) & (F.max_pool2d(pooled_from.tolerance, 2) > 0)
    error = torch.zeros_like(value)
    error[window] = contenders * _spread(doubted.double() * grad.double().abs())
    return Expected(value, error)


def _spread(windows: Tensor) -> Tensor:
    """Return each value four times, over its 2x2 window."""
    return windows.repeat_interleave(2, 2).repeat_interleave(2, 3)
