"""Data folders for tests, laid out as people have them: of the same images and labels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from image_files import noise, save
from PIL import Image
from stack_files import write_pages

SIZE = (40, 48)
COUNT = 4
COLOURS = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255)], np.uint8)


def picture(index: int) -> np.ndarray:
    return noise(SIZE, seed=index)


def truth(index: int, classes: int) -> np.ndarray:
    """Labels of an image: a square of each class but the first, in places of its own."""
    labels = np.zeros(SIZE, np.uint8)
    for label in range(1, classes):
        top, left = 4 + index, 14 * label - 8
        labels[top : top + 12, left : left + 8 + index] = label
    return labels


def make(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def names() -> list[str]:
    return [f"field_{index}" for index in range(COUNT)]


def folder(
    root: Path,
    mask_of: Callable[[np.ndarray], np.ndarray] = lambda labels: labels * 255,
    classes: int = 2,
    images: str = "images/{}.png",
    masks: str = "masks/{}.png",
    picture_of: Callable[[int], np.ndarray] = picture,
) -> None:
    """Write images and masks under names with a place for the stem."""
    for index, stem in enumerate(names()):
        save(root / images.format(stem), picture_of(index))
        save(root / masks.format(stem), mask_of(truth(index, classes)))


def sides(root: Path) -> None:
    for index, stem in enumerate(names()):
        side = "train" if index < 3 else "val"
        save(root / side / "images" / f"{stem}.png", picture(index))
        save(root / side / "masks" / f"{stem}.png", truth(index, 2))
    save(root / "test" / "images" / "other.png", picture(0))  # without a mask, and no side's


def with_border(labels: np.ndarray) -> np.ndarray:
    """Values of 0 and 1, and 255 in the first rows."""
    mask = labels.copy()
    mask[:3] = 255
    return mask


def ignored_border(labels: np.ndarray) -> np.ndarray:
    return with_border(np.where(labels > 0, 1, 0).astype(np.uint8))


def palette(root: Path) -> None:
    folder(root)
    for index, stem in enumerate(names()):
        mask = Image.fromarray(truth(index, 3))
        mask.putpalette(COLOURS.tobytes())
        mask.save(root / "masks" / f"{stem}.png")


def five_channels(root: Path) -> None:
    """As OME-TIFF has them: of each image the first is the picture."""
    for index, stem in enumerate(names()):
        channels = np.stack([picture(index), *noise((4, *SIZE))])
        save(root / f"images/{stem}.ome.tif", channels, photometric="minisblack", metadata={"axes": "CYX"})
        save(root / f"masks/{stem}.ome.png", truth(index, 2))


def stack(root: Path, name: str, write: Callable[[Path, np.ndarray], object], masks: str = "") -> None:
    """Write one file of all images, and one of all masks."""
    write(make(root / "images") / name, np.stack([picture(index) for index in range(COUNT)]))
    write(make(root / "masks") / (masks or name), np.stack([truth(index, 2) for index in range(COUNT)]))


NAMES = ("cell", "cell nucleus")


def squares(index: int) -> list[tuple[str, np.ndarray]]:
    """The class and the corners (x, y) of the squares of `truth`."""
    found = []
    for label, name in enumerate(NAMES, 1):
        rows, columns = np.nonzero(truth(index, 3) == label)
        left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        found.append((name, np.array([(left, top), (right, top), (right, bottom), (left, bottom)], float)))
    return found


def only_images(root: Path, folder: str = "images") -> None:
    for index, stem in enumerate(names()):
        save(root / folder / f"{stem}.png", picture(index))


def coco(root: Path) -> None:
    """Nucleus has the lower number, and is written as runs."""
    only_images(root)
    images, annotations = [], []
    for index, stem in enumerate(names()):
        images.append({"id": 10 + index, "file_name": f"{stem}.png", "height": SIZE[0], "width": SIZE[1]})
        (_, corners), _ = squares(index)
        mask = (truth(index, 3) == 2).T.ravel()
        edges = np.flatnonzero(np.diff(mask.astype(int))) + 1
        runs = np.diff([0, *edges, mask.size]).tolist()
        common = {"image_id": 10 + index}
        annotations += [
            {"category_id": 7, "segmentation": [corners.ravel().tolist()], **common},
            {"category_id": 9, "segmentation": {"counts": runs, "size": list(SIZE)}, **common},
        ]
    categories = [{"id": 7, "name": "cell"}, {"id": 9, "name": "cell nucleus"}]
    found = {"images": images, "annotations": annotations, "categories": categories}
    (root / "truth.json").write_text(json.dumps(found))


def labelme(root: Path) -> None:
    only_images(root, ".")
    for index, stem in enumerate(names()):
        (cell, corners), (nucleus, others) = squares(index)
        shapes = [
            {"label": cell, "points": corners.tolist(), "shape_type": "polygon"},
            {"label": nucleus, "points": others[[0, 2]].tolist(), "shape_type": "rectangle"},
        ]
        (root / f"{stem}.json").write_text(json.dumps({"shapes": shapes, "imagePath": f"{stem}.png"}))


def yolo(root: Path) -> None:
    only_images(root)
    (root / "labels").mkdir()
    (root / "labels" / "classes.txt").write_text("\n".join(NAMES))
    for index, stem in enumerate(names()):
        lines = [
            " ".join([str(NAMES.index(name)), *(f"{value:.9f}" for value in (corners / SIZE[::-1]).ravel())])
            for name, corners in squares(index)
        ]
        (root / "labels" / f"{stem}.txt").write_text("\n".join(lines))


def rois(root: Path) -> None:
    roifile = pytest.importorskip("roifile", reason="needs the extra imagej")
    only_images(root)
    (root / "masks").mkdir()
    for index, stem in enumerate(names()):
        roi = roifile.ImagejRoi.frompoints(squares(index)[0][1], name="one")
        roi.tofile(root / "masks" / f"{stem}.roi")


def yolo_with_yaml(root: Path, text: str, images: str = "images/{}", labels: str = "labels/{}") -> None:
    """Three images to train on and one to validate on."""
    yolo(root / "made")
    (root / "data.yaml").write_text(text)
    for index, stem in enumerate(names()):
        side = "train" if index < 3 else "val"
        for source, kind, suffix in (("images", images, "png"), ("labels", labels, "txt")):
            target = root / kind.format(side) / f"{stem}.{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(root / "made" / source / f"{stem}.{suffix}", target)
    shutil.rmtree(root / "made")


def objects_of(labels: np.ndarray) -> list[np.ndarray]:
    """Take the foreground apart, as masks of one object each, of which two lie over each other."""
    columns = np.flatnonzero(labels.any(0))
    first, second = labels.copy(), labels.copy()
    first[:, columns[len(columns) // 2 + 1] :] = 0
    second[:, : columns[len(columns) // 2 - 1]] = 0
    return [first, second * 255]


def a_folder_each(root: Path) -> None:
    """As the Data Science Bowl of 2018 has them."""
    for index, stem in enumerate(names()):
        save(root / stem / "images" / f"{stem}.png", picture(index))
        for number, mask in enumerate(objects_of(truth(index, 2))):
            save(root / stem / "masks" / f"{number}abc.png", mask)


def masks_of_objects(root: Path) -> None:
    only_images(root)
    for index, stem in enumerate(names()):
        for number, mask in enumerate(objects_of(truth(index, 2))):
            save(root / "masks" / stem / f"{number}.png", mask)


def masks_of_sections(root: Path, kind: str = "slice_{}.png", count: int = COUNT) -> None:
    """One stack of all images, and a file for the mask of each: as many as `count`, numbered 9, 10 and on."""
    write_pages(make(root / "images") / "s.tif", np.stack([picture(index) for index in range(COUNT)]))
    for index in range(count):
        save(root / "masks" / "s" / kind.format(9 + index), truth(min(index, COUNT - 1), 2))


def instances(root: Path, counts: Sequence[int] = (4, 5, 6, 7)) -> None:
    """Of each image the objects have numbers of their own, so many."""
    only_images(root)
    for count, stem in zip(counts, names(), strict=True):
        mask = np.zeros(SIZE, np.uint8)
        for number in range(count):
            mask[2:20, 6 * number : 6 * number + 4] = number + 1
        save(root / "masks" / f"{stem}.png", mask)
