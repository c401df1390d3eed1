"""Data folders as people have them: each reads as the same images and labels, or is refused by what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

pytest.importorskip("kornia", reason="needs the extra train")

import numpy as np
import tifffile
from image_files import noise, save
from PIL import Image
from stack_files import write_dicom, write_gif, write_nifti, write_ome, write_pages, write_stacks, write_zarr

from fastunet.checks import ConfigError, DataError
from fastunet.data import IGNORED, DataOptions, SegmentationDataset, find_pairs, inspect, split

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


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_reads_as_the_same_images_and_labels(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    layout.write(tmp_path)
    pairs = find_pairs(tmp_path, layout.options)
    summary = inspect(pairs, options=layout.options)
    assert len({pair.stem for pair in pairs}) == COUNT
    assert summary.classes == (1 if layout.classes == 2 else layout.classes)
    assert summary.ignored == bool(layout.options.ignore)
    dataset = SegmentationDataset(pairs, summary)
    for index, pair in enumerate(pairs):
        if pair.image.suffix != ".webp":  # lossy
            np.testing.assert_array_equal(pair.read_image()[..., 0], picture(index))
        expected = layout.truth_of(truth(index, layout.classes))
        np.testing.assert_array_equal(dataset[index][1], expected)
        assert IGNORED in expected or not summary.ignored


def instances(root: Path) -> None:
    """Of each image the objects have numbers of their own: 4, 5, 6 and 7."""
    folder(root)
    for index, stem in enumerate(names()):
        mask = np.zeros(SIZE, np.uint8)
        for number in range(4 + index):
            mask[2:20, 6 * number : 6 * number + 4] = number + 1
        save(root / "masks" / f"{stem}.png", mask)


STACKS = (("images", 7), ("masks", 6))


def make(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "instance labels": (instances, r"looks like instance labels.*--threshold 1 .*--classes"),
    "lossy masks": (
        lambda root: folder(root, masks="masks/{}.jpg"),
        r"JPEG is lossy: masks hold \d+ values; --threshold 128",
    ),
    "values": (
        lambda root: folder(root, lambda labels: labels * 127, 3),
        r"got 0, 127, 254 \(all masks .*: --labels 0,127,254$",
    ),
    "colours": (
        lambda root: folder(root, lambda labels: COLOURS[labels], 3),
        r"looks like a colour for each class: --labels 0:0:0,0:0:255,255:0:0, the background's first",
    ),
    "a picture": (
        lambda root: folder(root, lambda labels: noise((*SIZE, 3))),
        r"\d+ colours are rather a picture than a mask",
    ),
    "grey levels": (
        lambda root: folder(root, lambda labels: noise(SIZE)),
        r"256 values are rather grey levels than classes: --threshold 127\?",
    ),
    "a suffix": (lambda root: folder(root, masks="masks/{}_seg.png"), r"none for 4: .*: --mask-suffix _seg$"),
    "names of folders": (
        lambda root: folder(root, images="raw/{}.png", masks="truth/{}.png"),
        r"images: expected a folder, got nothing there: the folders there are raw, truth; name yours by --images",
    ),
    "stacks of unequal length": (
        lambda root: [np.save(make(root / kind) / "s.npy", np.zeros((n, *SIZE), "u1")) for kind, n in STACKS],
        r"masks/s\.npy: expected 7 sections as of s\.npy, got a stack of 6 sections",
    ),
    "a stack of one mask": (
        lambda root: (
            write_pages(make(root / "images") / "s.tif", noise((7, *SIZE))),
            save(root / "masks/s.png", noise(SIZE)),
        ),
        r"s\.tif: expected one image, got a stack of shape .* which is 7 sections",
    ),
    "fractions": (
        lambda root: folder(root, lambda labels: labels * np.float32(0.9), masks="masks/{}.tif"),
        r"expected whole numbers in a mask, got 0\.\d+: of a soft mask, --threshold 0\.5",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named_by_its_likely_cause(name: str, tmp_path: Path) -> None:
    write, message = REFUSED[name]
    write(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        inspect(find_pairs(tmp_path))
    assert "\n" not in str(caught.value)


def test_instances_train_as_foreground_or_as_classes_where_asked(tmp_path: Path) -> None:
    instances(tmp_path)
    options = DataOptions(threshold=1)
    pairs = find_pairs(tmp_path, options)
    summary = inspect(pairs, options=options)
    assert (summary.classes, summary.mask_values) == (1, (0, 1))
    assert set(np.unique(summary.labels_of(pairs[0]))) == {0, 1}
    assert inspect(pairs, classes=8).classes == 8


def test_organs_in_one_part_each_are_classes(tmp_path: Path) -> None:
    folder(tmp_path)
    for stem in names():
        mask = np.zeros(SIZE, np.uint8)
        for number in range(5):
            mask[2:20, 6 * number : 6 * number + 4] = number + 1
        save(tmp_path / "masks" / f"{stem}.png", mask)
    assert inspect(find_pairs(tmp_path)).classes == 6


def test_folders_of_a_split_are_its_sides(tmp_path: Path) -> None:
    sides(tmp_path)
    train, val = split(find_pairs(tmp_path), 0.75)
    assert [pair.stem for pair in train] == [f"train/field_{index}" for index in range(3)]
    assert [pair.stem for pair in val] == ["val/field_3"]
    within = tmp_path / "within"
    for name in names():
        side = "val" if name == "field_0" else "train"
        for kind in ("images", "masks"):
            save(within / kind / side / f"{name}.png", truth(0, 2))
    assert [pair.stem for pair in split(find_pairs(within), 0.25)[1]] == ["val/field_0"]


def test_grey_beside_rgb_is_converted(tmp_path: Path) -> None:
    def of(index: int) -> np.ndarray:
        return picture(index) if index else noise((*SIZE, 3))

    folder(tmp_path, picture_of=of)
    pairs = find_pairs(tmp_path)
    summary = inspect(pairs)
    assert (summary.channels, summary.mixed) == (3, True)
    image = SegmentationDataset(pairs, summary)[1][0]
    assert image.shape == (3, *SIZE)
    assert (image[0] == image[2]).all()


BAD_OPTIONS = [
    (DataOptions(labels="0,a"), r"labels: expected values such as .*got 'a'"),
    (DataOptions(labels="0,1,1"), "labels: expected each value once"),
    (DataOptions(labels="0,256:0:0"), "got '256:0:0'"),
    (DataOptions(labels="-1,0"), "labels: expected values from 0 to 65535, .* got -1,0"),
    (DataOptions(labels="0"), "labels: expected 2 to 255 values, got 1"),
    (DataOptions(labels="0,1:2:3"), "labels, ignore: expected numbers or colours, got both"),
    (DataOptions(labels="0,1", ignore="1"), "ignore: expected values that are none of the labels, got 1"),
    (DataOptions(labels="0,1", threshold=1), "labels: expected none beside a threshold"),
    (DataOptions(masks="images"), "mask_suffix: expected what tells masks from images"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_options_that_contradict_each_other_are_refused(options: DataOptions, message: str, tmp_path: Path) -> None:
    folder(tmp_path)
    with pytest.raises(ConfigError, match=message):
        find_pairs(tmp_path, options)
    good = DataOptions(labels="0,255")
    with pytest.raises(ConfigError, match=r"classes: expected 2 as of labels 0,255, got 3"):
        inspect(find_pairs(tmp_path, good), 3, good)


def test_a_mask_that_has_changed_is_named(tmp_path: Path) -> None:
    layout = LAYOUTS["any values"]
    layout.write(tmp_path)
    pairs = find_pairs(tmp_path, layout.options)
    summary = inspect(pairs, options=layout.options)
    save(pairs[1].mask, np.full(SIZE, 5, np.uint8))
    with pytest.raises(DataError, match=r"field_1\.png: mask: expected 0, 127, 254, got 5"):
        SegmentationDataset(pairs, summary)
    assert replace(summary, labels=(0, 5, 127, 254)).labels_of(pairs[1]).max() == 1


def test_labels_may_be_larger_than_a_mask_holds(tmp_path: Path) -> None:
    """Of 16-bit masks those without large values are often written with 8."""
    options = DataOptions(labels="300,1,7", ignore="9")
    folder(tmp_path, lambda labels: np.array([300, 1, 7], np.uint16)[labels], 3)
    small = np.full(SIZE, 7, np.uint8)
    small[0] = 9
    save(tmp_path / "masks" / "field_1.png", small)
    pairs = find_pairs(tmp_path, options)
    summary = inspect(pairs, options=options)
    np.testing.assert_array_equal(summary.labels_of(pairs[0]), truth(0, 3))
    assert summary.labels_of(pairs[1])[:2, 0].tolist() == [IGNORED, 2]


def test_arrays_of_zarr_are_images_whatever_is_in_them(tmp_path: Path) -> None:
    folder(tmp_path)
    for kind, pixels in (("images", picture(9)), ("masks", truth(1, 2) * 255)):
        array = tmp_path / kind / "within" / "field_9.zarr"
        write_zarr(array, pixels)
        save(array / "c" / "preview.png", picture(0))
    pairs = find_pairs(tmp_path)
    assert [pair.stem for pair in pairs] == [*names(), "within/field_9"]
    assert inspect(pairs).classes == 1
    np.testing.assert_array_equal(pairs[-1].read_image()[..., 0], picture(9))
