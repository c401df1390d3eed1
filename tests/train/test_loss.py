"""What is minimised: pixels that do not count, weights of classes, and crops around rare ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import write_masks
from stopped_training import DEEP, TINY

from fastunet.checks import ConfigError
from fastunet.data import DataOptions, SegmentationDataset, find_pairs, inspect
from fastunet.data.labels import IGNORED
from fastunet.data.morphology import border_weights
from fastunet.train.config import TrainConfig
from fastunet.train.loop import train
from fastunet.train.loss import TrainingLoss, class_weights


@pytest.mark.parametrize("border", [0.0, 7.0])
@pytest.mark.parametrize("classes", [1, 3])
def test_ignored_pixels_are_as_if_they_were_not_there(classes: int, border: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, classes, 16, 16, requires_grad=True)
    labels = torch.randint(max(classes, 2), (2, 16, 16))
    labels[:, :, :8] = IGNORED
    loss = TrainingLoss(classes, border_weight=border, ignored=True)(logits, labels)
    loss.backward()
    assert (logits.grad[..., :8] == 0).all()
    assert (logits.grad[..., 8:] != 0).all()
    if not border:
        expected = TrainingLoss(classes)(logits[..., 8:], labels[..., 8:])
        torch.testing.assert_close(loss, expected)
    assert TrainingLoss(classes, ignored=True)(logits, torch.full_like(labels, IGNORED)).isfinite()


@pytest.mark.parametrize("classes", [1, 3])
def test_borders_weigh_in_the_cross_entropy(classes: int) -> None:
    """Equation 1 of the paper: each pixel's cross entropy times its weight."""
    labels = torch.zeros(2, 12, 12, dtype=torch.long)
    labels[:, 2:5, 2:9] = 1
    labels[:, 7:10, 2:9] = classes - 1 if classes > 1 else 1
    logits = torch.randn(2, classes, 12, 12)
    losses = [TrainingLoss(classes, border_weight=weight)(logits, labels) for weight in (0.0, 7.0)]
    both = torch.cat([torch.zeros_like(logits), logits], 1) if classes == 1 else logits
    each = -both.log_softmax(1).gather(1, labels[:, None])[:, 0]
    expected = (border_weights(labels, strength=7.0) * each).mean()
    assert expected > 0.1
    torch.testing.assert_close(losses[1] - losses[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("weights", [[0.5, 3.0], [0.2, 1.0, 4.0], None])
def test_weights_are_those_of_each_pixels_cross_entropy(weights: list[float] | None, ignored: bool) -> None:
    """And of each class's Dice, there of mean 1: also of the background's, where they are none."""
    torch.manual_seed(1)
    weight = torch.tensor(weights or [1.0, 1.0])
    channels = len(weight)
    labels = torch.randint(channels, (3, 8, 8))
    logits = torch.randn(3, channels if channels > 2 else 1, 8, 8)
    counted = torch.ones_like(labels, dtype=torch.bool)
    if ignored:
        counted[:, :3] = False
    module = TrainingLoss(logits.shape[1], weights=weight if weights else None, ignored=ignored)
    loss = module(logits, labels.masked_fill(~counted, IGNORED))

    both = logits if channels > 2 else torch.cat([torch.zeros_like(logits), logits], 1)
    entropy = -both.log_softmax(1).gather(1, labels[:, None])[:, 0]
    shares = weight[labels][counted]
    # That of several classes is torch's: a mean by weight. Of two the weights' mean is taken over the whole data.
    expected = (shares * entropy[counted]).sum() / (shares.sum() if channels > 2 else counted.sum())
    for label in range(channels):
        probability, truth = both.softmax(1)[:, label][counted], (labels == label)[counted]
        dice = (2 * (probability * truth).sum() + 1e-5) / (probability.sum() + truth.sum() + 1e-5)
        expected = expected + (1 - dice) * weight[label] / weight.sum()
    torch.testing.assert_close(loss, expected)


def test_balanced_weights_are_one_over_the_pixels_of_a_class(tmp_path: Path) -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[0], mask[1, :2], mask[7] = 1, 2, 9
    pairs = find_pairs(write_masks(tmp_path, mask))
    summary = inspect(pairs, 4, DataOptions(labels="0,1,2,3", ignore="9"))
    weights = class_weights(pairs, summary, None)
    shares = torch.tensor([46, 8, 2, 0]) / 56
    torch.testing.assert_close(weights * shares, torch.tensor([1, 1, 1, 0]) / 3)
    assert weights[3] == weights[2]
    given = class_weights(pairs, summary, [1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close((given * shares).sum(), torch.tensor(1.0))
    torch.testing.assert_close(given / given[0], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(ConfigError, match=r"class_weights: expected 4 numbers, one for each class, got 2"):
        class_weights(pairs, summary, [1.0, 2.0])


def test_balanced_crops_hold_rare_classes_as_often_as_others(tmp_path: Path) -> None:
    mask = np.zeros((96, 96), np.uint8)
    mask[:, :40] = 1
    mask[2, 90] = 2
    mask[90:] = 255
    pairs = find_pairs(write_masks(tmp_path, mask, count=1))
    summary = inspect(pairs, 3, DataOptions(labels="0,1,2", ignore="255"))
    shares = []
    for balance in (0.0, 0.5, 1.0):
        crops = SegmentationDataset(pairs, summary, crop=16, length=400, balance=balance)
        held = [set(labels.unique().tolist()) for _, labels in (crops[index] for index in range(400))]
        shares.append([sum(label in each for each in held) / 400 for label in (1, 2)])
    assert shares[0][1] < 0.05
    assert 0.2 < shares[1][1] < 0.3
    assert 0.43 < shares[2][1] < 0.57
    assert shares[2][0] == pytest.approx(1 - shares[2][1], abs=0.01)


@pytest.mark.parametrize("config", [replace(TINY, steps=60), replace(DEEP, steps=80)], ids=["plain", "deep"])
def test_it_learns_with_all_that_weighs_pixels(config: TrainConfig, tmp_path: Path) -> None:
    mask = np.zeros((48, 48), np.uint8)
    mask[4:20, 4:20], mask[24:28], mask[30:, 30:] = 200, 90, 128
    data, reading = write_masks(tmp_path / "data", mask), DataOptions(labels="0,200,90", ignore="128")
    features = (8, 8, 16, 16) if config.deep_supervision else (8, 16)
    weighing = replace(config, features=features, lr=1e-2, class_weights="balanced", balance=0.5, border_weight=1.0)
    losses: list[float] = []
    metrics = train(
        data, tmp_path / "run", weighing, reading=reading, on_step=lambda progress: losses.append(progress.loss)
    )
    assert metrics["mean_dice"] > 0.85
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
