"""Outlines of COCO, labelme, YOLO and ImageJ: what they cover, in which classes, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import noise, save

from fastunet.checks import ConfigError, DataError, MissingPackageError
from fastunet.data import DataOptions, find_pairs, inspect
from fastunet.data.outlines import draw, names_of

SIZE = (20, 30)


def shape(label: str, points: list, kind: str = "polygon") -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind}


def labelme(path: Path, *shapes: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"shapes": shapes}))
    return path


def test_the_last_outline_is_on_top_and_background_is_none(tmp_path: Path) -> None:
    def box(left: float, right: float) -> list:
        return [[left, 2], [right, 2], [right, 10], [left, 10]]

    shapes = [shape("cell", box(0, 12)), shape("rim", box(4, 8)), shape("_background_", box(6, 7))]
    file = labelme(tmp_path / "a.json", *shapes)
    names = names_of([file])
    assert names == ("cell", "rim")
    found = draw(file, "a", names, SIZE)
    assert found[5].tolist() == [1] * 4 + [2] * 2 + [0] + [2] + [1] * 4 + [0] * 18
    assert not found[:2].any()
    assert not found[10:].any()


def test_a_pixel_belongs_to_an_outline_that_holds_its_centre(tmp_path: Path) -> None:
    file = labelme(tmp_path / "a.json", shape("cell", [[1.4, 0], [3.6, 0], [3.6, 2], [1.4, 2]]))
    assert draw(file, "a", ("cell",), SIZE)[0, :5].tolist() == [0, 1, 1, 1, 0]
    beyond = labelme(tmp_path / "b.json", shape("cell", [[-5, -5], [1e6, -5], [1e6, 1e6], [-5, 1e6]]))
    assert draw(beyond, "b", ("cell",), SIZE).all()


def test_a_circle_is_round(tmp_path: Path) -> None:
    file = labelme(tmp_path / "a.json", shape("cell", [[10, 10], [10, 16]], "circle"))
    y, x = np.mgrid[:20, :30] + 0.5
    distance = np.hypot(x - 10, y - 10)
    found = draw(file, "a", ("cell",), SIZE)
    # Of 64 corners on a radius of 6, the edges come within 6 cos(pi / 64) = 5.993 of the centre.
    assert found[distance < 5.99].all()
    assert not found[distance > 6].any()


def test_a_hole_in_a_roi_is_left_out(tmp_path: Path) -> None:
    roifile = pytest.importorskip("roifile", reason="needs the extra imagej")
    rois = [roifile.ImagejRoi() for _ in range(2)]
    for roi, kind, edges in zip(rois, ("RECT", "OVAL"), ((1, 2, 9, 12), (10, 20, 16, 28)), strict=True):
        roi.roitype = roifile.ROI_TYPE[kind]
        roi.top, roi.left, roi.bottom, roi.right = edges
    roifile.roiwrite(tmp_path / "a.zip", rois)
    found = draw(tmp_path / "a.zip", "a", ("foreground",), SIZE)
    assert found[1:9, 2:12].all()
    assert found.sum() - 80 == found[10:16, 20:28].sum() > 30
    roi = roifile.ImagejRoi()
    roi.roitype = roifile.ROI_TYPE.RECT
    outer, inner = ([[0, 0], [n, 0], [n, n], [0, n]] for n in (8, 4))
    path = [value for corners in (outer, inner) for value in _path(corners)]
    roi.multi_coordinates = np.array(path, np.float32)
    roi.bottom, roi.right, roi.shape_roi_size = 8, 8, len(path)
    roi.tofile(tmp_path / "b.roi")
    found = draw(tmp_path / "b.roi", "b", ("foreground",), SIZE)
    assert found.sum() == 64 - 16
    assert not found[:4, :4].any()


def _path(corners: list[list[int]]) -> list[float]:
    """A closed path as ImageJ writes it: move to, lines to, close."""
    first, *others = corners
    return [0, *first, *(value for corner in others for value in (1, *corner)), 4]


def coco(**changes: Any) -> dict[str, Any]:
    annotation = {"image_id": 1, "category_id": 3, "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]]}
    return {
        "images": [{"id": 1, "file_name": "some/where/a.png"}],
        "categories": [{"id": 8, "name": "a"}, {"id": 3, "name": "z"}],
        "annotations": [annotation | changes],
    }


def test_classes_are_in_the_order_of_their_numbers_and_a_model_keeps_its_own(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png", noise(SIZE))
    (tmp_path / "truth.json").write_text(json.dumps(coco()))
    options = DataOptions(masks="truth.json")
    (pair,) = find_pairs(tmp_path, options)
    assert pair.names == ("z", "a")
    summary = inspect([pair], options=options)
    assert (summary.classes, summary.names, summary.mask_values) == (3, ("z", "a"), (0, 1))
    (pair,) = find_pairs(tmp_path, options, ("a", "z"))
    assert set(np.unique(summary.labels_of(pair))) == {0, 2}
    with pytest.raises(DataError, match=r"truth\.json: expected classes a, b, got 'z'"):
        find_pairs(tmp_path, options, ("a", "b"))
    with pytest.raises(ConfigError, match=r"classes: expected 3, the background and a, z, got 2"):
        inspect([pair], 2, options)
    for change in ({"labels": "0,1"}, {"ignore": "5"}, {"threshold": 1.0}):
        with pytest.raises(ConfigError, match=f"{next(iter(change))}: expected none beside outlines"):
            find_pairs(tmp_path, DataOptions(masks="truth.json", **change))
    save(tmp_path / "images" / "b.png", noise(SIZE))
    with pytest.raises(DataError, match=r"truth\.json: expected a file for each of 2 stems, got none for 1: b\.png"):
        find_pairs(tmp_path, options)


def test_more_classes_than_labels_are_refused(tmp_path: Path) -> None:
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, 256)]
    (tmp_path / "a.json").write_text(json.dumps({**coco(), "categories": categories}))
    with pytest.raises(DataError, match=r"a\.json: expected at most 254 classes, got 255 names"):
        names_of([tmp_path / "a.json"])


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("hb0", [600]),  # 24, 18 and, as the fifth bit of 18 is no sign, 0
        ("0hb0", [0, 600]),
        ("532[b0", [5, 3, 2, 590]),  # the last as the difference to 3
        ("5\\92nFi8", [5, 300, 2, 10, 283]),  # -290, by its sign
    ],
)
def test_compressed_runs_are_read_as_coco_writes_them(text: str, runs: list[int], tmp_path: Path) -> None:
    """Transcribed from rleToString of COCO's maskApi.c."""
    (tmp_path / "a.json").write_text(json.dumps(coco(segmentation={"counts": text, "size": list(SIZE)})))
    expected = np.repeat(np.arange(len(runs)) % 2, runs).reshape(SIZE[::-1]).T
    np.testing.assert_array_equal(draw(tmp_path / "a.json", "a", ("z", "a"), SIZE), expected)


REFUSED: dict[str, tuple[str, Any, str]] = {
    "a box of YOLO": ("a.txt", "0 0.5 0.5 0.1 0.1", "as of yolo, got: a box in line 1, and not a polygon"),
    "pixels in YOLO": ("a.txt", "0 10 20 30 40 50 60", "60 in line 1, and not shares of width and height"),
    "words in YOLO": ("a.txt", "cell 0 0 1 0 1 1", "as of yolo, got: invalid literal"),
    "no JSON": ("a.json", "{", "expected JSON of COCO or labelme, got: Expecting"),
    "other JSON": ("a.json", {"features": []}, "expected JSON of COCO .* got neither"),
    "a line": ("a.json", {"shapes": [shape("x", [[0, 0], [1, 1]], "line")]}, "as of labelme, got: a line, and not a"),
    "two corners": ("a.json", {"shapes": [shape("x", [[0, 0], [1, 1]])]}, "a polygon of 2 corners"),
    "no corners": ("a.json", {"shapes": [{"label": "x"}]}, "as of labelme, got: KeyError 'points'"),
    "no class": ("a.json", coco(category_id=99), "as of coco, got: KeyError 99"),
    "a box alone": ("a.json", coco(segmentation=[]), "as of coco, got: an annotation of z without an outline"),
    "no runs": ("a.json", coco(segmentation={"counts": []}), "an annotation of z without an outline"),
    "no compressed runs": ("a.json", coco(segmentation={"counts": ""}), "an annotation of z without an outline"),
    "a letter in runs": ("a.json", coco(segmentation={"counts": "~"}), "'~' in compressed runs"),
    "runs of another size": ("a.json", coco(segmentation={"counts": [5, 5]}), "runs of 10 pixels for .* 20 x 30"),
    "an image of another size in COCO": (
        "a.json",
        {**coco(), "images": [{"id": 1, "file_name": "a.png", "height": 30, "width": 20}]},
        "expected outlines on 20 x 30 pixels, got: outlines on 30 x 20",
    ),
    "an image of another size in labelme": (
        "a.json",
        {"shapes": [shape("x", [[0, 0], [9, 0], [9, 9]])], "imageHeight": 40, "imageWidth": 60},
        "expected outlines on 20 x 30 pixels, got: outlines on 40 x 60",
    ),
    "a broken ROI": ("a.roi", "Iout", "expected outlines as of roi, got: "),
    "nothing": ("a.json", {"shapes": []}, "expected outlines of at least one class, got none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_outlines_that_cannot_be_drawn_are_named(name: str, tmp_path: Path) -> None:
    file, content, message = REFUSED[name]
    path = tmp_path / file
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=rf"{file}: .*{message}") as caught:
        draw(path, "a", names_of([path]), SIZE)
    assert "\n" not in str(caught.value)


def test_a_roi_without_an_area_is_refused_and_the_package_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roifile = pytest.importorskip("roifile", reason="needs the extra imagej")
    roi = roifile.ImagejRoi.frompoints([[1, 1], [5, 5], [9, 1]], name="one")
    roi.roitype = roifile.ROI_TYPE.POLYLINE
    roi.tofile(tmp_path / "a.roi")
    with pytest.raises(DataError, match=r"a\.roi: .*a POLYLINE named 'one', which has no area"):
        names_of([tmp_path / "a.roi"])
    monkeypatch.setitem(sys.modules, "roifile", None)
    with pytest.raises(MissingPackageError, match=r"a\.roi: .*'fastunet\[imagej\]'"):
        names_of([tmp_path / "a.roi"])


def test_masks_go_before_what_lies_beside_them(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        save(tmp_path / folder / "a.png", noise(SIZE))
    (tmp_path / "masks" / "a.txt").write_text("notes")
    assert [pair.mask.name for pair in find_pairs(tmp_path)] == ["a.png"]
