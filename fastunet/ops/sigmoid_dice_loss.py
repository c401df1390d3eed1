"""sigmoid_dice_loss: arithmetic on the few numbers of segmentation_sums."""

from __future__ import annotations

from torch import Tensor

from fastunet import checks
from fastunet.ops.segmentation_sums import segmentation_sums

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
    """Compute 1 - (2 sum(p*t) + smooth) / (sum(p) + sum(t) + smooth), p = sigmoid(logits) (Milletari et al. 2016).

    logits and target [N, C, H, W]; target holds 0 and 1, or probabilities. The sums run over the pixels of each image
    and channel, of each channel if batch; squared takes p^2 and t^2 in the denominator. They are float32 (float64 for
    float64 logits) whatever the dtype of the logits, and so is the loss: reduced to a scalar by "mean" or "sum", or
    with "none" [N, C] ([C] if batch). One pass over logits and target forward, one backward.
    """
    checks.check_choice(f"{NAME}: reduction", reduction, REDUCTIONS)
    checks.check_activation(NAME, logits=logits)
    checks.check_shape(NAME, "target", target, logits.shape)
    checks.check_device(NAME, logits, target=target)
    sums = segmentation_sums(logits, target, squared=squared)
    intersection, predicted, actual = sums.sum(1) if batch else sums
    loss = 1 - (2 * intersection + smooth) / (predicted + actual + smooth)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()
