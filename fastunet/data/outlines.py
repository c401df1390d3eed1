"""Masks that are drawn as outlines: COCO, labelme, YOLO and ImageJ's ROIs."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fastunet.checks import ConfigError, DataError, FastUNetError
from fastunet.data import yolo
from fastunet.data.images import by_stem, entries_of
from fastunet.data.layout import DataOptions
from fastunet.data.picture import DEFLATE, room_for
from fastunet.data.volumes import import_extra

SUFFIXES = (".json", ".txt", ".roi", ".zip")
BACKGROUND = ("background", "_background_")  # names of what is class 0
LINES = ("LINE", "FREELINE", "POLYLINE", "ANGLE", "POINT")  # ROIs without an area
CIRCLE = 64  # corners
MOST = 254  # classes beside the background that uint8 holds beside those that are ignored


@dataclass(frozen=True)
class Outline:
    """One object: polygons [N, 2] of x and y, from the upper left corner of the first pixel; or runs, as COCO's RLE."""

    name: str  # of its class
    polygons: tuple[np.ndarray, ...] = ()
    is_relative: bool = False  # x and y are shares of the width and height
    has_holes: bool = False  # where an even number of polygons lie over each other
    runs: tuple[int, ...] = ()  # lengths of background and foreground in turn, down the columns
    drawn_on: tuple[int, int] | None = None  # height and width of the image, where the file says it

    def mask(self, size: tuple[int, int]) -> np.ndarray:
        """Return the pixels [H, W] whose centres lie within, bool."""
        from skimage.draw import polygon2mask

        height, width = size
        if self.drawn_on not in (None, size):
            raise ValueError("outlines on {} x {}".format(*self.drawn_on))
        if self.runs:
            if sum(self.runs) != height * width or min(self.runs) < 0:
                raise ValueError(f"runs of {sum(self.runs)} pixels for an image of {height} x {width}")
            return np.repeat(np.arange(len(self.runs)) % 2 == 1, self.runs).reshape(width, height).T
        found = np.zeros(size, bool)
        for points in self.polygons:
            corners = points * (width, height) if self.is_relative else points
            inside = polygon2mask(size, corners[:, ::-1] - 0.5)
            found = found ^ inside if self.has_holes else found | inside
        return found


def annotation_files(folder: Path, stems: Iterable[str]) -> dict[str, Path]:
    """Map stem to file for the outlines of a folder, those within too; of one COCO file, for each of its images.

    Raises:
        DataError: two files of one stem, or a file that is not COCO's.
    """
    if folder.is_file():
        listed = {Path(stem).name for stem in _read(folder, "coco")[0]}
        return {stem: folder for stem in stems if Path(stem).name in listed}
    files = (file for file in entries_of(folder, nested=True) if file.suffix.lower() in SUFFIXES)
    return by_stem(folder, (file for file in files if file.name != yolo.LIST), lambda file: file.suffix)


def names_of(files: Iterable[Path], known: Sequence[str] = (), listed: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names of the classes in files of outlines but the background's: `known`, or in the order of the files.

    COCO and YOLO number their classes, and have them in that order; labelme does not, and has them by name. `listed`:
    YOLO's names by number, where they are not to be looked for above the files.

    Raises:
        DataError: a name that is not known, an unreadable file, no names, or more than labels have numbers.
    """
    found: dict[str, tuple[int, str]] = {}
    for file in dict.fromkeys(files):
        for name, number in _read(file, _kind_of(file), listed)[1].items():
            if known and name not in known and name not in BACKGROUND:
                raise DataError(f"{file}: expected classes {', '.join(known)}, got {name!r}")
            found.setdefault(name, (number, name))
    names = known or [name for name in sorted(found, key=lambda name: found[name]) if name not in BACKGROUND]
    if not names:
        raise DataError(f"{next(iter(files), 'data')}: expected outlines of at least one class, got none")
    if len(names) > MOST:
        raise DataError(f"{next(iter(files), 'data')}: expected at most {MOST} classes, got {len(names)} names")
    return tuple(names)


def draw(file: Path, stem: str, names: Sequence[str], size: tuple[int, int], listed: Sequence[str] = ()) -> np.ndarray:
    """Draw the outlines of an image as uint8 [H, W]: 0, and the place of each class among `names`, from 1; last on top.

    `listed`: as for `names_of`.

    Raises:
        DataError: an unreadable file.
    """
    kind = _kind_of(file)
    images, _ = _read(file, kind, listed)
    found = images[_entry_of(stem, images, file) if kind == "coco" else ""]
    labels = np.zeros(size, np.uint8)
    places = {name: place for place, name in enumerate(names, 1)} | dict.fromkeys(BACKGROUND, 0)
    try:
        for outline in found:
            labels[outline.mask(size)] = places[outline.name]
    except (ValueError, KeyError) as error:
        raise DataError(f"{file}: expected outlines on {size[0]} x {size[1]} pixels, got: {error}") from error
    return labels


def _entry_of(stem: str, images: Iterable[str], file: Path) -> str:
    """Return the stem of an image in COCO's list: the same, or one that differs in its folders alone."""
    found = [each for each in images if each == stem] or [each for each in images if Path(each).name == Path(stem).name]
    if len(found) != 1:
        raise DataError(f"{file}: expected one image named {stem}, got {len(found)}")
    return found[0]


# --- the formats ---


def _kind_of(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix != ".json":
        return "yolo" if suffix == ".txt" else "roi"
    return "labelme" if "shapes" in _json(file, file.stat().st_mtime_ns) else "coco"


def _read(file: Path, kind: str, listed: Sequence[str] = ()) -> tuple[dict[str, list[Outline]], dict[str, int]]:
    """Read outlines by the stem of their image, under "" in files of one image, and the numbers of classes, or 0.

    Raises DataError.
    """
    try:
        if kind == "coco":
            return _coco(file, file.stat().st_mtime_ns)
        names = (listed or yolo.names_above(file)) if kind == "yolo" else []
        outlines = _yolo(file, names) if kind == "yolo" else (_labelme if kind == "labelme" else _rois)(file)
    except FastUNetError:
        raise
    except Exception as error:  # whatever is missing in a broken file
        got = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        raise DataError(f"{file}: expected outlines as of {kind}, got: {' '.join(got.split())}") from error
    numbers = {name: number for number, name in enumerate(names)}
    found = (outline.name for outline in outlines)
    return {"": outlines}, numbers or {name: int(name) if name.isdecimal() else 0 for name in found}


@lru_cache(8)
def _json(file: Path, changed: int) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: expected JSON of COCO or labelme, got: {error}") from error
    if not isinstance(found, dict) or not {"shapes", "images"} & found.keys():
        raise DataError(f"{file}: expected JSON of COCO (images) or labelme (shapes), got neither")
    return found


@lru_cache(4)
def _coco(file: Path, changed: int) -> tuple[dict[str, list[Outline]], dict[str, int]]:
    data = _json(file, changed)
    names = {each["id"]: str(each["name"]) for each in data["categories"]}
    stems = {each["id"]: Path(each["file_name"]).with_suffix("").as_posix() for each in data["images"]}
    images: dict[str, list[Outline]] = {stem: [] for stem in stems.values()}
    sizes = {each["id"]: _size(each.get("height"), each.get("width")) for each in data["images"]}
    for each in data.get("annotations", []):
        outlines, name, size = each["segmentation"], names[each["category_id"]], sizes[each["image_id"]]
        if not outlines or (isinstance(outlines, dict) and not outlines["counts"]):
            raise ValueError(f"an annotation of {name} without an outline: a box alone does not tell which pixels")
        if isinstance(outlines, dict):
            runs = outlines["counts"]
            runs = _unpacked(runs) if isinstance(runs, str) else tuple(map(int, runs))
            outline = Outline(name, runs=runs, drawn_on=size)
        else:
            polygons = tuple(_points(np.reshape(part, (-1, 2))) for part in outlines)
            outline = Outline(name, polygons, drawn_on=size)
        images[stems[each["image_id"]]].append(outline)
    return images, {name: int(number) for number, name in names.items()}


def _unpacked(text: str) -> tuple[int, ...]:
    """Read the runs that COCO's tools write as text: 5 bits a character, the lowest first, the sixth where more follow.

    From the fourth on each run is the difference to the one but last.
    """
    runs: list[int] = []
    value = place = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{character!r} in compressed runs")
        value |= (bits & 31) << place
        place += 5
        if not bits & 32:
            value -= (bits & 16) << place - 4  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = place = 0
    return tuple(runs)


def _size(height: Any, width: Any) -> tuple[int, int] | None:
    """Return height and width of an image, None where a file has none, or 0 for it."""
    return (int(height), int(width)) if height and width else None


def _points(points: Any) -> np.ndarray:
    found = np.asarray(points, np.float64)
    if found.ndim != 2 or found.shape[1] != 2 or len(found) < 3 or not np.isfinite(found).all():
        raise ValueError(f"a polygon of {len(found)} corners that are not all x and y, and not 3 or more")
    return found


def _labelme(file: Path) -> list[Outline]:
    outlines = []
    data = _json(file, file.stat().st_mtime_ns)
    size = _size(data.get("imageHeight"), data.get("imageWidth"))
    for each in data["shapes"]:
        kind, points = each.get("shape_type") or "polygon", np.asarray(each["points"], np.float64)
        if kind == "rectangle":
            (left, top), (right, bottom) = points
            points = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
        elif kind == "circle":
            angles = np.linspace(0, 2 * math.pi, CIRCLE, endpoint=False)
            points = points[0] + math.dist(*points) * np.stack([np.cos(angles), np.sin(angles)], -1)
        elif kind != "polygon":
            raise ValueError(f"a {kind}, and not a polygon, rectangle or circle")
        outlines.append(Outline(str(each["label"]), (_points(points),), drawn_on=size))
    return outlines


def _yolo(file: Path, names: Sequence[str]) -> list[Outline]:
    outlines = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not (parts := line.split()):
            continue
        if len(parts) == 5:
            raise ValueError(f"a box in line {number}, and not a polygon: class, then x and y of each corner")
        place = int(parts[0])
        if place < 0 or (names and place >= len(names)):
            raise ValueError(f"class {place} in line {number}, of {len(names)}")
        points = _points(np.reshape(np.array(parts[1:], np.float64), (-1, 2)))
        if points.min() < 0 or points.max() > 1:
            raise ValueError(f"{points.max():g} in line {number}, and not shares of width and height")
        outlines.append(Outline(names[place] if names else str(place), (points,), is_relative=True))
    return outlines


def _rois(file: Path) -> list[Outline]:
    roifile = import_extra("roifile", "imagej", file)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            claimed = sum(each.file_size for each in archive.infolist())
        with room_for(file, (claimed,), 8, claimed, DEFLATE):
            pass
    found = roifile.roiread(file)
    outlines = []
    for roi in found if isinstance(found, list) else [found]:
        if roi.roitype.name in LINES:
            raise ValueError(f"a {roi.roitype.name} named {roi.name!r}, which has no area")
        polygons = tuple(_points(points) for points in roi.coordinates(multi=True))
        outlines.append(Outline("foreground", polygons, has_holes=True))
    return outlines


def check_options(options: DataOptions, file: Path) -> None:
    """Raise ConfigError on options that say what values of masks mean, where there are outlines instead."""
    for name in ("labels", "ignore", "threshold"):
        if (given := getattr(options, name)) not in ("", None):
            raise ConfigError(f"{name}: expected none beside outlines, whose classes have names, got {given}: {file}")
