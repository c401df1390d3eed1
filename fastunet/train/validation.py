"""The scores of a model on the images kept out of its training, shared out among ranks."""

from __future__ import annotations

import torch
from torch import nn

from fastunet.data import SegmentationDataset
from fastunet.data.labels import IGNORED
from fastunet.inference.streaming import predict_labels
from fastunet.metrics import Scores, SegmentationMetrics
from fastunet.train.config import TILE
from fastunet.train.distributed import sum_of_ranks


def validate(
    model: nn.Module, samples: SegmentationDataset, class_names: list[str], *, tta: bool = False, part: slice
) -> tuple[Scores, list[float]]:
    """Score a model on all samples, whole or in exact tiles; give the mean Dice of the foreground in each image too.

    Of several ranks each predicts its `part` of the samples.
    """
    metrics = SegmentationMetrics(class_names)
    dice = torch.zeros(len(samples), dtype=torch.float64)
    device = next(model.parameters()).device
    for index in range(len(samples))[part]:
        image, truth, scale = samples.whole(index)
        labels = torch.from_numpy(truth)
        prediction = predict_labels(model, image, scale, tile=TILE, tta=tta)
        if samples.summary.ignored:
            prediction, labels = (each[labels != IGNORED] for each in (prediction, labels))
        metrics.update(prediction, labels)
        if labels.numel():
            image_metrics = SegmentationMetrics(class_names)
            image_metrics.update(prediction, labels)
            dice[index] = image_metrics.compute(across_ranks=False)["mean_dice"]
    return metrics.compute(), sum_of_ranks(dice, device).tolist()
