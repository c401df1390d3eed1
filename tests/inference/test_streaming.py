"""Scores of images that are read in windows: those of the whole image, of which no more is read than a tile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("zarr", reason="needs the extra train")

import torch
from image_files import save
from untrained_run import smooth_image, untrained_run

import fastunet
from fastunet.data import SegmentationDataset, find_pairs, inspect, normalize, pairing, sources
from fastunet.inference import streaming
from fastunet.inference.evaluation import evaluate
from fastunet.inference.predict import labels_of
from fastunet.metrics import SegmentationMetrics
from fastunet.train import results

TILE = 280  # two parts by two, of 300 x 421


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("scorer", ["evaluate", "validate"])
def test_scores_of_a_large_file_are_those_of_the_whole_image(
    scorer: str, tta: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = smooth_image()
    save(tmp_path / "images/a.tif", image, rowsperstrip=16, compression="zlib")
    save(tmp_path / "masks/a.tif", (image > image.mean()).astype(np.uint8))
    segmenter = fastunet.load(untrained_run(tmp_path / "run"), "cpu")
    pairs = find_pairs(tmp_path)
    samples = SegmentationDataset(pairs, inspect(pairs), memory_limit=0)
    (pixels, labels), names = samples[0], ["background", "foreground"]
    expected = labels_of(fastunet.predict(segmenter.model, pixels, tta=tta))
    metrics = SegmentationMetrics(names)
    metrics.update(expected, labels)
    right = metrics.compute()
    assert 0.1 < right["mean_dice"] < 0.9

    sizes: list[tuple[int, ...]] = []

    def recorded(image: np.ndarray, *scale: Any) -> torch.Tensor:
        sizes.append(image.shape[:2])
        return normalize(image, *scale)

    def decoded(*place: Any) -> np.ndarray:
        pytest.fail(f"{place} was decoded at once")

    monkeypatch.setattr(sources, "LARGE", 0)
    monkeypatch.setattr(streaming, "normalize", recorded)
    monkeypatch.setattr(sources, "read_image", decoded)
    monkeypatch.setattr(pairing, "read_image", decoded)
    if scorer == "evaluate":
        scores, (row,) = evaluate(segmenter.model, [samples.whole(0)], names, tile=TILE, tta=tta)
        assert row["dice foreground"] == right["dice"]["foreground"]
    else:
        monkeypatch.setattr(results, "TILE", TILE)
        scored, (dice,) = results.validate(segmenter.model, samples, names, tta=tta, part=slice(None))
        scores = scored.compute()
        assert dice == right["mean_dice"]
    assert scores == right
    assert len(sizes) == 4
    assert max(max(size) for size in sizes) <= TILE + (8 if tta else 0)
