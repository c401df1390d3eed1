"""`fastunet check`: what a folder holds, what is odd about it, and every reason why it would be refused."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from command import error_of, fastunet
from image_files import noise, save, write_masks
from PIL import Image

from fastunet.checks import DataError
from fastunet.data import DataOptions
from fastunet.data.survey import survey


def write_data(root: Path, count: int = 5, last: int = 0) -> Path:
    """Images of which a quarter is foreground; `last` is the value of the last row."""
    mask = np.zeros((16, 20), np.uint8)
    mask[:8, :10], mask[-1] = 255, last
    return write_masks(root, mask, count)


def test_a_picture_of_names_with_odd_letters_is_drawn(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    for kind in ("images", "masks"):
        first, second = sorted((data / kind).iterdir())[:2]
        first.rename(first.with_name("a$_$b.png"))
        second.rename(os.fsdecode(os.fsencode(second.parent) + b"/caf\xe9.png"))
    assert fastunet("check", data, "--out", tmp_path / "c.png").returncode == 0
    assert Image.open(tmp_path / "c.png").size[0] > 1000


def test_a_picture_that_may_not_be_written_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    Path(data / "images" / "broken.png").write_text("no image")
    (tmp_path / "c.png").write_text("mine")
    assert "c.png: expected nothing there" in error_of("check", data, "--out", tmp_path / "c.png")
    assert (tmp_path / "c.png").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "names", "shares"),
    [
        (DataOptions(), ["background", "foreground"], [0.75, 0.25]),
        (DataOptions(labels="0,255"), ["background (0)", "foreground (255)"], [0.75, 0.25]),
        (DataOptions(threshold=200), ["background (below 200)", "foreground (from 200)"], [0.75, 0.25]),
        (DataOptions(ignore="7"), ["background", "foreground", "ignored"], [0.75 - 1 / 16, 0.25, 1 / 16]),
        (
            DataOptions(ignore="7", threshold=9),
            ["background (below 9)", "foreground (from 9)", "ignored"],
            [0.75 - 1 / 16, 0.25, 1 / 16],
        ),
        (DataOptions(labels="0,7,255"), ["class 0 (0)", "class 1 (7)", "class 2 (255)"], [0.6875, 0.0625, 0.25]),
    ],
)
def test_shares_follow_the_options(options: DataOptions, names: list[str], shares: list[float], tmp_path: Path) -> None:
    found = survey(write_data(tmp_path, last=7 if "7" in options.ignore + options.labels else 0), options)
    assert [(each.name, each.images) for each in found.shares] == [(name, 5) for name in names]
    np.testing.assert_allclose([each.share for each in found.shares], shares)
    assert (found.problems, found.notes, len(found.train), len(found.val)) == ([], [], 4, 1)


@pytest.mark.parametrize(
    ("ignored", "shares"), [("0", {"background": 1, "foreground": 2, "ignored": 1}), ("1", None), ("2,3", None)]
)
def test_ignored_values_are_none_of_those_that_a_threshold_makes(
    ignored: str, shares: dict[str, int] | None, tmp_path: Path
) -> None:
    """Of four values, each in a quarter of the pixels, foreground is from 2 on."""
    mask = np.repeat(np.arange(4, dtype=np.uint8), 64).reshape(16, 16)
    options = DataOptions(ignore=ignored, threshold=1 if ignored == "2,3" else 2)
    found = survey(write_masks(tmp_path, mask, 5), options)
    labels = found.checked().labels_of(found.train[0])
    counted = {"background": (labels == 0).mean(), "foreground": (labels == 1).mean(), "ignored": (labels > 1).mean()}
    assert {each.name.split(" ")[0]: each.share for each in found.shares} == counted
    assert shares is None or counted == {name: quarters / 4 for name, quarters in shares.items()}


def test_a_soft_mask_of_nan_is_refused(tmp_path: Path) -> None:
    root = write_data(tmp_path)
    for file in (root / "masks").iterdir():
        soft = np.full((16, 20), 0.75, np.float32)
        soft[0, 0] = np.nan
        file.unlink()
        np.save(file.with_suffix(".npy"), soft)
    found = survey(root, DataOptions(threshold=0.5))
    assert len(found.problems) == 5
    assert all("expected finite values, got NaN or infinity" in problem for problem in found.problems)


@pytest.mark.parametrize(("ignored", "part"), [((4,), "kept out"), ((0, 1, 2, 3), "to train on")])
def test_a_side_of_the_split_of_which_nothing_counts_is_refused(
    ignored: tuple[int, ...], part: str, tmp_path: Path
) -> None:
    root = write_data(tmp_path)
    for number in ignored:
        save(root / "masks" / f"{number}.png", np.full((16, 20), 7, np.uint8))
    (problem,) = survey(root, DataOptions(ignore="7")).problems
    assert f"masks of the images {part}, got only ignored ones" in problem


def test_what_is_odd_is_noted(tmp_path: Path) -> None:
    write_data(tmp_path)
    for name, source in (("4", "0"), ("2", "1")):
        (tmp_path / "images" / f"{name}.png").write_bytes((tmp_path / "images" / f"{source}.png").read_bytes())
    (tmp_path / "masks" / "notes.txt").write_text("")
    save(tmp_path / "images" / "3.png", noise((16, 20, 3)))
    assert survey(tmp_path).notes == [
        "4 grey images beside RGB are taken as RGB: 0.png, 1.png, 2.png, 4.png",
        "equal images on both sides of the split, which flatters the scores: 0 = 4",
        "equal images on one side of the split: 1 = 2",
        "1 other files are passed over: notes.txt",
    ]


def test_every_problem_is_found_and_not_only_the_first(tmp_path: Path) -> None:
    write_data(tmp_path)
    (tmp_path / "images" / "1.png").write_bytes(b"")
    save(tmp_path / "masks" / "2.png", np.zeros((9, 9), np.uint8))
    save(tmp_path / "masks" / "3.png", np.full((16, 20), 3, np.uint8))
    found = survey(tmp_path)
    assert len(found.facts) == 3
    words = ("1.png: .*an empty file", "2.png: .*got 9 x 9", "3.png: .*got 3 ")
    assert [bool(re.search(*each)) for each in zip(words, found.problems, strict=True)] == [True] * 3
    with pytest.raises(DataError, match="an empty file"):
        found.checked()


def test_the_command_prints_and_draws(tmp_path: Path) -> None:
    data, picture = write_data(tmp_path / "data", 9), tmp_path / "pictures" / "check.png"
    result = fastunet("check", data, "--out", picture)
    for words in ("9: 8 to train on, 1 kept out", "16 x 20", "uint8", "25.0 % of the pixels, in 9 images"):
        assert words in result.stdout
    with Image.open(picture) as image:
        assert image.width > 1000
    assert "--overwrite" in error_of("check", data, "--out", picture)
    fastunet("check", data, "--out", picture, "--overwrite")
    error_of("check", data, "--out", data / "images" / "check.png")


def test_the_command_ends_with_the_first_problem(tmp_path: Path) -> None:
    data = write_data(tmp_path)
    save(data / "masks" / "4.png", np.full((16, 20), 9, np.uint8))
    result = fastunet("check", data, code=2)
    assert "5: 4 to train on, 1 kept out" in result.stdout
    assert "0, 9, 255" in result.stdout
    for name in ("1", "2"):
        (data / "images" / f"{name}.png").write_bytes(b"")
    result = fastunet("check", data, code=2)
    assert "3, and 2 that cannot be read" in result.stdout
    assert "problem: " in result.stdout
    assert result.stderr.startswith(f"error: {data / 'images' / '1.png'}: expected a readable image")
    error_of("check", tmp_path / "gone")
