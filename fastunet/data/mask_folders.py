"""Masks of which several belong to one image: a file for each object, or for each section of a stack."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from fastunet.checks import DataError, some_of
from fastunet.data.images import list_images, read_codes
from fastunet.data.volumes import is_zarr


def is_folder(mask: Path) -> bool:
    """Whether a mask is a folder of masks, and not a file or a Zarr array."""
    return mask.is_dir() and not is_zarr(mask)


def files_in_order(folder: Path) -> list[Path]:
    """List the masks of a folder, slice_2 before slice_10. Raises DataError where there is none."""
    files = list_images(folder)
    return [files[stem] for stem in sorted(files, key=_numbers_as_such)]


def _numbers_as_such(stem: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", stem)]


def with_folders(images: dict[str, Path], masks: dict[str, Path]) -> dict[str, Path]:
    """Put a folder in the place of the masks that lie in it, where it has the stem of an image without a mask."""
    found: dict[str, Path] = {}
    for stem, file in masks.items():
        above = stem.rpartition("/")[0]
        is_of_image = above in images and above not in masks and stem not in images
        found[above if is_of_image else stem] = file.parent if is_of_image else file
    return found


def read_objects(folder: Path) -> np.ndarray:
    """Return what any mask of a folder, each of one object, holds: 0 and 255, uint8 [H, W].

    Raises:
        DataError: an unreadable file, sizes that differ, or a mask of more than one value beside 0.
    """
    union: np.ndarray | None = None
    for file in files_in_order(folder):
        mask, _ = read_codes(file)
        if len(values := np.unique(mask[mask != 0])) > 1:
            raise DataError(
                f"{file}: expected 0 and one value in the mask of an object, got {some_of(map(str, values))}"
            )
        if union is None:
            union = np.zeros(mask.shape, np.uint8)
        if mask.shape != union.shape:
            raise DataError(f"{file}: expected the size of the other masks, {union.shape}, got {mask.shape}")
        union[mask != 0] = 255
    assert union is not None
    return union
