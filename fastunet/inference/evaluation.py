"""Scores of predictions: per class over all pixels, per image with their spread, and of the parts they separate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastunet.checks import check_choice
from fastunet.data.dataset import Whole
from fastunet.inference.streaming import predict_labels
from fastunet.metrics import Scores, SegmentationMetrics

RESAMPLES = 2000  # of the images, for an interval
CONFIDENCE = 0.95
PARTS = ("none", "foreground", "background")


def evaluate(
    model: nn.Module,
    samples: Iterable[Whole],
    class_names: list[str],
    *,
    tile: int | None = None,
    tta: bool = False,
    tolerance: float = 2.0,
    parts: str = "none",
    ignored: int | None = None,
) -> tuple[Scores, list[dict[str, float]]]:
    """Return scores over all samples, and those of each image; see `predict` and `scores_of_image`.

    Nothing is kept of an image but its scores. Pixels whose label is `ignored` do not count.
    """
    metrics, rows = SegmentationMetrics(class_names), []
    for image, labels, scale in samples:
        prediction, truth = predict_labels(model, image, scale, tile=tile, tta=tta), torch.from_numpy(labels)
        metrics.update(*counted_of(prediction, truth, ignored))
        rows.append(scores_of_image(prediction, truth, class_names, tolerance=tolerance, parts=parts, ignored=ignored))
    return metrics.compute(), rows


def counted_of(prediction: Tensor, truth: Tensor, ignored: int | None) -> tuple[Tensor, Tensor]:
    """Return the labels of the pixels that count, of prediction and truth: all [H, W], or [N] of them."""
    if ignored is None:
        return prediction, truth
    counts = truth != ignored
    return prediction[counts], truth[counts]


def scores_of_pixels(prediction: Tensor, truth: Tensor, class_names: Sequence[str]) -> Scores:
    """Score labels of one image by themselves: NaN where there are none."""
    if truth.numel() == 0:
        none = dict.fromkeys(class_names, math.nan)
        return Scores(mean_dice=math.nan, mean_iou=math.nan, dice=none, iou=none, accuracy=math.nan)
    metrics = SegmentationMetrics(class_names)
    metrics.update(prediction, truth)
    return metrics.compute(across_ranks=False)


def scores_of_image(
    prediction: Tensor,
    truth: Tensor,
    class_names: Sequence[str],
    *,
    tolerance: float = 2.0,
    parts: str = "none",
    ignored: int | None = None,
) -> dict[str, float]:
    """Score one image's labels [H, W] against the truth, each foreground class by itself.

    `dice NAME` and `iou NAME` (1 where a class is in neither), `hd95 NAME`, the 95th percentile of the distances
    between the two outlines in pixels, and `surface_dice NAME`, the share of both within `tolerance` pixels of each
    other: MONAI's values, NaN where the class is missing in one or both. With `parts` of the foreground, or of the
    background that it separates: `adapted_rand_error` as scikit-image's, and `v_rand`, the Rand F-score of the ISBI
    2012 challenge (Arganda-Carreras et al. 2015), for which the predicted parts are first grown together. Pixels whose
    true label is `ignored` do not count, and lie outside of all outlines and parts, the true and the predicted; where
    none is left, all scores are NaN.

    Raises:
        ConfigError: another choice of parts.
    """
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_dice import compute_surface_dice

    check_choice("parts", parts, PARTS)
    counted = scores_of_pixels(*counted_of(prediction, truth, ignored), class_names)

    def without_ignored(value: int) -> tuple[Tensor, Tensor]:
        if ignored is None:
            return prediction, truth
        return prediction.masked_fill(truth == ignored, value), truth.masked_fill(truth == ignored, value)

    found: dict[str, float] = {}
    for label, name in enumerate(class_names[1:], 1):
        both = [(labels == label)[None, None].float() for labels in without_ignored(0)]
        with warnings.catch_warnings():  # of a class that is missing, which the NaN says
            warnings.simplefilter("ignore")
            hd95 = compute_hausdorff_distance(*both, include_background=True, percentile=95).item()
            surface = compute_surface_dice(*both, class_thresholds=[tolerance], include_background=True).item()
        found[f"dice {name}"], found[f"iou {name}"] = counted["dice"][name], counted["iou"][name]
        found[f"hd95 {name}"] = hd95 if math.isfinite(hd95) else math.nan
        found[f"surface_dice {name}"] = surface
    if parts == "none":
        return found
    return found | _rand(*without_ignored(1 if parts == "background" else 0), parts)


def _rand(prediction: Tensor, truth: Tensor, parts: str) -> dict[str, float]:
    from skimage.measure import label
    from skimage.metrics import adapted_rand_error
    from skimage.segmentation import expand_labels

    true, predicted = (
        label((labels > 0 if parts == "foreground" else labels == 0).numpy(), connectivity=1)
        for labels in (truth, prediction)
    )
    if not true.any():
        return {"adapted_rand_error": math.nan, "v_rand": math.nan}
    grown = expand_labels(predicted, distance=max(predicted.shape))
    error, thinned = (adapted_rand_error(true, each)[0] for each in (predicted, grown))
    return {"adapted_rand_error": float(error), "v_rand": 1 - float(thinned)}


def summary_of(rows: Sequence[dict[str, float]], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Return, for each score of images, its mean, the 95 % bootstrap interval of that, and how many images have it.

    The images are resampled 2000 times (percentile method, Efron 1979); NaN where fewer than two have the score.
    """
    from scipy.stats import bootstrap

    summary: dict[str, dict[str, Any]] = {}
    for name in rows[0] if rows else ():
        values = np.array([row[name] for row in rows])
        values = values[np.isfinite(values)]
        low = high = math.nan
        if len(values) > 1:
            interval = bootstrap(
                (values,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile",
                rng=np.random.default_rng(seed),
            ).confidence_interval  # fmt: skip
            low, high = map(float, interval)
        mean = float(values.mean()) if len(values) else math.nan
        summary[name] = {"mean": mean, "low": low, "high": high, "images": len(values)}
    return summary
