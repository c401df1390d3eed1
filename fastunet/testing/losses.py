"""What the sums of the segmentation losses and their gradients are to be, in float64.

The steps are those of float32 arithmetic, in which exp(y) errs by 2|y| + 4 units of u = 2^-24, log and a quotient by 4,
other operations by 1; below 2^-126, where float32 has no full precision, each term may be lost. Both functions are of
logits, targets and masks [N, C, H, W], as fastunet.ops.segmentation_sums takes them; targets and masks lie between 0
and 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .bounds import Expected, Operand
from .budget import FP32_SMALLEST


def _activated(x: Tensor, softmax: bool) -> tuple[Expected, Expected, list[Expected]]:
    """Return p, 1 - p, and what each entropy weighs: -log p and, for sigmoid, -log(1 - p).

    log(1 + exp(-|x|)) errs by the 2|x| + 4 of its exponential, and by 4 units of each of the two parts of
    log(r) + (e - (r - 1)) / r, r the rounded 1 + e, whose sizes add up to at most three times the result; the addition
    to max(x, 0) by 1. A softmax's -log p = log(sum) + |z|, z = x - max(x), errs by what the sum does.
    """
    logits = Expected.exact(x)
    if softmax:
        p, minus_log = logits.softmax(), -x.double().log_softmax(1)
        distance = x.double().amax(1, keepdim=True) - x.double()
        own = Expected.softmax_sum_error(p.value, distance)
        return p, Expected.exact(torch.ones_like(p.value)) - p, [Expected(minus_log, own).rounded(4)]
    logs = [Expected.exact(-F.logsigmoid(z)).rounded(4 * z.abs() + 18) for z in (x.double(), -x.double())]
    return logits.sigmoid(two_sided=True), Expected.exact(-x).sigmoid(two_sided=True), logs


def _target_and_mask(logits: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Expected, Expected]:
    """Return both, [N, C, H, W], indices one-hot, and [N, 1, H, W]. An index that is no class has no one."""
    if target.shape != logits.shape:
        target = target.long() == torch.arange(logits.shape[1], device=target.device)[:, None, None]
    return Expected.exact(target), Expected.exact(torch.ones_like(logits[:, :1]) if mask is None else mask)


def segmentation_sums_expected(
    logits: Tensor, target: Tensor, mask: Tensor | None, *, softmax: bool, squared: bool, entropy: bool
) -> Expected:
    """fastunet.ops.segmentation_sums, stored as float32."""
    t, m = _target_and_mask(logits, target, mask)
    p, _, logs = _activated(logits, softmax)
    pm, tm = p * m, t * m
    rows = [pm * tm, pm * pm if squared else pm, tm * tm if squared else tm]
    if entropy:
        one = Expected.exact(torch.ones_like(p.value))
        rows += [
            (weight * log).where(weight.value != 0) for weight, log in zip((tm, (one - t) * m), logs, strict=False)
        ]
    sums = [row.sum((2, 3)) for row in rows]
    lost = logits.shape[2] * logits.shape[3] * FP32_SMALLEST
    value, error = (torch.stack([getattr(row, part) for row in sums]) for part in ("value", "tolerance"))
    return Expected(value, error + lost).stored(torch.float32)


def segmentation_sums_grad_expected(
    grad: Operand, logits: Tensor, target: Tensor, mask: Tensor | None, *, softmax: bool, squared: bool
) -> Expected:
    """Return the gradient of the logits from that of the sums, grad [3, N, C] or with the entropies' rows.

    p (1 - p) dp for sigmoid, p dp - p sum(p dp) over the channels for softmax, dp the gradient by p; of the entropies
    -(1 - p) of the positive's weight and p of the negative's, or, for softmax, p sum(weights) - weight.
    """
    t, m = _target_and_mask(logits, target, mask)
    p, rest, _ = _activated(logits, softmax)
    of_overlap, of_predicted, _, *of_entropies = (Expected.of(grad)[row, ..., None, None] for row in range(len(grad)))
    dp = (
        of_overlap * t * m * m + (of_predicted * p * m * m).scaled(2)
        if squared
        else (of_overlap * t * m + of_predicted) * m
    )
    weights = [
        of * of_target * m for of, of_target in zip(of_entropies, (t, Expected.exact(1 - t.value)), strict=False)
    ]
    if softmax:
        result = p * dp - p * (p * dp).sum((1,), keepdim=True)
        if weights:
            result = result + (p * weights[0].sum((1,), keepdim=True) - weights[0])
    else:
        result = p * rest * dp
        if weights:
            result = result - rest * weights[0]
        if len(weights) > 1:
            result = result + p * weights[1]
    lost = FP32_SMALLEST * Expected.of(grad).size.sum((0, 2))[:, None, None, None]
    return Expected(result.value, result.tolerance + lost).stored(logits.dtype)
