"""What the sums of the segmentation losses and their gradients are to be, in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .bounds import Expected
from .budget import FP32_SMALLEST, UNIT_ROUNDOFF, stored


class _Activated(NamedTuple):
    """p, 1 - p, -log p and -log(1 - p) of logits in float64, the last None for softmax, and the errors of p and of
    both logarithms in units of u: see segmentation_sums_expected.
    """

    p: Tensor
    rest: Tensor
    logs: tuple[Tensor, Tensor | None]
    p_error: Tensor
    log_errors: tuple[Tensor, Tensor | None]


def _activated(x: Tensor, softmax: bool) -> _Activated:
    if not softmax:
        p, positive, negative = x.sigmoid(), -F.logsigmoid(x), -F.logsigmoid(-x)
        relative = 4 * x.abs() + 18
        return _Activated(
            p, (-x).sigmoid(), (positive, negative), relative * p, (relative * positive, relative * negative)
        )
    p, positive = x.softmax(1), -x.log_softmax(1)
    distance = x.amax(1, keepdim=True) - x
    of_total = 3 * (p * distance).sum(1, keepdim=True) + 6 * math.sqrt(x.shape[1]) + 4
    return _Activated(p, 1 - p, (positive, None), (3 * distance + of_total + 10) * p, (of_total + 4 * positive, None))


def _target_and_mask(logits: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both in float64: [N, C, H, W], indices one-hot, and [N, 1, H, W]. An index that is no class has no one."""
    t = target.double()
    if target.shape != logits.shape:
        t = (target.long() == torch.arange(logits.shape[1], device=target.device)[:, None, None]).double()
    return t, torch.ones_like(logits[:, :1], dtype=torch.float64) if mask is None else mask.double()


def segmentation_sums_expected(
    logits: Tensor, target: Tensor, mask: Tensor | None, *, softmax: bool, squared: bool, entropy: bool
) -> Expected:
    """fastunet.ops.segmentation_sums, stored as float32; target and mask lie between 0 and 1.

    The terms are rounded, and their errors add up, before the sum of K = H*W of them errs as every sum does. In units
    of u = 2^-24, for a float32 that is evaluated with these relative errors: exp(y) 2|y| + 4 (y and log2(e) are rounded
    and multiplied, 2^y is good to 2 units in the last place, and such a unit is up to 2u), a quotient 4, log 2, other
    operations 1:

    - sigmoid: e = exp(-|x|) errs by 2|x| + 4; 1 / (1 + e) by that times e/(1 + e), 1 and 4; e / (1 + e) by that, e's
      own error and 1: at most 4|x| + 14. log(1 + e) errs by that of e, and by 4 units of each of the two parts of
      log(r) + (e - (r - 1)) / r, r the rounded 1 + e, whose sizes add up to at most three times the result: 2|x| + 16;
      the addition to max(x, 0) 1. Both lie below 4|x| + 18.
    - softmax: z = x - max(x) errs by |z|, exp(z) so by 3|z| + 4, and their sum by the mean of this under p,
      R = 3 sum(p |z|) + 4, and by 6 sqrt(C) for the addition of C terms. The quotient errs by the two and 4, hence
      p by 3|z| + R + 6 sqrt(C) + 10. -log p = log(sum) + |z| is off by R + 6 sqrt(C), not relative to it, and by
      2, 1 and 1 units of itself.

    Products add one for each factor: at most 4. Below 2^-126, where float32 has no full precision, each term may be
    lost.
    """
    x = logits.double()
    t, m = _target_and_mask(logits, target, mask)
    a = _activated(x, softmax)
    pm, tm = a.p * m, t * m
    # Each term and its error in units of u.
    rows = [
        (pm * tm, (a.p_error + 4 * a.p) * m * tm),
        (pm * pm, (2 * a.p_error + 4 * a.p) * pm * m) if squared else (pm, (a.p_error + a.p) * m),
        (tm * tm, 3 * tm * tm) if squared else (tm, tm),
    ]
    if entropy:
        for weight, value, error in zip((tm, m * (1 - t)), a.logs, a.log_errors, strict=True):
            if value is not None and error is not None:
                rows.append((torch.where(weight == 0, 0.0, weight * value), weight * (error + 4 * value)))
    terms, errors = (torch.stack([row[i] for row in rows]).sum((3, 4)) for i in range(2))
    pixels = logits.shape[2] * logits.shape[3]
    u = UNIT_ROUNDOFF[torch.float32]
    error = u * (errors + 6 * math.sqrt(pixels) * terms) + pixels * FP32_SMALLEST
    return Expected(terms, stored(terms, error, torch.float32))


def segmentation_sums_grad_expected(
    grad: Tensor, logits: Tensor, target: Tensor, mask: Tensor | None, *, softmax: bool, squared: bool
) -> Expected:
    """The gradient of the logits from that of the sums, grad [3, N, C] or with the entropies' rows.

    The value is float64 autograd's. Its error, with the notation and the errors of segmentation_sums_expected and
    D = |grad0| m^2 t + |grad1| (m or 2 m^2 p) the size of what is multiplied with p's own derivative: three factors
    for sigmoid, p (1 - p) and p once more in D, and 8 roundings; for softmax each p (dp - sum(dp p)) has D's, p's and
    the sum's, whose C terms err by 6 sqrt(C) more. The entropies' parts have one such factor each.
    """
    leaf = logits.detach().double().requires_grad_()
    t, m = _target_and_mask(logits, target, mask)
    g = grad.double()[..., None, None]
    # The sigmoid's own derivative, p (1 - p), is not good to float32 where p is next to 1.
    pm, tm = (leaf.softmax(1) if softmax else F.logsigmoid(leaf).exp()) * m, t * m
    of_sums = g[0] * pm * tm + g[1] * (pm * pm if squared else pm)
    if len(grad) > 3:
        of_sums = of_sums - g[3] * tm * (leaf.log_softmax(1) if softmax else F.logsigmoid(leaf))
    if len(grad) > 4:
        of_sums = of_sums - g[4] * m * (1 - t) * F.logsigmoid(-leaf)
    (value,) = torch.autograd.grad(of_sums.sum(), leaf)

    a = _activated(leaf.detach(), softmax)
    g = g.abs()
    size = g[0] * m * tm + g[1] * (2 * m * m * a.p if squared else m)
    positive = g[3] * tm if len(grad) > 3 else torch.zeros_like(size)
    if softmax:
        root = 6 * math.sqrt(logits.shape[1])
        total, of_positive = (size * a.p).sum(1, keepdim=True), positive.sum(1, keepdim=True)
        of_total = (size * (2 * a.p_error + 8 * a.p)).sum(1, keepdim=True) + root * total
        error = size * (2 * a.p_error + 10 * a.p) + a.p_error * total + a.p * (of_total + 4 * total)
        error += 4 * positive + (a.p_error + (6 + root) * a.p) * of_positive
    else:
        relative = 4 * leaf.detach().abs() + 18
        error = size * a.p * a.rest * (3 * relative + 11) + positive * a.rest * (relative + 9)
        if len(grad) > 4:
            error += g[4] * m * (1 - t) * a.p * (relative + 9)
    smallest = FP32_SMALLEST * g.sum((0, 2), keepdim=True)[0]
    return Expected(value, stored(value, UNIT_ROUNDOFF[torch.float32] * error + smallest, logits.dtype))
