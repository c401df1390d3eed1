"""Folders to samples: bad input names the file, splits and crops repeat exactly."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

pytest.importorskip("kornia", reason="needs the extra train")

import numpy as np
import torch
from image_files import noise, save, save_tiff

from fastunet.checks import ConfigError, DataError
from fastunet.data import (
    DataSummary,
    Pair,
    SegmentationDataset,
    find_images,
    find_pairs,
    inspect,
    labels_from_mask,
    mask_from_labels,
    moments,
    normalize,
    read_image,
    read_mask,
    split,
)


def make_data(root: Path, count: int = 4, size: tuple[int, int] = (12, 10)) -> Path:
    """Write `count` grey images a, b, ... with binary masks of which each has some foreground."""
    for index, stem in enumerate("abcdefgh"[:count]):
        save(root / "images" / f"{stem}.png", noise(size, seed=index))
        mask = np.zeros(size, np.uint8)
        mask[index : index + 3, 2:5] = 255
        save(root / "masks" / f"{stem}.png", mask)
    return root


# --- finding files ---------------------------------------------------------------------------------------------------


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


# --- inspecting ------------------------------------------------------------------------------------------------------


def test_inspect_sums_up_the_files(tmp_path: Path) -> None:
    images = [noise((4, 6, 3), "uint16", seed=0), noise((8, 5, 3), "uint16", seed=1)]
    for stem, image in zip("ab", images, strict=True):
        save(tmp_path / "images" / f"{stem}.tif", image)
        save(tmp_path / "masks" / f"{stem}.png", (image[..., 0] > 30000).astype(np.uint8))
    summary = inspect(find_pairs(tmp_path))
    assert summary == DataSummary(2, 3, 1, (0, 1), "uint16", size_min=(4, 5), size_max=(8, 6))


def test_a_constant_channel_does_not_divide_by_zero() -> None:
    image = np.full((12, 10, 1), 0.1, np.float32)
    assert moments(image)[1] == 1
    assert normalize(image).abs().max() < 1e-6


def test_a_small_signal_on_a_large_offset_keeps_its_spread() -> None:
    pixels = (1e6 + np.random.default_rng(0).normal(0, 10, (12, 10, 1))).astype(np.float32)
    np.testing.assert_allclose(moments(pixels)[1], pixels.astype(np.float64).std(), rtol=1e-9)


@pytest.mark.parametrize(("dtype", "channels"), [("uint8", 1), ("uint8", 3), ("uint16", 3), ("float32", 1)])
def test_normalising_takes_little_memory(dtype: str, channels: int) -> None:
    image = noise((2000, 1500, channels), dtype if dtype != "float32" else "uint16").astype(dtype)
    pixels = image.astype(np.float64)
    expected = np.moveaxis((pixels - pixels.mean((0, 1))) / pixels.std((0, 1)), -1, 0)
    del pixels
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    normalised = normalize(image)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak <= normalised.numpy().nbytes + 6 * image.size
    assert normalised.is_contiguous()
    # Three roundings of values below 4: of the mean and the deviation, of the difference, and of the quotient.
    np.testing.assert_allclose(normalised, expected, rtol=0, atol=4 * 4 * 2**-24)


MISFITS = {
    "masks/c.png": (np.zeros((10, 12), np.uint8), r"expected height x width 12 x 10 as of c\.png, got 10 x 12"),
    "images/b.png": (noise((12, 10, 5)), r"expected 1 channels as in a\.png, got 5"),
    "images/d.png": (noise((12, 10), "uint16"), r"expected uint8 as in a\.png, got uint16"),
    "masks/b.png": (None, "expected a readable image"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_file_that_does_not_fit_the_others_is_named(tmp_path: Path, name: str) -> None:
    make_data(tmp_path)
    pixels, message = MISFITS[name]
    if pixels is None:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
    elif pixels.ndim == 3:  # of 5 channels, which PNG does not have: the content says what a file is
        save_tiff(tmp_path / name, pixels, photometric="minisblack", planarconfig="contig")
    else:
        save(tmp_path / name, pixels)
    with pytest.raises(DataError, match=rf"{name}: {message}"):
        inspect(find_pairs(tmp_path))


def masks_only(root: Path, *values: list[int]) -> list[Pair]:
    """One pair for each list of mask values."""
    for stem, row in zip("abcdefgh", values, strict=False):
        save(root / "images" / f"{stem}.png", noise((2, len(row))))
        save(root / "masks" / f"{stem}.png", np.array([row, row], np.uint8))
    return find_pairs(root)


@pytest.mark.parametrize(
    ("values", "given", "classes"),
    [
        ([[0, 1], [0, 0]], None, 1),
        ([[0, 255], [0, 0]], None, 1),
        ([[255, 255], [0, 0]], 2, 1),
        ([[0, 2], [0, 1]], None, 3),
        ([[0, 0], [0, 0]], 1, 1),  # healthy controls, to be scored on
    ],
)
def test_classes_follow_from_the_mask_values(
    tmp_path: Path, values: list[list[int]], given: int | None, classes: int
) -> None:
    summary = inspect(masks_only(tmp_path, *values), classes=given)
    assert summary.classes == classes
    assert summary.mask_values == tuple(sorted({value for row in values for value in row}))


BINARY = "expected mask values 0 and 1, or 0 and 255"


@pytest.mark.parametrize(
    ("values", "given", "message"),
    [
        ([[0, 255, 0], [0, 128, 255]], None, rf"b\.png: {BINARY}, or class indices .*got 0, 128, 255 \(all"),
        ([[0, 1], [0, 255]], None, rf"b\.png: {BINARY}, or .*got 0, 255 \(all masks together: 0, 1, 255\)"),
        ([[0, 1], [0, 3]], None, rf"b\.png: {BINARY}, or .*got 0, 3"),
        ([[0, 1], [1, 2]], 1, rf"b\.png: {BINARY}, got 1, 2"),
        ([[0, 255], [0, 7]], 4, r"a\.png: expected mask values class indices 0 to 3, got 0, 255"),
        ([list(range(60))], None, rf"a\.png: {BINARY}, or .*got 0, 1, 2, 3, 4 and 55 more"),
        ([[0, 0], [0, 0]], None, r"masks: expected foreground in at least one of 2 masks, got only 0"),
    ],
)
def test_mask_values_that_do_not_fit_are_named(
    tmp_path: Path, values: list[list[int]], given: int | None, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        inspect(masks_only(tmp_path, *values), classes=given)
    assert "\n" not in str(caught.value)


def test_inspect_refuses_nothing_and_impossible_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one pair"):
        inspect([])
    with pytest.raises(ConfigError, match="expected 1 to 256, got 257"):
        inspect(find_pairs(make_data(tmp_path)), classes=257)


# --- splitting and labels --------------------------------------------------------------------------------------------


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


def test_labels_and_masks_convert_both_ways() -> None:
    for foreground in (1, 255):
        labels = labels_from_mask(np.array([[0, foreground]]), classes=1)
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, [[0, 1]])
    np.testing.assert_array_equal(mask_from_labels(np.array([[0, 1]]), classes=1), [[0, 255]])
    indices = np.array([[0, 4, 2]], np.uint16)
    np.testing.assert_array_equal(mask_from_labels(labels_from_mask(indices, classes=5), classes=5), indices)
    assert mask_from_labels(np.array([[0, 255]]), classes=256).dtype == np.uint8


@pytest.mark.parametrize(
    ("values", "dtype", "mask"),
    [
        ((0, 128, 255), "uint8", [0, 128, 255]),
        ((1, 2, 1000), "uint16", [1, 2, 1000]),
        (((0, 0, 0), (9, 0, 0), (0, 9, 0)), "uint8", [0, 1, 2]),
    ],
)
def test_masks_are_written_with_the_values_that_were_given(values: tuple, dtype: str, mask: list[int]) -> None:
    written = mask_from_labels(np.array([0, 1, 2], np.uint8), 3, values)
    assert written.dtype == dtype
    assert written.tolist() == mask


@pytest.mark.parametrize("value", [-1, 256])
def test_mask_values_that_are_no_class_do_not_wrap(tmp_path: Path, value: int) -> None:
    with pytest.raises(DataError, match=rf"expected class indices 0 to 4, got values .*{value}"):
        labels_from_mask(np.array([[1, value]]), classes=5)
    pairs = masks_only(tmp_path, [0, 4])
    save(pairs[0].mask, np.array([[0, 255]] * 2, np.uint8))  # after it was inspected
    with pytest.raises(DataError, match=r"masks/a\.png: .*expected class indices 0 to 4, got values 0 to 255"):
        SegmentationDataset(pairs, inspect(masks_only(tmp_path / "five", [0, 4]), 5))


# --- samples ---------------------------------------------------------------------------------------------------------


def test_whole_images_come_normalised_in_order(tmp_path: Path) -> None:
    pairs = find_pairs(make_data(tmp_path))
    summary = inspect(pairs)
    dataset = SegmentationDataset(pairs, summary)
    assert len(dataset) == 4
    images = torch.stack([image for image, _ in dataset])
    assert images.dtype == torch.float32
    assert images.shape == (4, 1, 12, 10)
    assert images.mean((1, 2, 3)).abs().max() < 1e-6
    assert (images.flatten(1).std(1, correction=0) - 1).abs().max() < 1e-6
    image, labels = dataset[2]
    assert labels.dtype == torch.int64
    np.testing.assert_array_equal(labels * 255, read_mask(pairs[2].mask))
    pixels = read_image(pairs[2].image)
    mean, std = moments(pixels)
    np.testing.assert_allclose(image[0] * std[0] + mean[0], pixels[..., 0], atol=1e-4)


def make_coded_data(root: Path, count: int, size: tuple[int, int]) -> list[Pair]:
    """Images whose pixels are all different and whose mask says, for each, whether it is odd."""
    for index in range(count):
        pixels = (np.arange(size[0] * size[1]).reshape(size) + 7 * index + 1).astype(np.uint16)
        save(root / "images" / f"{index}.png", pixels)
        save(root / "masks" / f"{index}.png", (pixels % 2).astype(np.uint8))
    return find_pairs(root)


@pytest.mark.parametrize("size", [(20, 17), (9, 30), (5, 3), (1, 1)])
def test_crops_keep_image_and_labels_together_even_where_reflected(tmp_path: Path, size: tuple[int, int]) -> None:
    pairs = make_coded_data(tmp_path, 1, size)
    mean, std = moments(read_image(pairs[0].image))
    dataset = SegmentationDataset(pairs, inspect(pairs), crop=12, length=10)
    for image, labels in dataset:
        assert image.shape == (1, 12, 12)
        assert labels.shape == (12, 12)
        raw = (image[0].double() * std[0] + mean[0]).round().long()
        assert torch.equal(raw % 2, labels)


def test_samples_repeat_by_seed_epoch_and_index_only(tmp_path: Path) -> None:
    pairs = make_coded_data(tmp_path, 3, (30, 30))
    summary = inspect(pairs)

    def draw(seed: int, epoch: int, indices: range) -> list[torch.Tensor]:
        dataset = SegmentationDataset(pairs, summary, crop=8, length=9, seed=seed)
        dataset.set_epoch(epoch)
        return [dataset[index][0] for index in indices]

    first = torch.stack(draw(0, 1, range(9)))
    assert torch.equal(torch.stack(draw(0, 1, range(8, -1, -1))[::-1]), first)
    assert len(torch.unique(first.flatten(1), dim=0)) == 9
    for other in (draw(0, 2, range(9)), draw(1, 1, range(9))):
        assert not torch.equal(torch.stack(other), first)


def test_an_epoch_visits_every_image_equally_often(tmp_path: Path) -> None:
    for index in range(3):
        save(tmp_path / "images" / f"{index}.png", noise((10, 10), seed=index))
        save(tmp_path / "masks" / f"{index}.png", np.full((10, 10), index, np.uint8))
    pairs = find_pairs(tmp_path)
    dataset = SegmentationDataset(pairs, inspect(pairs), crop=6, length=12)
    orders = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        orders.append([int(labels.unique()) for _, labels in dataset])
        assert sorted(orders[-1]) == [0] * 4 + [1] * 4 + [2] * 4
    assert orders[0] != orders[1]


def test_files_are_read_on_access_above_the_memory_limit(tmp_path: Path) -> None:
    pairs = find_pairs(make_data(tmp_path))
    summary = inspect(pairs)
    kept, read = (SegmentationDataset(pairs, summary, memory_limit=limit) for limit in (2**30, 0))
    before = kept[1][0]
    assert torch.equal(read[1][0], before)
    save(pairs[1].image, noise((12, 10), seed=99))
    assert torch.equal(kept[1][0], before)
    assert not torch.equal(read[1][0], before)


def test_datasets_refuse_impossible_options(tmp_path: Path) -> None:
    pairs = find_pairs(make_data(tmp_path))
    summary = inspect(pairs)
    with pytest.raises(ConfigError, match="crop: expected at least 1, got 0"):
        SegmentationDataset(pairs, summary, crop=0)
    with pytest.raises(ConfigError, match="length: expected None without crop, got 5"):
        SegmentationDataset(pairs, summary, length=5)
    with pytest.raises(DataError, match="at least one pair"):
        SegmentationDataset([], summary)
    with pytest.raises(IndexError, match="0 <= index < 4, got 4"):
        SegmentationDataset(pairs, summary)[4]
