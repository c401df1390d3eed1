"""Dice and IoU per class, counted over every pixel of a data set; the mean is that of the foreground."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from .checks import ConfigError, DataError, DtypeError, ShapeError

PIXELS = 2**22  # counted at a time, in 8 bytes each


class Scores(TypedDict):
    """Result of `SegmentationMetrics.compute`: 0 is worst, 1 is best.

    The means are over the foreground: all classes but the first, whose share of the pixels would flatter them.
    """

    mean_dice: float
    mean_iou: float
    dice: dict[str, float]
    iou: dict[str, float]
    accuracy: float


class SegmentationMetrics:
    """Confusion counts of all pixels seen, and the scores that follow from them.

    Counts are added up over the whole set before dividing (a mean of scores per image would let an image with three
    foreground pixels weigh as much as a full one). A class in neither prediction nor truth scores 1. Under
    torch.distributed the counts of all processes are added.

    Args:
        class_names: of labels 0, 1, ...; the first is the background.

    Raises:
        ConfigError: fewer than two names, or one given twice.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        if len(class_names) < 2 or len(set(class_names)) < len(class_names):
            raise ConfigError(f"class_names: expected at least 2 different names, got {list(class_names)}")
        self.class_names = list(class_names)
        self._confusion = torch.zeros(len(class_names), len(class_names), dtype=torch.int64)  # [truth, prediction]

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count labels [N, H, W] of any integer dtype, on any device.

        Raises:
            ShapeError: the two differ in shape.
            DtypeError: one is not of an integer dtype.
            DataError: a label outside the classes.
        """
        if prediction.shape != target.shape:
            raise ShapeError(
                f"prediction: expected the target's shape {tuple(target.shape)}, got {tuple(prediction.shape)}"
            )
        classes = len(self.class_names)
        counts = torch.zeros(classes**2, dtype=torch.int64, device=target.device)
        for part in zip(prediction.flatten().split(PIXELS), target.flatten().split(PIXELS), strict=True):
            predicted, truth = self._checked("prediction", part[0]), self._checked("target", part[1])
            counts += torch.bincount(truth * classes + predicted, minlength=classes**2)
        self._confusion = self._confusion.to(counts.device) + counts.view(classes, classes)

    def compute(self, *, across_ranks: bool = True) -> Scores:
        """Score everything counted so far, by all processes of torch.distributed, which all call it, or by this one.

        Raises:
            DataError: nothing counted yet.
        """
        confusion = self._confusion.clone()
        if across_ranks and torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_backend() == "nccl":
                confusion = confusion.cuda()  # a rank that counted nothing has it on the CPU
            torch.distributed.all_reduce(confusion)
        confusion = confusion.cpu().double()
        total = confusion.sum()
        if total == 0:
            raise DataError("metrics: expected at least one pixel, got none")
        overlap = confusion.diagonal()
        sizes = confusion.sum(0) + confusion.sum(1)
        dice = _ratio(2 * overlap, sizes)
        iou = _ratio(overlap, sizes - overlap)
        return Scores(
            mean_dice=dice[1:].mean().item(),
            mean_iou=iou[1:].mean().item(),
            dice=dict(zip(self.class_names, dice.tolist(), strict=True)),
            iou=dict(zip(self.class_names, iou.tolist(), strict=True)),
            accuracy=(overlap.sum() / total).item(),
        )

    def _checked(self, name: str, labels: Tensor) -> Tensor:
        """Return the labels as int64, in which those of uint64 that it cannot hold are negative."""
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise DtypeError(f"{name}: expected integer labels, got {labels.dtype}")
        labels = labels.long()
        if labels.numel():
            low, high = (bound.item() for bound in labels.aminmax())
            if low < 0 or high >= len(self.class_names):
                raise DataError(f"{name}: expected labels 0 to {len(self.class_names) - 1}, got {low} to {high}")
        return labels


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Compute part / whole, and 1 where both are 0."""
    return torch.where(whole > 0, part / whole, 1.0)
