"""The scores of a model on the images kept out of its training, shared out among ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastunet.data import SegmentationDataset
from fastunet.data.labels import IGNORED
from fastunet.inference.predict import labels_of, predict
from fastunet.metrics import Scores, SegmentationMetrics
from fastunet.train.config import TILE


def validate(
    model: nn.Module,
    samples: SegmentationDataset,
    class_names: list[str],
    *,
    tta: bool = False,
    part: slice = slice(None),
) -> Scores:
    """Score a model on all samples, whole or in exact tiles; of several ranks each predicts its `part` of them."""
    metrics = SegmentationMetrics(class_names)
    device = next(model.parameters()).device
    for index in range(len(samples))[part]:
        image, labels = samples[index]
        prediction, labels = predicted_labels(model, image, tta=tta), labels.to(device)
        if samples.summary.ignored:
            prediction, labels = (each[labels != IGNORED] for each in (prediction, labels))
        metrics.update(prediction[None], labels[None])
    return metrics.compute()


def predicted_labels(model: nn.Module, image: Tensor, *, tta: bool = False) -> Tensor:
    """Predict the labels [H, W] of an image [C, H, W], on the model's device."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return labels_of(predict(model, image.to(device), tile=TILE, tta=tta))
