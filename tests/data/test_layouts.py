"""Data folders as people have them: each reads as the same images and labels, or is refused by what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from image_files import noise, save
from layout_files import (
    COLOURS,
    COUNT,
    NAMES,
    SIZE,
    a_folder_each,
    coco,
    five_channels,
    folder,
    ignored_border,
    instances,
    labelme,
    make,
    masks_of_objects,
    masks_of_sections,
    names,
    palette,
    picture,
    rois,
    sides,
    stack,
    truth,
    with_border,
    yolo,
    yolo_with_yaml,
)
from stack_files import write_dicom, write_gif, write_nifti, write_ome, write_pages, write_zarr

from fastunet.checks import ConfigError, DataError
from fastunet.data import IGNORED, DataOptions, SegmentationDataset, find_pairs, inspect, split
from fastunet.data.survey import survey


@dataclass(frozen=True)
class Layout:
    """How a folder is written, how it is read, and the labels that it then has."""

    write: Callable[[Path], None]
    options: DataOptions = field(default_factory=DataOptions)
    classes: int = 2
    truth_of: Callable[[np.ndarray], np.ndarray] = lambda labels: labels
    data: str = ""  # below the folder


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
    "YOLO's data.yaml, names by number": Layout(
        lambda root: yolo_with_yaml(
            root, "path: .\ntrain: images/train\nval: images/val\nnames: {1: cell nucleus, 0: cell}"
        ),
        classes=3,
        data="data.yaml",
    ),
    "YOLO's data.yaml, folders of sides": Layout(
        lambda root: yolo_with_yaml(
            root, "train: ../train/images\nval: ../val/images\nnames: [cell, cell nucleus]", "{}/images", "{}/labels"
        ),
        classes=3,
        data="data.yaml",
    ),
    "a folder for each image, a mask for each object": Layout(a_folder_each),
    "a folder of masks for each image": Layout(masks_of_objects),
    "a stack, and a mask for each section": Layout(masks_of_sections),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_reads_as_the_same_images_and_labels(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    layout.write(tmp_path)
    pairs = find_pairs(tmp_path / layout.data, layout.options)
    summary = inspect(pairs, options=layout.options)
    assert len({pair.stem for pair in pairs}) == COUNT
    assert not survey(tmp_path / layout.data, layout.options).notes
    assert summary.classes == (1 if layout.classes == 2 else layout.classes)
    assert summary.ignored == bool(layout.options.ignore)
    dataset = SegmentationDataset(pairs, summary)
    for index, pair in enumerate(pairs):
        if pair.image.suffix != ".webp":  # lossy
            np.testing.assert_array_equal(pair.read_image()[..., 0], picture(index))
        expected = layout.truth_of(truth(index, layout.classes))
        np.testing.assert_array_equal(dataset[index][1], expected)
        assert IGNORED in expected or not summary.ignored


STACKS = (("images", 7), ("masks", 6))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "instance labels": (instances, r"looks like instance labels.*--threshold 1 .*--classes"),
    "lossy masks": (LAYOUTS["lossy masks"].write, r"JPEG is lossy: masks hold \d+ values; --threshold 128"),
    "values": (LAYOUTS["any values"].write, r"got 0, 127, 254 \(all masks .*: --labels 0,127,254$"),
    "colours": (
        LAYOUTS["colours"].write,
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
        LAYOUTS["other names of folders"].write,
        r"images: expected a folder, got nothing there: the folders there are raw, truth; name yours by --images",
    ),
    "YOLO's data.yaml": (
        lambda root: (root / "data.yaml").write_text(""),
        r"expected a folder, got nothing there: YOLO's data\.yaml may be DATA: .*yaml$",
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
    "masks of sections that are missing": (
        lambda root: masks_of_sections(root, count=3),
        r"masks/s: expected 4 masks, one for each section of s\.tif, got 3",
    ),
    "objects of two values": (
        lambda root: (masks_of_objects(root), save(root / "masks/field_1/0.png", truth(1, 3))),
        r"field_1/0\.png: expected 0 and one value in the mask of an object, got 1, 2",
    ),
    "objects of other sizes": (
        lambda root: (masks_of_objects(root), save(root / "masks/field_1/1.png", truth(1, 2)[1:])),
        r"field_1/1\.png: expected the size of the other masks, \(40, 48\), got \(39, 48\)",
    ),
    "fractions": (
        LAYOUTS["soft masks"].write,
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


BAD_YAML = {
    "a list of files": (
        "train: train.txt\nnames: [a]",
        r"data\.yaml: expected a folder named images, .* got 'train.txt'",
    ),
    "no sides": ("names: [a]", r"as train, got None: put the images there"),
    "no names": ("train: images/train", r"expected names, a list or numbered from 0, got None"),
    "gaps": ("train: images/train\nnames: {1: a}", r"expected names, a list or numbered from 0, got \{1: 'a'\}"),
    "no settings": ("a", r"expected settings by name \(train, val, names\), got str"),
    "no YAML": ("a: [", r"data\.yaml: expected YAML, got: "),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_a_data_yaml_that_is_not_read_is_refused(name: str, tmp_path: Path) -> None:
    text, message = BAD_YAML[name]
    yolo_with_yaml(tmp_path, text)
    with pytest.raises(DataError, match=message):
        find_pairs(tmp_path / "data.yaml")


def test_sides_of_a_data_yaml_are_kept(tmp_path: Path) -> None:
    layout = LAYOUTS["YOLO's data.yaml, folders of sides"]
    layout.write(tmp_path)
    pairs = find_pairs(tmp_path / "data.yaml")
    assert [pair.stem for pair in split(pairs, 0.5)[1]] == ["val/field_3"]
    assert pairs[0].names == NAMES


def test_names_are_those_of_the_yaml_that_is_given(tmp_path: Path) -> None:
    """Whatever its name, however deep the labels lie below it, and whatever else is there."""
    yolo_with_yaml(tmp_path, "train: images/a/b/c/train\nnames: [x, y, z]", "images/a/b/c/{}", "labels/a/b/c/{}")
    (tmp_path / "data.yaml").rename(tmp_path / "cells.yml")
    (tmp_path / "labels/a/b/c/data.yaml").write_text("names: [other]")
    pairs = find_pairs(tmp_path / "cells.yml")
    summary = inspect(pairs)
    assert (pairs[0].names, summary.classes) == (("x", "y", "z"), 4)
    assert set(np.unique(summary.labels_of(pairs[0]))) == {0, 1, 2}
    with pytest.raises(DataError, match="expected classes p, q, got 'x'"):
        find_pairs(tmp_path / "cells.yml", names=("p", "q"))


def test_values_of_masks_in_a_folder_are_explained(tmp_path: Path) -> None:
    masks_of_sections(tmp_path)
    for file in (tmp_path / "masks" / "s").iterdir():
        save(file, truth(0, 2) * 127)
    with pytest.raises(DataError, match=r"if these are the classes: --labels 0,127"):
        inspect(find_pairs(tmp_path))


def test_instances_train_as_foreground_or_as_classes_where_asked(tmp_path: Path) -> None:
    instances(tmp_path)
    options = DataOptions(threshold=1)
    pairs = find_pairs(tmp_path, options)
    summary = inspect(pairs, options=options)
    assert (summary.classes, summary.mask_values) == (1, (0, 1))
    assert set(np.unique(summary.labels_of(pairs[0]))) == {0, 1}
    assert inspect(pairs, classes=8).classes == 8


def test_organs_in_one_part_each_are_classes(tmp_path: Path) -> None:
    instances(tmp_path, [5] * COUNT)
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
