"""Images and masks found by their names, and split into those to train on and those to validate with."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_files import make_data, noise, save

from fastunet.checks import ConfigError, DataError
from fastunet.data import (
    DataOptions,
    Pair,
    find_images,
    find_pairs,
    split,
)


def test_pairs_are_found_by_stem_and_sorted(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.tif", "c.Jpeg"):
        save(tmp_path / "images" / name, noise((4, 4)))
    for name in ("c.png", "a.png", "b.bmp"):
        save(tmp_path / "masks" / name, noise((4, 4)))
    for name in ("images/.DS_Store", "images/._a.png", "images/Thumbs.db", "masks/.b.png", "masks/notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "images" / "folder.png").mkdir()
    found = [(pair.stem, pair.image.name, pair.mask.name) for pair in find_pairs(tmp_path)]
    assert found == [("a", "a.tif", "a.png"), ("b", "b.PNG", "b.bmp"), ("c", "c.Jpeg", "c.png")]


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"images: expected a folder, got nothing there"):
        find_pairs(tmp_path / "absent")
    save(tmp_path / "images" / "a.png", noise((4, 4)))
    with pytest.raises(DataError, match=r"masks: expected a folder, got nothing there"):
        find_pairs(tmp_path)
    (tmp_path / "masks").write_text("")
    with pytest.raises(DataError, match=r"masks: expected a folder, got a file"):
        find_pairs(tmp_path)


def test_a_folder_without_images_says_what_is_supported(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"images: expected images \(.*\.png .*\.tiff\), got none among 1 files"):
        find_pairs(tmp_path)


@pytest.mark.parametrize("removed", ["masks", "images"])
def test_stems_without_partner_are_listed(tmp_path: Path, removed: str) -> None:
    make_data(tmp_path, count=8)
    for stem in "abcdefg":
        (tmp_path / removed / f"{stem}.png").unlink()
    expected = rf"{removed}: expected a file for each of 8 stems, got none for 7: a.png, b.png, .*e.png and 2 more"
    with pytest.raises(DataError, match=expected):
        find_pairs(tmp_path)


def test_two_files_of_one_stem_are_refused(tmp_path: Path) -> None:
    make_data(tmp_path)
    save(tmp_path / "images" / "b.tif", noise((12, 10)))
    with pytest.raises(DataError, match=r"expected one file per stem, got b\.png and b\.tif"):
        find_pairs(tmp_path)


def test_stems_are_the_same_however_unicode_composes_them(tmp_path: Path) -> None:
    for folder, name in (("images", "e\u0301.png"), ("masks", "\u00e9.png")):  # as on macOS, and elsewhere
        save(tmp_path / folder / name, noise((4, 4)))
    assert [pair.stem for pair in find_pairs(tmp_path)] == ["\u00e9"]
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "e\u0301.txt").write_text("0 0 0 1 0 1 1")
    assert [pair.stem for pair in find_pairs(tmp_path, DataOptions(masks="labels"))] == ["\u00e9"]


def test_folders_that_the_system_refuses_are_named(tmp_path: Path) -> None:
    for find in (find_images, find_pairs):
        with pytest.raises(DataError, match=r"expected a readable file or folder, got: File name too long"):
            find(tmp_path / ("n" * 300))


def test_images_to_predict_on_come_from_a_file_a_folder_or_a_data_root(tmp_path: Path) -> None:
    make_data(tmp_path, count=2)
    names = ["a.png", "b.png"]
    assert [file.name for file in find_images(tmp_path)] == names
    assert [file.name for file in find_images(tmp_path / "images")] == names
    assert find_images(tmp_path / "images" / "b.png") == [tmp_path / "images" / "b.png"]
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(DataError, match=r"x\.txt: expected an image .*got suffix '\.txt'"):
        find_images(tmp_path / "x.txt")
    with pytest.raises(DataError, match=r"absent: expected a folder, got nothing there"):
        find_images(tmp_path / "absent")


def stems(count: int) -> list[Pair]:
    return [
        Pair(Path(f"images/{index:02}.png"), Path(f"masks/{index:02}.png"), f"{index:02}") for index in range(count)
    ]


def test_split_repeats_whatever_the_order_and_varies_with_the_seed() -> None:
    train, val = split(stems(20), 0.2, seed=3)
    assert (len(train), len(val)) == (16, 4)
    assert sorted(train + val, key=lambda pair: pair.stem) == stems(20)
    assert split(stems(20)[::-1], 0.2, seed=3) == (train, val)
    assert [pair.stem for pair in val] == sorted(pair.stem for pair in val)
    assert split(stems(20), 0.2, seed=4)[1] != val


def test_split_without_a_seed_keeps_out_the_last() -> None:
    """Sections of a stack resemble their neighbours: a block at the end has one neighbour in training, not eight."""
    train, val = split(stems(20)[::-1], 0.2)
    assert (train, val) == (stems(20)[:16], stems(20)[16:])


@pytest.mark.parametrize(
    ("count", "fraction", "sizes"), [(2, 0.01, (1, 1)), (2, 0.99, (1, 1)), (10, 0.25, (8, 2)), (1, 0.0, (1, 0))]
)
def test_split_leaves_at_least_one_on_each_side(count: int, fraction: float, sizes: tuple[int, int]) -> None:
    train, val = split(stems(count), fraction, seed=0)
    assert (len(train), len(val)) == sizes


def test_split_refuses_a_single_pair_and_impossible_fractions() -> None:
    with pytest.raises(DataError, match=r"at least 2 pairs .*got 1 \(images/00\.png\)"):
        split(stems(1), 0.2, seed=0)
    for fraction in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=rf"val_fraction: expected 0 <= fraction < 1, got {fraction}"):
            split(stems(4), fraction, seed=0)
