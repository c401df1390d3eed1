"""YOLO's data.yaml: the names of classes, and the folders of images on both sides of a split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fastunet.checks import DataError

DATA_YAML = "data.yaml"
LIST = "classes.txt"  # a name a line
ABOVE = 3  # folders from that of the labels upwards: labels/, labels/train/ and train/labels/ are below data.yaml


def names_above(labels: Path) -> list[str]:
    """Return the names of classes from classes.txt or data.yaml beside a file of labels, or above it; none without."""
    for folder in list(labels.parents)[:ABOVE]:
        if (listed := folder / LIST).is_file():
            return [name for name in listed.read_text().splitlines() if name.strip()]
        if (found := folder / DATA_YAML).is_file():
            return _names(found, _read(found))
    return []


def names_in(path: Path) -> list[str]:
    """Return the names of classes in a data.yaml, or a file like it. Raises DataError where it has none."""
    return _names(path, _read(path))


def folders_of(path: Path) -> dict[str, tuple[Path, Path]]:
    """Return the folders of images and labels of train and val, as data.yaml names those of images.

    The labels are where YOLO looks for them: below labels/ in the place of the last images/.

    Raises:
        DataError: an unreadable file, or sides that are not named by folders.
    """
    settings = _read(path)
    root = path.parent / str(settings.get("path") or "")
    sides: dict[str, tuple[Path, Path]] = {}
    for side in ("train", "val"):
        named = settings.get(side)
        if named is None and side == "val":
            continue
        # As some programs write it, ../train/images is beside data.yaml.
        places = [] if not isinstance(named, str) else [root / named, root / named.removeprefix("../")]
        images = next((place for place in places if place.is_dir()), None)
        if images is None or "images" not in images.parts:
            raise DataError(
                f"{path}: expected a folder named images, or below one, as {side}, got {named!r}: put the images "
                "there, their labels in labels/ beside it"
            )
        last = len(images.parts) - 1 - images.parts[::-1].index("images")
        sides[side] = images, Path(*images.parts[:last], "labels", *images.parts[last + 1 :])
    return sides


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: expected YAML, got: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected settings by name (train, val, names), got {type(found).__name__}")
    return found


def _names(path: Path, settings: dict[str, Any]) -> list[str]:
    names = settings.get("names")
    listed = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(listed, dict) or sorted(listed) != list(range(len(listed))) or not listed:
        raise DataError(f"{path}: expected names, a list or numbered from 0, got {names!r}")
    return [str(listed[number]) for number in range(len(listed))]
