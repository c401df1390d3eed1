"""Files and the classes of their masks, summed up: bad input names the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from image_files import make_data, noise, save

from fastunet.checks import ConfigError, DataError
from fastunet.data import (
    DataSummary,
    Pair,
    SegmentationDataset,
    find_pairs,
    inspect,
    labels_from_mask,
    mask_from_labels,
)


def test_inspect_sums_up_the_files(tmp_path: Path) -> None:
    images = [noise((4, 6, 3), "uint16", seed=0), noise((8, 5, 3), "uint16", seed=1)]
    for stem, image in zip("ab", images, strict=True):
        save(tmp_path / "images" / f"{stem}.tif", image)
        save(tmp_path / "masks" / f"{stem}.png", (image[..., 0] > 30000).astype(np.uint8))
    summary = inspect(find_pairs(tmp_path))
    assert summary == DataSummary(2, 3, 1, (0, 1), "uint16", size_min=(4, 5), size_max=(8, 6))


MISFITS = {
    "masks/c.png": (np.zeros((10, 12), np.uint8), r"expected height x width 12 x 10 as of c\.png, got 10 x 12"),
    "images/b.png": (noise((12, 10, 5)), r"expected 1 channels as in a\.png, got 5"),
    "images/d.png": (noise((12, 10), "uint16"), r"expected uint8 as in a\.png, got uint16"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_file_that_does_not_fit_the_others_is_named(tmp_path: Path, name: str) -> None:
    make_data(tmp_path)
    pixels, message = MISFITS[name]
    if pixels.ndim == 3:  # of 5 channels, which PNG does not have: the content says what a file is
        tifffile.imwrite(tmp_path / name, pixels, photometric="minisblack", planarconfig="contig")
    else:
        save(tmp_path / name, pixels)
    with pytest.raises(DataError, match=rf"{name}: {message}"):
        inspect(find_pairs(tmp_path))


def masks_only(root: Path, *values: list[int]) -> list[Pair]:
    """One pair for each list of mask values."""
    for stem, row in zip("abcdefgh", values, strict=False):
        save(root / "images" / f"{stem}.png", noise((2, len(row))))
        save(root / "masks" / f"{stem}.png", np.array([row, row], np.uint8))
    return find_pairs(root)


@pytest.mark.parametrize(
    ("values", "given", "classes"),
    [
        ([[0, 1], [0, 0]], None, 1),
        ([[0, 255], [0, 0]], None, 1),
        ([[255, 255], [0, 0]], 2, 1),
        ([[0, 2], [0, 1]], None, 3),
        ([[0, 0], [0, 0]], 1, 1),  # healthy controls, to be scored on
    ],
)
def test_classes_follow_from_the_mask_values(
    tmp_path: Path, values: list[list[int]], given: int | None, classes: int
) -> None:
    summary = inspect(masks_only(tmp_path, *values), classes=given)
    assert summary.classes == classes
    assert summary.mask_values == tuple(sorted({value for row in values for value in row}))


BINARY = "expected mask values 0 and 1, or 0 and 255"


@pytest.mark.parametrize(
    ("values", "given", "message"),
    [
        ([[0, 255, 0], [0, 128, 255]], None, rf"b\.png: {BINARY}, or class indices .*got 0, 128, 255 \(all"),
        ([[0, 1], [0, 255]], None, rf"b\.png: {BINARY}, or .*got 0, 255 \(all masks together: 0, 1, 255\)"),
        ([[0, 1], [0, 3]], None, rf"b\.png: {BINARY}, or .*got 0, 3"),
        ([[0, 1], [1, 2]], 1, rf"b\.png: {BINARY}, got 1, 2"),
        ([[0, 255], [0, 7]], 4, r"a\.png: expected mask values class indices 0 to 3, got 0, 255"),
        ([list(range(60))], None, rf"a\.png: {BINARY}, or .*got 0, 1, 2, 3, 4 and 55 more"),
        ([[0, 0], [0, 0]], None, r"masks: expected foreground in at least one of 2 masks, got only 0"),
    ],
)
def test_mask_values_that_do_not_fit_are_named(
    tmp_path: Path, values: list[list[int]], given: int | None, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        inspect(masks_only(tmp_path, *values), classes=given)
    assert "\n" not in str(caught.value)


def test_inspect_refuses_nothing_and_impossible_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one pair"):
        inspect([])
    with pytest.raises(ConfigError, match="expected 1 to 256, got 257"):
        inspect(find_pairs(make_data(tmp_path)), classes=257)


def test_labels_and_masks_convert_both_ways() -> None:
    for foreground in (1, 255):
        labels = labels_from_mask(np.array([[0, foreground]]), classes=1)
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, [[0, 1]])
    np.testing.assert_array_equal(mask_from_labels(np.array([[0, 1]]), classes=1), [[0, 255]])
    indices = np.array([[0, 4, 2]], np.uint16)
    np.testing.assert_array_equal(mask_from_labels(labels_from_mask(indices, classes=5), classes=5), indices)
    assert mask_from_labels(np.array([[0, 255]]), classes=256).dtype == np.uint8


@pytest.mark.parametrize(
    ("values", "dtype", "mask"),
    [
        ((0, 128, 255), "uint8", [0, 128, 255]),
        ((1, 2, 1000), "uint16", [1, 2, 1000]),
        (((0, 0, 0), (9, 0, 0), (0, 9, 0)), "uint8", [0, 1, 2]),
    ],
)
def test_masks_are_written_with_the_values_that_were_given(values: tuple, dtype: str, mask: list[int]) -> None:
    written = mask_from_labels(np.array([0, 1, 2], np.uint8), 3, values)
    assert written.dtype == dtype
    assert written.tolist() == mask


@pytest.mark.parametrize("value", [-1, 256])
def test_mask_values_that_are_no_class_do_not_wrap(tmp_path: Path, value: int) -> None:
    with pytest.raises(DataError, match=rf"expected class indices 0 to 4, got values .*{value}"):
        labels_from_mask(np.array([[1, value]]), classes=5)
    pairs = masks_only(tmp_path, [0, 4])
    save(pairs[0].mask, np.array([[0, 255]] * 2, np.uint8))  # after it was inspected
    with pytest.raises(DataError, match=r"masks/a\.png: .*expected class indices 0 to 4, got values 0 to 255"):
        SegmentationDataset(pairs, inspect(masks_only(tmp_path / "five", [0, 4]), 5))
