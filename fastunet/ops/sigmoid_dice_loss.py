"""sigmoid_dice_loss, on one registered op: fastunet::sigmoid_dice_loss_sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastunet import checks
from fastunet.ops.registration import below_autograd, define, none_like

NAME = "sigmoid_dice_loss"
REDUCTIONS = ("mean", "sum", "none")


def sigmoid_dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    smooth: float = 1.0,
    squared: bool = False,
    batch: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """1 - (2 sum(p*t) + smooth) / (sum(p) + sum(t) + smooth), p = sigmoid(logits) (Milletari et al. 2016).

    logits and target [N, C, H, W]; target holds 0 and 1, or probabilities. The sums run over the pixels of each image
    and channel, of each channel if batch; squared takes p^2 and t^2 in the denominator. They are float32 (float64 for
    float64 logits) whatever the dtype of the logits, and so is the loss: reduced to a scalar by "mean" or "sum", or
    with "none" [N, C] ([C] if batch). One pass over logits and target forward, one backward.
    """
    if reduction not in REDUCTIONS:
        raise checks.ConfigError(f"{NAME}: reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    sums = sigmoid_dice_sums(logits, target, squared=squared)
    intersection, predicted, actual = sums.sum(1) if batch else sums
    loss = 1 - (2 * intersection + smooth) / (predicted + actual + smooth)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def sigmoid_dice_sums(logits: Tensor, target: Tensor, *, squared: bool = False) -> Tensor:
    """[3, N, C]: the sums over pixels of p*t, of p (p^2 if squared) and of t (t^2), p = sigmoid(logits) [N, C,
    H, W].
    """
    checks.check_activation(NAME, logits=logits)
    checks.check_shape(NAME, "target", target, logits.shape)
    if target.device != logits.device:
        raise checks.DeviceError(f"{NAME}: target: expected device {logits.device} (the logits'), got {target.device}")
    return torch.ops.fastunet.sigmoid_dice_loss_sums(logits, target, squared)


def _sums_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _forward(logits: Tensor, target: Tensor, squared: bool) -> Tensor:
    p, t = logits.to(_sums_dtype(logits)).sigmoid(), target.to(_sums_dtype(logits))
    terms = (p * t, p * p, t * t) if squared else (p * t, p, t)
    return torch.stack([term.sum((2, 3)) for term in terms])


def _forward_fake(logits: Tensor, target: Tensor, squared: bool) -> Tensor:
    return logits.new_empty(3, *logits.shape[:2], dtype=_sums_dtype(logits))


def _backward(grad: Tensor, logits: Tensor, target: Tensor, squared: bool, mask: list[bool]) -> tuple[Tensor, Tensor]:
    """Gradients of logits and target: grad [3, N, C] weighs each pixel's p*t, p and t."""
    p, t = logits.to(grad.dtype).sigmoid(), target.to(grad.dtype)
    of_product, of_p, of_t = grad[..., None, None]
    grad_logits, grad_target = none_like(logits), none_like(logits)
    if mask[0]:
        grad_logits = ((of_product * t + of_p * (2 * p if squared else 1)) * p * (1 - p)).to(logits.dtype)
        grad_logits = torch.empty_like(logits).copy_(grad_logits)
    if mask[1]:
        grad_target = torch.empty_like(target).copy_(of_product * p + of_t * (2 * t if squared else 1))
    return grad_logits, grad_target


def _backward_fake(
    grad: Tensor, logits: Tensor, target: Tensor, squared: bool, mask: list[bool]
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(logits) if mask[0] else none_like(logits),
        torch.empty_like(target) if mask[1] else none_like(logits),
    )


class SigmoidDiceSums(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, squared: bool) -> Tensor:
        ctx.save_for_backward(logits, target)
        ctx.squared = squared
        return below_autograd(_op, logits, target, squared)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask = list(ctx.needs_input_grad[:2])
        grads = _backward_op(grad, *ctx.saved_tensors, ctx.squared, mask)
        return *(g if wanted else None for g, wanted in zip(grads, mask, strict=True)), None


_op = define(
    f"{NAME}_sums(Tensor logits, Tensor target, bool squared) -> Tensor",
    implementation=_forward,
    fake=_forward_fake,
    autograd=SigmoidDiceSums,
)
_backward_op = define(
    f"{NAME}_sums_backward(Tensor grad, Tensor logits, Tensor target, bool squared, bool[] mask) -> (Tensor, Tensor)",
    implementation=_backward,
    fake=_backward_fake,
)
