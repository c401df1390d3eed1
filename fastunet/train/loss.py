"""What a training minimises, and the learning rate with which it does."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastunet.losses import BCEDiceLoss, CEDiceLoss
from fastunet.morphology import border_weights

WARMUP = 0.03  # of the run


class TrainingLoss(nn.Module):
    """Cross entropy + Dice over all classes, background too: foreground's Dice alone hardly sees a rare background.

    Dice is taken over the pixels of a step's whole batch, of all ranks.

    Args:
        classes: 1 for foreground and background, of which there is one logit.
        border_weight: w0 of `border_weights`, by which the cross entropy of background between close objects is added.
    """

    def __init__(self, classes: int, *, border_weight: float = 0.0) -> None:
        super().__init__()
        self.classes = classes
        self.border_weight = border_weight
        kind = BCEDiceLoss if classes == 1 else CEDiceLoss
        self.loss = kind(batch=True, across_ranks=True)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss, a scalar, of logits [N, C, H, W] and labels [N, H, W]."""
        if self.classes > 1:
            loss = self.loss(logits, labels)
        else:
            foreground = labels.unsqueeze(1)
            loss = self.loss(torch.cat([logits, -logits], dim=1), torch.cat([foreground, 1 - foreground], dim=1))
        return loss + self._border_loss(logits, labels) if self.border_weight else loss

    def _border_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The cross entropy of background between close objects, by the weights that the paper adds to the others."""
        weights = border_weights(labels, strength=self.border_weight)
        if self.classes > 1:
            return (weights * F.cross_entropy(logits.float(), labels, reduction="none")).mean()
        return (weights * F.softplus(logits.squeeze(1).float())).mean()  # of labels 0, as all weighted ones are


def rate_at(fraction: float) -> float:
    """The learning rate, as a share of its peak, when that fraction of the run is done: linear warm-up, then cosine."""
    if fraction < WARMUP:
        return (fraction + 1e-3) / (WARMUP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (fraction - WARMUP) / (1 - WARMUP)))
