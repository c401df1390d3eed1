"""What a training minimises, and the learning rate with which it does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastunet.checks import ConfigError
from fastunet.data import DataSummary, Pair
from fastunet.data.labels import IGNORED
from fastunet.data.morphology import border_weights
from fastunet.losses import BCEDiceLoss, CEDiceLoss

WARMUP = 0.03  # of the run


class TrainingLoss(nn.Module):
    """Cross entropy + Dice over all classes, background too: foreground's Dice alone hardly sees a rare background.

    Dice is taken over the pixels of a step's whole batch, of all ranks.

    Args:
        classes: 1 for foreground and background, of which there is one logit.
        border_weight: w0 of `border_weights`, by which the cross entropy of background between close objects is added.
        ignored: whether labels may be `IGNORED`, which count nowhere.
        weights: of the pixels of each class in the cross entropy, and of its Dice; of mean 1 over the pixels of the
            data, as `class_weights` gives them.
    """

    def __init__(
        self, classes: int, *, border_weight: float = 0.0, ignored: bool = False, weights: Tensor | None = None
    ) -> None:
        super().__init__()
        self.classes = classes
        self.border_weight = border_weight
        self.ignored = ignored
        self.loss = _loss_of_batch(classes, ignored, weights)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss, a scalar, of logits [N, C, H, W] and labels [N, H, W]."""
        loss = self.without_borders(logits, labels)
        return loss + self._border_loss(logits, labels) if self.border_weight else loss

    def without_borders(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss as if `border_weight` were 0."""
        if self.classes > 1:
            return self.loss(logits, labels)
        # Of an ignored pixel both are 0, by which the loss knows it.
        sides = torch.stack([labels == 1, labels == 0], dim=1).to(labels.dtype)
        return self.loss(torch.cat([logits, -logits], dim=1), sides)

    def _border_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The cross entropy of background between close objects, by the weights that the paper adds to the others."""
        weights = border_weights(labels, strength=self.border_weight)
        if self.ignored:  # taken for objects; their own weight is 0
            labels = labels.masked_fill(labels == IGNORED, 0)
        if self.classes > 1:
            return (weights * F.cross_entropy(logits.float(), labels, reduction="none")).mean()
        return (weights * F.softplus(logits.squeeze(1).float())).mean()  # of labels 0, as all weighted ones are


def _loss_of_batch(classes: int, ignored: bool, weights: Tensor | None) -> BCEDiceLoss | CEDiceLoss:
    """Of one class: two channels, foreground and background, of which one's logit is the other's negative."""
    options: dict[str, Any] = {"batch": True, "across_ranks": True, "ignore_index": IGNORED if ignored else None}
    if weights is None:
        return BCEDiceLoss(**options) if classes == 1 else CEDiceLoss(**options)
    mean_one = weights / weights.mean()
    if classes > 1:
        return CEDiceLoss(weight=mean_one, **options)
    background, foreground = weights.tolist()
    ratio = torch.tensor([foreground / background, background / foreground])
    # In each channel one side has weight 1; the factor gives both their own, on average over the channels.
    factor = 2 * foreground * background / (foreground + background)
    return BCEDiceLoss(pos_weight=ratio, bce_weight=factor, weight=mean_one.flip(0), **options)


def class_weights(pairs: Sequence[Pair], summary: DataSummary, given: list[float] | None) -> Tensor:
    """Weigh classes as given, or by one over their pixels; float32 of mean 1 over all pixels that count.

    A class that no mask holds gets the weight of the rarest that one does.

    Raises:
        ConfigError: other than one weight per class given.
    """
    classes = max(summary.classes, 2)
    if given is not None and len(given) != classes:
        raise ConfigError(f"class_weights: expected {classes} numbers, one for each class, got {len(given)}")
    counts = sum(np.bincount(summary.labels_of(pair).ravel(), minlength=IGNORED + 1)[:classes] for pair in pairs)
    shares = torch.as_tensor(counts / np.sum(counts), dtype=torch.float64)
    weights = 1 / shares.clamp_min(shares[shares > 0].min()) if given is None else torch.tensor(given).double()
    return (weights / (weights * shares).sum()).float()


def rate_at(fraction: float) -> float:
    """The learning rate, as a share of its peak, when that fraction of the run is done: linear warm-up, then cosine."""
    if fraction < WARMUP:
        return (fraction + 1e-3) / (WARMUP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (fraction - WARMUP) / (1 - WARMUP)))
