"""Scores per image against the definitions, and their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("monai", reason="needs the extra train")

import scipy.spatial
import skimage.measure
import torch
from torch import Tensor

from fastunet.checks import ConfigError
from fastunet.data.dataset import Whole
from fastunet.data.sources import source_of_array
from fastunet.inference.evaluation import evaluate, scores_of_image, summary_of

NAMES = ["background", "a", "b"]


def disc(size: int, y: float, x: float, radius: float) -> Tensor:
    grid = torch.arange(size)
    return (grid[:, None] - y) ** 2 + (grid[None] - x) ** 2 < radius**2


def outline(mask: Tensor) -> np.ndarray:
    """Pixels of the mask with one of four neighbours outside, as MONAI takes a surface."""
    m = np.pad(mask.numpy(), 1)
    inner = m[1:-1, 1:-1] & m[:-2, 1:-1] & m[2:, 1:-1] & m[1:-1, :-2] & m[1:-1, 2:]
    return np.argwhere(mask.numpy() & ~inner)


def test_scores_are_as_defined() -> None:
    truth, prediction = torch.zeros(64, 64, dtype=torch.long), torch.zeros(64, 64, dtype=torch.uint8)
    truth[disc(64, 20, 20, 11)], truth[disc(64, 45, 44, 9)] = 1, 2
    prediction[disc(64, 22, 20, 11)], prediction[disc(64, 45, 44, 12)] = 1, 2
    scores = scores_of_image(prediction, truth, NAMES, tolerance=2.0)
    for label, name in ((1, "a"), (2, "b")):
        p, t = prediction == label, truth == label
        assert scores[f"dice {name}"] == pytest.approx(2 * (p & t).sum().item() / (p.sum() + t.sum()).item())
        assert scores[f"iou {name}"] == pytest.approx((p & t).sum().item() / (p | t).sum().item())
        distances = scipy.spatial.distance.cdist(outline(p), outline(t))
        there, back = distances.min(1), distances.min(0)
        hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
        assert scores[f"hd95 {name}"] == pytest.approx(hd95, abs=1e-6)
        near = ((there <= 2).sum() + (back <= 2).sum()) / (len(there) + len(back))
        assert scores[f"surface_dice {name}"] == pytest.approx(near, abs=1e-6)


def test_a_missing_class_has_no_outline() -> None:
    truth, prediction = torch.zeros(16, 16, dtype=torch.long), torch.zeros(16, 16, dtype=torch.long)
    truth[3:6, 3:6] = 1
    scores = scores_of_image(prediction, truth, NAMES)
    assert (scores["dice a"], scores["dice b"]) == (0.0, 1.0)
    assert math.isnan(scores["hd95 a"])
    assert math.isnan(scores["hd95 b"])


@pytest.mark.parametrize("parts", ["foreground", "background"])
def test_rand_scores_count_pairs_of_pixels(parts: str) -> None:
    """Cells between membranes of one and three pixels; the predicted membrane has a gap, which joins two of four."""
    truth, prediction = torch.ones(21, 21, dtype=torch.long), torch.ones(21, 21, dtype=torch.long)
    truth[10], truth[:, 10] = 0, 0
    prediction[9:12], prediction[:, 9:12] = 0, 0
    prediction[2:5, 9:12] = 1
    if parts == "background":
        truth, prediction = 1 - truth, 1 - prediction
    scores = scores_of_image(prediction, truth, NAMES[:2], parts=parts)
    inside = (truth == (parts == "foreground")).numpy()
    cells = skimage.measure.label(inside, connectivity=1)
    # Grown together, the predicted parts are the halves' two cells below, and one above.
    merged = np.where(np.arange(21)[:, None] < 10, 1, 2 + (np.arange(21)[None] > 10))
    pairs = [(cells[inside][:, None] == cells[inside][None]), (merged[inside][:, None] == merged[inside][None])]
    both, true, predicted = (pairs[0] & pairs[1]).sum(), pairs[0].sum(), pairs[1].sum()
    assert scores["v_rand"] == pytest.approx(2 * both / (true + predicted), abs=2e-3)
    assert scores["adapted_rand_error"] > 1 - scores["v_rand"], "a thick membrane costs pixels"
    perfect = scores_of_image(truth, truth, NAMES[:2], parts=parts)
    assert (perfect["adapted_rand_error"], perfect["v_rand"]) == (pytest.approx(0), pytest.approx(1))


def test_parts_are_one_of_three() -> None:
    with pytest.raises(ConfigError, match="parts: expected one of none, foreground, background, got 'all'"):
        scores_of_image(torch.zeros(3, 3).long(), torch.zeros(3, 3).long(), NAMES, parts="all")


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    generator, inside = np.random.default_rng(5), 0
    for seed in range(200):
        rows = [{"dice": value, "hd95": math.nan} for value in generator.normal(0.7, 0.1, 30)]
        summary = summary_of(rows, seed)
        inside += summary["dice"]["low"] <= 0.7 <= summary["dice"]["high"]
    assert 180 <= inside <= 198  # 95 % of 200, less what the percentile method lacks at 30 images
    assert summary["hd95"]["images"] == 0
    assert math.isnan(summary["hd95"]["mean"])
    assert summary_of([{"dice": 0.5}])["dice"] == pytest.approx(
        {"mean": 0.5, "low": math.nan, "high": math.nan, "images": 1}, nan_ok=True
    )


@pytest.mark.parametrize("parts", ["none", "foreground", "background"])
def test_ignored_pixels_count_nowhere(parts: str) -> None:
    """What is predicted there changes no score; of the rest it is as if the image ended there."""
    truth = torch.zeros(16, 24, dtype=torch.long)
    truth[4:9, 3:9] = 1
    prediction = truth.roll(1, 0)
    expected = scores_of_image(prediction, truth, NAMES[:2], parts=parts)
    for value in (0, 1):
        wider, labels = (torch.nn.functional.pad(each, (0, 0, 0, 8), value=value) for each in (prediction, truth))
        labels[16:] = 255
        found = scores_of_image(wider, labels, NAMES[:2], parts=parts, ignored=255)
        assert found == pytest.approx(expected, nan_ok=True)
    nothing = scores_of_image(prediction, torch.full_like(truth, 255), NAMES[:2], ignored=255)
    assert all(math.isnan(value) for value in nothing.values())
    model = torch.nn.Conv2d(1, 1, 1)
    torch.nn.init.constant_(model.weight, 1.0)
    torch.nn.init.constant_(model.bias, -0.5)
    image = source_of_array(wider.numpy().astype(np.float32))
    sample = Whole(image, labels.numpy().astype(np.uint8), (np.zeros(1), np.ones(1)))
    scores, rows = evaluate(model, [sample], NAMES[:2], parts=parts, ignored=255)
    assert rows == [pytest.approx(expected, nan_ok=True)]
    assert scores["dice"][NAMES[1]] == pytest.approx(expected[f"dice {NAMES[1]}"])
