"""Dice losses with the arguments, defaults and values of MONAI's `DiceLoss`, summed in fp32 whatever the input dtype.

Everything that touches pixels is in `ops.segmentation_sums`, one pass over logits and target, or in `_dice_sums` where
that has no such form; both return a few sums per image and channel, and the loss is arithmetic on those numbers.

Source: Milletari et al. 2016, V-Net (https://arxiv.org/abs/1606.04797); soft labels: Wang et al. 2023, Dice Semimetric
Losses (https://arxiv.org/abs/2303.16296).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import checks, dispatch
from .checks import ConfigError, ShapeError
from .ops.segmentation_sums import segmentation_sums

Activation = Literal["none", "sigmoid", "softmax"]
Weight = Sequence[float] | float | Tensor
REDUCTIONS = ("mean", "sum", "none")


def _dice_sums(probability: Tensor, target: Tensor, mask: Tensor | None, *, squared: bool, soft_label: bool) -> Tensor:
    """Sum overlap, prediction and truth over the pixels of each image and channel, [3, N, C].

    With p the probability and t the target, both zero where the mask is:

        plain        sum(p*t),                      sum(p),    sum(t)
        soft_label   sum((|p| + |t| - |p-t|) / 2),  sum(|p|),  sum(|t|)
        squared      sum(p*t),                      sum(p*p),  sum(t*t)      (soft labels change nothing)
    """
    target = target.to(probability.dtype)
    if mask is not None:
        probability, target = probability * mask, target * mask
    if squared:
        terms = (probability * target, probability.square(), target.square())
    elif soft_label:
        size_p, size_t = probability.abs(), target.abs()
        terms = ((size_p + size_t - (probability - target).abs()) / 2, size_p, size_t)
    else:
        terms = (probability * target, probability, target)
    return torch.stack([term.flatten(2).sum(2) for term in terms])


class DiceLoss(nn.Module):
    """1 - Dice (or 1 - Jaccard) per image and class, then reduced; MONAI 1.6's arguments, defaults and values.

    Args:
        include_background: False leaves channel 0 out.
        to_onehot_y: the target holds class indices [N, 1, *spatial]; one with the input's channels is taken as it is.
        sigmoid, softmax, other_act: what turns the input into probabilities; at most one of the three.
        squared_pred: squares in the denominator.
        jaccard: Jaccard (IoU) instead of Dice.
        reduction: "mean" or "sum" over the values, or "none".
        smooth_nr, smooth_dr: added to numerator and denominator, so that an empty mask stays finite.
        batch: add up the pixels of all images before dividing.
        weight: factor >= 0 for all classes, or one per class (without channel 0 if `include_background` is False);
            without effect on a single class, as in MONAI.
        soft_label: the target holds values between 0 and 1, for which the plain product would not be least at
            input = target.
        ignore_index: class or label whose pixels do not count. A one-hot target marks a label outside its classes by
            zeros in every channel.
        across_ranks: take the images of all ranks of torch.distributed for one batch, of which each rank has as many:
            every rank gets the same loss, and its share of the gradient times the number of ranks, which
            DistributedDataParallel averages.

    Raises:
        ConfigError: options that contradict each other or lie outside their range.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Weight | None = None,
        soft_label: bool = False,
        ignore_index: int | None = None,
        across_ranks: bool = False,
    ) -> None:
        super().__init__()
        if other_act is not None and not callable(other_act):
            raise TypeError(f"other_act: expected None or a callable, got {type(other_act).__name__}")
        if sigmoid + softmax + (other_act is not None) > 1:
            raise ConfigError("expected at most one of sigmoid=True, softmax=True and other_act, got more than one")
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.activation: Activation = "sigmoid" if sigmoid else "softmax" if softmax else "none"
        self.other_act = other_act
        self.squared_pred = squared_pred
        self.jaccard = jaccard
        self.reduction = checks.check_choice("reduction", reduction, REDUCTIONS)
        self.smooth_nr = smooth_nr
        self.smooth_dr = smooth_dr
        self.batch = batch
        self.soft_label = soft_label
        self.ignore_index = ignore_index
        self.across_ranks = across_ranks
        self.register_buffer("class_weight", checks.check_weights("weight", weight))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the loss in fp32 (float64 for float64 input).

        Args:
            input: logits or probabilities [N, C, *spatial], any float dtype.
            target: [N, C, *spatial]; [N, 1, *spatial] of class indices with `to_onehot_y`.

        Returns:
            A scalar; with reduction "none" [N, C, 1, ...] (without the background's channel if it is excluded), or
            [C, 1, ...] with `batch`: MONAI's shapes.

        Raises:
            ShapeError: input and target differ in shape.
            DtypeError: the input is not floating point.
        """
        return self._reduce(self._sums(input, target), input.dim() - 2)

    def _sums(self, input: Tensor, target: Tensor, *, entropy: bool = False) -> Tensor:
        """Check both, and sum over the pixels: [3, N, C], with `entropy` the rows of `segmentation_sums` below them.

        N are the images of this rank, or of all.
        """
        sums = self._sums_of_rank(input, target, entropy=entropy)
        return _of_all_ranks(sums) if self.across_ranks else sums

    def _sums_of_rank(self, input: Tensor, target: Tensor, *, entropy: bool) -> Tensor:
        checks.check_images("input", input)
        if target.dim() != input.dim():
            raise ShapeError(
                f"target: expected {input.dim()} dimensions as the input's, got shape {tuple(target.shape)}"
            )
        channels = input.shape[1]
        activation = self.activation
        if channels == 1:
            unused = {
                "softmax=True": activation == "softmax",
                "to_onehot_y=True": self.to_onehot_y,
                "include_background=False": not self.include_background,
            }
            for option in (name for name, given in unused.items() if given):
                warnings.warn(f"{option} has no meaning for one channel and is ignored", stacklevel=3)
            activation = "none" if activation == "softmax" else activation
        one_hot = self.to_onehot_y and target.shape[1] == 1 < channels
        expected = (len(input), 1 if one_hot else channels, *input.shape[2:])
        if tuple(target.shape) != expected:
            raise ShapeError(f"target: expected shape {expected} as the input's, got {tuple(target.shape)}")
        mask, squared = _ignore_mask(target, self.ignore_index), self.squared_pred
        if activation != "none" and (squared or not self.soft_label):
            return _fused_sums(input, target, mask, activation, squared=squared, entropy=entropy)
        probability = _at_least_fp32(input)
        if self.other_act is not None:
            probability = self.other_act(probability)
        elif activation != "none":
            probability = probability.sigmoid() if activation == "sigmoid" else probability.softmax(1)
        values = target
        if one_hot:  # One that does not count gets class 0. In place `scatter` would be no batch for vmap.
            index = target.long() if mask is None else target.long().masked_fill(~mask, 0)
            values = torch.zeros(input.shape, device=target.device).scatter(1, index, 1.0)
        sums = _dice_sums(_at_least_fp32(probability), values, mask, squared=squared, soft_label=self.soft_label)
        if not entropy:
            return sums
        return torch.cat([sums, _fused_sums(input, target, mask, activation, squared=False, entropy=True)[3:]])

    def _reduce(self, sums: Iterable[Tensor], spatial_dims: int) -> Tensor:
        """Turn three sums [N, C] into the loss."""
        overlap, predicted, true = map(self._of_classes, sums)
        union = 2 * (predicted + true - overlap) if self.jaccard else predicted + true
        loss = 1 - (2 * overlap + self.smooth_nr) / (union + self.smooth_dr)
        classes = loss.shape[-1]
        if self.class_weight is not None and classes > 1:
            if self.class_weight.dim() == 1 and len(self.class_weight) != classes:
                raise ConfigError(f"weight: expected {classes} values (one a class), got {len(self.class_weight)}")
            loss = loss * self.class_weight.to(loss)
        if self.reduction == "mean":
            return loss.mean()
        if self.reduction == "sum":
            return loss.sum()
        return loss.reshape(*loss.shape, *[1] * spatial_dims)

    def _of_classes(self, sums: Tensor) -> Tensor:
        """Return what of [N, C] the loss is made of."""
        if not self.include_background and sums.shape[1] > 1:
            sums = sums[:, 1:]
        return sums.sum(0) if self.batch else sums


class BCEDiceLoss(nn.Module):
    """Binary cross entropy with logits + Dice on their sigmoid, for any number of independent channels.

    Args:
        dice_weight, bce_weight: factors of the two terms.
        pos_weight: factor of the positive pixels in the cross entropy, a number or one per channel.
        reduction: "mean" or "sum", of both terms.
        weight: `DiceLoss`'s, for the Dice term only.
        ignore_index: as in `DiceLoss`; those pixels count in neither term. With several channels and an index that is
            none of them, pixels of zeros in every channel are the ignored ones.
        dice: `DiceLoss`'s other arguments; `include_background` concerns the Dice term only.
    """

    pos_weight: Tensor | None

    def __init__(
        self,
        *,
        dice_weight: float = 1.0,
        bce_weight: float = 1.0,
        pos_weight: Weight | None = None,
        reduction: str = "mean",
        weight: Weight | None = None,
        ignore_index: int | None = None,
        **dice: Any,
    ) -> None:
        super().__init__()
        self.reduction = checks.check_choice("reduction", reduction, REDUCTIONS[:2])
        self.dice = DiceLoss(sigmoid=True, reduction=reduction, weight=weight, ignore_index=ignore_index, **dice)
        self.dice_weight = dice_weight
        self.bce_weight = bce_weight
        self.register_buffer("pos_weight", checks.check_weights("pos_weight", pos_weight))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the loss, a scalar in fp32 (float64 for float64 input).

        Args:
            input: logits [N, C, *spatial], any float dtype.
            target: values from 0 to 1 in the same shape, any dtype.

        Raises:
            ShapeError: input and target differ in shape.
            DtypeError: the input is not floating point.
        """
        *sums, positive, negative = self.dice._sums(input, target, entropy=True)  # validates both
        dice = self.dice._reduce(sums, input.dim() - 2)
        return self.dice_weight * dice + self.bce_weight * self._cross_entropy(positive, negative, input, target)

    def _cross_entropy(self, positive: Tensor, negative: Tensor, input: Tensor, target: Tensor) -> Tensor:
        """`F.binary_cross_entropy_with_logits` from the sums over positive and negative pixels, [N, C] each."""
        if self.pos_weight is not None:
            if self.pos_weight.dim() == 1 and len(self.pos_weight) not in (1, input.shape[1]):
                raise ConfigError(
                    f"pos_weight: expected {input.shape[1]} values (one a channel), got {len(self.pos_weight)}"
                )
            positive = positive * self.pos_weight.to(positive)
        total = (positive + negative).sum()
        if self.reduction == "sum":
            return total
        mask = _ignore_mask(target, self.dice.ignore_index)
        if mask is None:
            return total / (positive.shape[0] * math.prod(input.shape[1:]))
        counted = mask.flatten(1).sum(1)
        counted = _of_all_ranks(counted[None, :, None]) if self.dice.across_ranks else counted
        return _safe_ratio(total, counted.sum() * input.shape[1])


class CEDiceLoss(nn.Module):
    """Cross entropy + Dice on the softmax, for classes of which each pixel has one; MONAI's `DiceCELoss` values.

    Args:
        lambda_dice, lambda_ce: factors of the two terms.
        reduction: "mean" or "sum", of both terms.
        weight: one factor >= 0 per class, in both terms (the Dice term drops the background's if it is excluded).
        ignore_index: label that counts in neither term; needs a target of class indices.
        dice: `DiceLoss`'s other arguments; `include_background` concerns the Dice term only.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        reduction: str = "mean",
        weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
        **dice: Any,
    ) -> None:
        super().__init__()
        self.reduction = checks.check_choice("reduction", reduction, REDUCTIONS[:2])
        self.register_buffer("class_weight", checks.check_weights("weight", weight))
        if self.class_weight is not None and self.class_weight.dim() != 1:
            raise ConfigError(f"weight: expected one value per class, got the single value {weight}")
        dice_weight = self.class_weight
        if dice_weight is not None and not dice.get("include_background", True):
            dice_weight = dice_weight[1:]
        self.dice = DiceLoss(
            softmax=True, to_onehot_y=True, reduction=reduction, weight=dice_weight, ignore_index=ignore_index, **dice
        )
        self.lambda_dice = lambda_dice
        self.lambda_ce = lambda_ce

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the loss, a scalar in fp32 (float64 for float64 input).

        Args:
            input: logits [N, C, *spatial] with C >= 2, any float dtype.
            target: class indices [N, *spatial] or [N, 1, *spatial], or probabilities (one-hot or soft) in the
                input's shape.

        Raises:
            ShapeError: one channel only, or shapes that do not match.
            DtypeError: the input is not floating point.
            ConfigError: `ignore_index` with a target of probabilities.
        """
        checks.check_images("input", input)
        if input.shape[1] < 2:
            raise ShapeError(f"input: expected at least 2 channels (BCEDiceLoss takes one), got {input.shape[1]}")
        if target.dim() == input.dim() - 1:
            target = target.unsqueeze(1)
        *sums, entropy = self.dice._sums(input, target, entropy=True)  # validates both
        if target.shape == input.shape and self.dice.ignore_index is not None:
            raise ConfigError("ignore_index: expected a target of class indices, got one of probabilities")
        dice = self.dice._reduce(sums, input.dim() - 2)
        return self.lambda_dice * dice + self.lambda_ce * self._cross_entropy(entropy, sums[2], input, target)

    def _cross_entropy(self, entropy: Tensor, true: Tensor, input: Tensor, target: Tensor) -> Tensor:
        """`F.cross_entropy` from sums [N, C]: a class's weight is the same for all its pixels."""
        weight = 1 if self.class_weight is None else self.class_weight.to(entropy)
        total = (entropy * weight).sum()
        if self.reduction == "sum":
            return total
        if target.shape == input.shape:  # Over probabilities, torch divides by the number of pixels, not by weights.
            return total * input.shape[1] / (entropy.shape[0] * math.prod(input.shape[1:]))
        count = (true * weight).sum()
        return total / count if self.dice.ignore_index is None else _safe_ratio(total, count)


def _of_all_ranks(sums: Tensor) -> Tensor:
    """Concatenate the images of all ranks, [..., N, C] to [..., ranks * N, C], for autograd too."""
    return sums if dispatch.ranks() == 1 else _Gather.apply(sums)


class _Gather(torch.autograd.Function):
    """Torch's own, of torch.distributed.nn, is deprecated without another in public."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor) -> Tensor:
        parts = [torch.empty_like(sums) for _ in range(dispatch.ranks())]
        torch.distributed.all_gather(parts, sums.contiguous())
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Add up what the loss of each rank, which is the same, says of this one's images."""
        grad = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(grad)
        return grad.chunk(dispatch.ranks(), dim=1)[torch.distributed.get_rank()]


def _fused_sums(
    input: Tensor, target: Tensor, mask: Tensor | None, activation: Activation, *, squared: bool, entropy: bool
) -> Tensor:
    """`segmentation_sums` of images with any number of spatial dimensions."""
    if input.dim() != 4:
        input, target = input.flatten(2).unsqueeze(3), target.flatten(2).unsqueeze(3)
        mask = None if mask is None else mask.flatten(2).unsqueeze(3)
    return segmentation_sums(input, target, mask, activation=activation, squared=squared, entropy=entropy)


def _at_least_fp32(input: Tensor) -> Tensor:
    """Widen fp16 and bf16: a sum over 512 x 512 pixels passes fp16's largest value, 65504."""
    return input if input.dtype == torch.float64 else input.float()


def _ignore_mask(target: Tensor, ignore_index: int | None) -> Tensor | None:
    """Mark the pixels that count by 1 or True, [N, 1, *spatial], a constant to autograd; None if all do."""
    if ignore_index is None:
        return None
    if target.shape[1] == 1:
        return _differs(target, ignore_index)
    if 0 <= ignore_index < target.shape[1]:
        return 1.0 - target[:, ignore_index : ignore_index + 1].detach().float()
    return target.sum(1, keepdim=True) > 0


def _differs(labels: Tensor, label: int) -> Tensor:
    """labels != label. torch would bring the label into their type, where it might be another one: 255 for -1."""
    dtype = labels.dtype
    if dtype.is_floating_point:
        return _at_least_fp32(labels) != label
    # Bools and numbers are compared as int64.
    if dtype == torch.bool or torch.iinfo(dtype).min <= label <= torch.iinfo(dtype).max:
        return labels != label
    return torch.ones_like(labels, dtype=torch.bool)


def _safe_ratio(total: Tensor, count: Tensor) -> Tensor:
    """Divide, but give the total (which is 0) where nothing counts."""
    return total / count.masked_fill(count == 0, 1)
