"""Dice and IoU on cases counted by hand."""

from __future__ import annotations

import pytest
import torch

from fastunet.checks import ConfigError, DataError, DtypeError, ShapeError
from fastunet.inference.predict import labels_of
from fastunet.metrics import SegmentationMetrics

# Truth 0: 4 pixels, 1: 3, 2: 1. Agreement: 0 in 3, 1 in 2, 2 in none.
TARGET = torch.tensor([[[0, 0, 0, 0], [1, 1, 1, 2]]])
PREDICTION = torch.tensor([[[0, 0, 0, 1], [1, 1, 0, 1]]])


def test_scores_by_hand() -> None:
    metrics = SegmentationMetrics(["sky", "tree", "bird"])
    metrics.update(PREDICTION, TARGET)
    scores = metrics.compute()
    assert scores["dice"] == pytest.approx({"sky": 6 / 8, "tree": 4 / 7, "bird": 0})
    assert scores["iou"] == pytest.approx({"sky": 3 / 5, "tree": 2 / 5, "bird": 0})
    assert scores["mean_dice"] == pytest.approx(4 / 7 / 2)  # all but the first
    assert scores["mean_iou"] == pytest.approx(2 / 5 / 2)
    assert scores["accuracy"] == pytest.approx(5 / 8)


def test_pixels_are_added_up_over_the_set_not_averaged_over_images() -> None:
    metrics = SegmentationMetrics(["background", "cell"])
    metrics.update(torch.tensor([[[1, 0]]]), torch.tensor([[[0, 1]]]))  # Dice 0 on two pixels
    metrics.update(torch.ones(1, 2, 4, dtype=torch.long), torch.ones(1, 2, 4, dtype=torch.long))  # Dice 1 on eight
    assert metrics.compute()["dice"]["cell"] == pytest.approx(2 * 8 / (9 + 9))


@pytest.mark.parametrize(
    ("predicted", "score"), [(0, {"background": 1.0, "cell": 1.0}), (1, {"background": 0.0, "cell": 0.0})]
)
def test_a_class_that_is_not_there(predicted: int, score: dict[str, float]) -> None:
    """Predicted nowhere it scores one, else zero."""
    metrics = SegmentationMetrics(["background", "cell"])
    metrics.update(torch.full((1, 2, 2), predicted), torch.zeros(1, 2, 2, dtype=torch.uint8))
    scores = metrics.compute()
    assert scores["dice"] == scores["iou"] == score
    assert scores["accuracy"] == scores["mean_dice"] == scores["mean_iou"] == score["cell"]


def test_counts_beyond_what_fp32_holds_stay_exact() -> None:
    metrics = SegmentationMetrics(["background", "cell"])
    zeros = torch.zeros(1, 4096, 4097, dtype=torch.uint8)  # more than 2**24 pixels
    prediction = zeros.clone()
    prediction[0, 0, 0] = 1
    metrics.update(prediction, zeros)
    assert metrics.compute()["accuracy"] == 1 - 1 / zeros.numel()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_labels_of_every_integer_type(dtype: torch.dtype) -> None:
    """More of them than bytes hold are counted as they are, and what is no label is refused."""
    metrics, classes = SegmentationMetrics([f"class {i}" for i in range(300)]), min(300, torch.iinfo(dtype).max + 1)
    labels = torch.arange(300).remainder(classes).reshape(1, 20, 15)
    metrics.update(labels.to(dtype), labels)
    assert metrics.compute()["accuracy"] == 1
    if torch.iinfo(dtype).max > 300:
        with pytest.raises(DataError, match="prediction: expected labels 0 to 299"):
            metrics.update(torch.full_like(labels, torch.iinfo(dtype).max, dtype=dtype), labels)


def test_as_many_classes_as_there_are() -> None:
    """256 more than another class is not that class."""
    probabilities = torch.eye(300)[:, :, None]
    assert torch.equal(labels_of(probabilities)[:, 0].long(), torch.arange(300))


def test_wrong_input_is_refused() -> None:
    metrics = SegmentationMetrics(["background", "cell"])
    zeros = torch.zeros(1, 2, 2, dtype=torch.long)
    with pytest.raises(ShapeError, match=r"target's shape \(1, 2, 2\), got \(1, 2, 3\)"):
        metrics.update(torch.zeros(1, 2, 3, dtype=torch.long), zeros)
    with pytest.raises(DtypeError, match=r"prediction: expected integer labels, got torch\.float32"):
        metrics.update(zeros.float(), zeros)
    for value in (-1, 2):
        with pytest.raises(DataError, match=r"target: expected labels 0 to 1, got "):
            metrics.update(zeros, zeros.index_fill(2, torch.tensor([0]), value))
    with pytest.raises(DataError, match="at least one pixel"):
        metrics.compute()
    with pytest.raises(ConfigError, match=r"at least 2 different names, got \['cell', 'cell'\]"):
        SegmentationMetrics(["cell", "cell"])
