"""Samples of images and labels: normalised, cropped alike, and the same at every run."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import make_data, noise, save

from fastunet.checks import ConfigError, DataError
from fastunet.data import (
    Pair,
    SegmentationDataset,
    find_pairs,
    inspect,
    moments,
    normalize,
    read_image,
    read_mask,
)


def test_a_constant_channel_does_not_divide_by_zero() -> None:
    image = np.full((12, 10, 1), 0.1, np.float32)
    assert moments(image)[1] == 1
    assert normalize(image).abs().max() < 1e-6


def test_a_small_signal_on_a_large_offset_keeps_its_spread() -> None:
    pixels = (1e6 + np.random.default_rng(0).normal(0, 10, (12, 10, 1))).astype(np.float32)
    np.testing.assert_allclose(moments(pixels)[1], pixels.astype(np.float64).std(), rtol=1e-9)


@pytest.mark.parametrize(("dtype", "channels"), [("uint8", 1), ("uint8", 3), ("uint16", 3), ("float32", 1)])
def test_normalising_takes_little_memory(dtype: str, channels: int) -> None:
    image = noise((2000, 1500, channels), dtype if dtype != "float32" else "uint16").astype(dtype)
    pixels = image.astype(np.float64)
    expected = np.moveaxis((pixels - pixels.mean((0, 1))) / pixels.std((0, 1)), -1, 0)
    del pixels
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    normalised = normalize(image)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak <= normalised.numpy().nbytes + 6 * image.size
    assert normalised.is_contiguous()
    # Three roundings of values below 4: of the mean and the deviation, of the difference, and of the quotient.
    np.testing.assert_allclose(normalised, expected, rtol=0, atol=4 * 4 * 2**-24)


def test_whole_images_come_normalised_in_order(tmp_path: Path) -> None:
    pairs = find_pairs(make_data(tmp_path))
    dataset = SegmentationDataset(pairs, inspect(pairs))
    assert len(dataset) == 4
    image, labels = dataset[2]
    assert (image.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert image.shape == (1, 12, 10)
    np.testing.assert_array_equal(labels * 255, read_mask(pairs[2].mask))
    np.testing.assert_array_equal(image, normalize(read_image(pairs[2].image)))


def make_coded_data(root: Path, count: int, size: tuple[int, int]) -> list[Pair]:
    """Images whose pixels are all different and whose mask says, for each, whether it is odd."""
    for index in range(count):
        pixels = (np.arange(size[0] * size[1]).reshape(size) + 7 * index + 1).astype(np.uint16)
        save(root / "images" / f"{index}.png", pixels)
        save(root / "masks" / f"{index}.png", (pixels % 2).astype(np.uint8))
    return find_pairs(root)


@pytest.mark.parametrize("size", [(20, 17), (9, 30), (5, 3), (1, 1)])
def test_crops_keep_image_and_labels_together_even_where_reflected(tmp_path: Path, size: tuple[int, int]) -> None:
    pairs = make_coded_data(tmp_path, 1, size)
    mean, std = moments(read_image(pairs[0].image))
    dataset = SegmentationDataset(pairs, inspect(pairs), crop=12, length=10)
    for image, labels in dataset:
        assert image.shape == (1, 12, 12)
        assert labels.shape == (12, 12)
        raw = (image[0].double() * std[0] + mean[0]).round().long()
        assert torch.equal(raw % 2, labels)


def test_samples_repeat_by_seed_epoch_and_index_only(tmp_path: Path) -> None:
    pairs = make_coded_data(tmp_path, 3, (30, 30))
    summary = inspect(pairs)

    def draw(seed: int, epoch: int, indices: range) -> list[torch.Tensor]:
        dataset = SegmentationDataset(pairs, summary, crop=8, length=9, seed=seed)
        dataset.set_epoch(epoch)
        return [dataset[index][0] for index in indices]

    first = torch.stack(draw(0, 1, range(9)))
    assert torch.equal(torch.stack(draw(0, 1, range(8, -1, -1))[::-1]), first)
    assert len(torch.unique(first.flatten(1), dim=0)) == 9
    for other in (draw(0, 2, range(9)), draw(1, 1, range(9))):
        assert not torch.equal(torch.stack(other), first)


def test_an_epoch_visits_every_image_equally_often(tmp_path: Path) -> None:
    for index in range(3):
        save(tmp_path / "images" / f"{index}.png", noise((10, 10), seed=index))
        save(tmp_path / "masks" / f"{index}.png", np.full((10, 10), index, np.uint8))
    pairs = find_pairs(tmp_path)
    dataset = SegmentationDataset(pairs, inspect(pairs), crop=6, length=12)
    orders = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        orders.append([int(labels.unique()) for _, labels in dataset])
        assert sorted(orders[-1]) == [0] * 4 + [1] * 4 + [2] * 4
    assert orders[0] != orders[1]


def test_files_are_read_on_access_above_the_memory_limit(tmp_path: Path) -> None:
    pairs = find_pairs(make_data(tmp_path))
    summary = inspect(pairs)
    kept, read = (SegmentationDataset(pairs, summary, memory_limit=limit) for limit in (2**30, 0))
    before = kept[1][0]
    assert torch.equal(read[1][0], before)
    save(pairs[1].image, noise((12, 10), seed=99))
    assert torch.equal(kept[1][0], before)
    assert not torch.equal(read[1][0], before)


def test_datasets_refuse_impossible_options(tmp_path: Path) -> None:
    pairs = find_pairs(make_data(tmp_path))
    summary = inspect(pairs)
    with pytest.raises(ConfigError, match="crop: expected at least 1, got 0"):
        SegmentationDataset(pairs, summary, crop=0)
    with pytest.raises(ConfigError, match="length: expected None without crop, got 5"):
        SegmentationDataset(pairs, summary, length=5)
    with pytest.raises(DataError, match="at least one pair"):
        SegmentationDataset([], summary)
    with pytest.raises(IndexError, match="0 <= index < 4, got 4"):
        SegmentationDataset(pairs, summary)[4]
