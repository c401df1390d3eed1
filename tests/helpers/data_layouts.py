"""Data folders as people have them: how each is written, how it is read, and the labels it then has."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import tifffile
from image_files import noise, save
from PIL import Image
from stack_files import write_dicom, write_gif, write_nifti, write_ome, write_pages, write_stacks, write_zarr

from fastunet.data import DataOptions

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


@dataclass(frozen=True)
class Layout:
    """How a folder is written, how it is read, and the labels that it then has."""

    write: Callable[[Path], None]
    options: DataOptions = field(default_factory=DataOptions)
    classes: int = 2
    truth_of: Callable[[np.ndarray], np.ndarray] = lambda labels: labels


def sides(root: Path) -> None:
    for side, chosen in (("train", slice(0, 3)), ("val", slice(3, 4))):
        for index, stem in list(enumerate(names()))[chosen]:
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
    folder(root)
    for index, stem in enumerate(names()):
        (root / "images" / f"{stem}.png").unlink()
        channels = np.stack([picture(index), *noise((4, *SIZE))])
        tifffile.imwrite(
            root / "images" / f"{stem}.ome.tif", channels, photometric="minisblack", metadata={"axes": "CYX"}
        )
        (root / "masks" / f"{stem}.png").rename(root / "masks" / f"{stem}.ome.png")


def stack(root: Path, name: str, write: Callable[[Path, np.ndarray], object], masks: str = "") -> None:
    """Write one file of all images, and one of all masks."""
    write_stacks(
        root,
        {"images": name, "masks": masks or name},
        {"images": [picture(index) for index in range(COUNT)], "masks": [truth(index, 2) for index in range(COUNT)]},
        write,
    )


NAMES = ("cell", "nucleus")


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
    categories = [{"id": 7, "name": "cell"}, {"id": 9, "name": "nucleus"}]
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


LAYOUTS = {
    "images/ and masks/": Layout(folder),
    "other names of folders": Layout(
        lambda root: folder(root, images="raw/{}.png", masks="truth/{}.png"), DataOptions("raw", "truth")
    ),
    "a suffix, beside each other": Layout(
        lambda root: folder(root, images="{}.png", masks="{}_mask.png"), DataOptions(".", ".", "_mask")
    ),
    "nested": Layout(lambda root: folder(root, images="images/a/{}.png", masks="masks/a/{}.png")),
    "train/ and val/": Layout(sides),
    "any values": Layout(lambda root: folder(root, lambda labels: labels * 127, 3), DataOptions(labels="0,127,254"), 3),
    "1 and 2": Layout(lambda root: folder(root, lambda labels: labels + 1), DataOptions(labels="1,2")),
    "ignored values": Layout(
        lambda root: folder(root, with_border), DataOptions(ignore="255"), truth_of=ignored_border
    ),
    "colours": Layout(
        lambda root: folder(root, lambda labels: COLOURS[labels], 3),
        DataOptions(labels="0:0:0,255:0:0,0:0:255"),
        3,
    ),
    "palettes": Layout(palette, classes=3),
    "palettes by colour": Layout(palette, DataOptions(labels="0:0:0,255:0:0,0:0:255"), 3),
    "lossy masks": Layout(lambda root: folder(root, masks="masks/{}.jpg"), DataOptions(threshold=128)),
    "soft masks": Layout(
        lambda root: folder(root, lambda labels: labels * np.float32(0.9) + np.float32(0.05), masks="masks/{}.tif"),
        DataOptions(threshold=0.5),
    ),
    "GIF and WebP": Layout(lambda root: folder(root, images="images/{}.webp", masks="masks/{}.gif")),
    "a stack of pages": Layout(lambda root: stack(root, "s.tif", write_pages)),
    "a Z stack of OME": Layout(lambda root: stack(root, "s.ome.tif", write_ome)),
    "channels of OME": Layout(five_channels),
    "frames of GIF": Layout(lambda root: stack(root, "s.gif", write_gif)),
    "NPY": Layout(lambda root: stack(root, "s.npy", np.save)),
    "NIfTI": Layout(lambda root: stack(root, "s.nii.gz", write_nifti, "s.nii")),
    "Zarr": Layout(lambda root: stack(root, "s.zarr", write_zarr)),
    "DICOM": Layout(lambda root: stack(root, "s.dcm", write_dicom)),
    "COCO": Layout(coco, DataOptions(masks="truth.json"), 3),
    "labelme": Layout(labelme, DataOptions(".", "."), 3),
    "YOLO": Layout(yolo, DataOptions(masks="labels"), 3),
    "ROIs of ImageJ": Layout(rois),
}
