"""Synthetic cells: repeatable, with masks that fit and that no threshold finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastunet.checks import ConfigError, DataError
from fastunet.data import find_pairs, inspect, read_image, read_mask
from fastunet.data.synthetic import cells, write_dataset


def test_the_seed_alone_decides() -> None:
    first, again, other = (cells(2, size=64, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (np.array(first) != np.array(other)).mean() > 0.1
    assert (first[0][0] != first[0][1]).mean() > 0.5
    # A longer series begins with the shorter one.
    np.testing.assert_array_equal(cells(3, size=64, seed=5)[0][:2], first[0])


def test_cells_are_brighter_than_their_surroundings_but_no_threshold_separates_them() -> None:
    images, masks = (np.stack(pictures) for pictures in cells(4, seed=0))
    inside = masks > 0
    assert 0.2 < inside.mean() < 0.6
    assert images[inside].mean() > 1.5 * images[~inside].mean()
    dice = [
        2 * ((images > level) & inside).sum() / ((images > level).sum() + inside.sum()) for level in range(0, 250, 5)
    ]
    assert 0.6 < max(dice) < 0.85


def test_masks_lie_where_the_cells_are() -> None:
    """The brightness steps at the mask's outline and nowhere near it: a mask shifted by 2 pixels fits worse."""
    images, masks = (np.stack(pictures) for pictures in cells(4, seed=2))
    light = images[:, 4:-4, 4:-4]

    def contrast(shift: int) -> float:
        inside = np.roll(masks > 0, shift, axis=(1, 2))[:, 4:-4, 4:-4]
        return light[inside].mean() - light[~inside].mean()

    assert contrast(0) > max(contrast(2), contrast(-2))


def test_a_written_set_is_read_back_whole(tmp_path: Path) -> None:
    write_dataset(tmp_path, count=3, size=48, seed=4)
    pairs = find_pairs(tmp_path)
    images, masks = cells(3, size=48, seed=4)
    assert [pair.stem for pair in pairs] == ["cell_000", "cell_001", "cell_002"]
    for pair, image, mask in zip(pairs, images, masks, strict=True):
        np.testing.assert_array_equal(read_image(pair.image)[..., 0], image)
        np.testing.assert_array_equal(read_mask(pair.mask), mask)
    assert inspect(pairs).classes == 1
    with pytest.raises(DataError, match=r"cell_000\.png: expected nothing there yet"):
        write_dataset(tmp_path, count=1, size=32)


def test_impossible_arguments_are_refused() -> None:
    for arguments in ((0, 64), (1, 31)):
        with pytest.raises(ConfigError, match=r"expected count >= 1 and size >= 32, got"):
            cells(*arguments)
