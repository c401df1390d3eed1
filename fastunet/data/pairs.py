"""From a folder of images and masks to training samples: pairing, checks of every file, splitting, cropping.

A data folder holds `images/` and `masks/` with equal stems. Masks are binary (0 and 1, or 0 and 255) or hold class
indices 0..K-1. Everything that can be wrong with the files is found by `find_pairs` and `inspect`, before training.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastunet.checks import ConfigError, DataError, some_of
from fastunet.data.images import list_images, read_image, read_mask
from fastunet.data.sources import Source

MAX_CLASSES = 256  # labels travel and are written as uint8
MAX_INFERRED_CLASSES = 32  # beyond, values without a gap are rather grey levels than classes
# An image [H, W, C], its labels [H, W] and its moments.
_Decoded = tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Pair:
    """One image and its mask; `stem` is the file name that they share, without suffix."""

    image: Path
    mask: Path
    stem: str


@dataclass(frozen=True)
class DataSummary:
    """What `inspect` found: all that a model and its inputs depend on."""

    count: int  # number of pairs
    channels: int  # C of every image
    classes: int  # 1 for foreground and background (one logit), else K >= 3 (K logits)
    mask_values: tuple[int, ...]  # every value that occurs in a mask, ascending
    dtype: str  # of every image: uint8, uint16 or float32
    size_min: tuple[int, int]  # smallest and largest (height, width), each taken by itself, in pixels
    size_max: tuple[int, int]


@dataclass(frozen=True)
class _Facts:
    """One pair, read: image shape [H, W, C] and dtype, and mask values."""

    pair: Pair
    shape: tuple[int, ...]
    dtype: str
    values: frozenset[int]


def find_pairs(root: str | Path) -> list[Pair]:
    """Pair `root/images` with `root/masks` by stem, sorted by stem.

    Raises:
        DataError: a folder is missing or without images, two files share a stem, or stems without a partner.
    """
    images, masks = (list_images(Path(root) / name) for name in ("images", "masks"))
    for folder, own, other in (("masks", images, masks), ("images", masks, images)):
        alone = [file.name for stem, file in own.items() if stem not in other]
        if alone:
            raise DataError(
                f"{Path(root) / folder}: expected a file for each of {len(own)} stems, "
                f"got none for {len(alone)}: {some_of(alone)}"
            )
    return [Pair(images[stem], masks[stem], stem) for stem in images]


def inspect(pairs: Sequence[Pair], classes: int | None = None) -> DataSummary:
    """Read every file once, check that all fit together, and sum them up.

    Args:
        classes: 1 or 2 for foreground and background, K >= 3 for class indices below K; None infers it: binary if
            the masks hold only 0 and 1 or only 0 and 255, else K <= 32 classes if they hold exactly 0..K-1.

    Raises:
        DataError: an unreadable file, sizes that differ in a pair, channels or dtypes that differ between images,
            mask values outside the classes, or, where `classes` is to be inferred, no foreground in any mask. The
            message names the file.
        ConfigError: `classes` outside 1..256.
    """
    if classes is not None and not 1 <= classes <= MAX_CLASSES:
        raise ConfigError(f"classes: expected 1 to {MAX_CLASSES}, got {classes}")
    if not pairs:
        raise DataError("data: expected at least one pair of image and mask, got none")
    facts = _in_threads(_read_facts, pairs)
    first = facts[0]
    for fact in facts:
        if fact.shape[2] != first.shape[2]:
            expected = f"{first.shape[2]} channels as in {first.pair.image.name}"
            raise DataError(f"{fact.pair.image}: expected {expected}, got {fact.shape[2]}")
        if fact.dtype != first.dtype:
            expected = f"{first.dtype} as in {first.pair.image.name}"
            raise DataError(f"{fact.pair.image}: expected {expected}, got {fact.dtype}")
    sizes = np.array([fact.shape[:2] for fact in facts])
    return DataSummary(
        count=len(facts),
        channels=first.shape[2],
        classes=_check_mask_values(facts, classes),
        mask_values=tuple(sorted(frozenset().union(*(fact.values for fact in facts)))),
        dtype=first.dtype,
        size_min=(int(sizes[:, 0].min()), int(sizes[:, 1].min())),
        size_max=(int(sizes[:, 0].max()), int(sizes[:, 1].max())),
    )


def check_foreground(pairs: Sequence[Pair], mask_values: Collection[int]) -> None:
    """Refuse pairs to learn from of which no mask holds anything but 0; to be scored on, they may be.

    Raises:
        DataError: only background. The message names the folder of masks.
    """
    if set(mask_values) == {0}:
        folder = pairs[0].mask.parent
        raise DataError(f"{folder}: expected foreground in at least one of {len(pairs)} masks, got only 0")


def split(pairs: Sequence[Pair], val_fraction: float, seed: int | None = None) -> tuple[list[Pair], list[Pair]]:
    """Split into training and validation pairs, each sorted by stem; the same stems and seed give the same split.

    Without a seed the last stems are for validation, with one a random choice. In a stack of sections, a film or the
    fields of one slide, neighbours are nearly the same picture: a random split tests on what was trained on. At least
    one pair stays on either side, unless `val_fraction` is 0.

    Raises:
        ConfigError: `val_fraction` outside [0, 1).
        DataError: fewer than two pairs to share out.
    """
    if not 0 <= val_fraction < 1:
        raise ConfigError(f"val_fraction: expected 0 <= fraction < 1, got {val_fraction}")
    ordered = sorted(pairs, key=lambda pair: pair.stem)
    if val_fraction == 0:
        return ordered, []
    if len(ordered) < 2:
        names = ", ".join(str(pair.image) for pair in ordered) or "none"
        raise DataError(f"data: expected at least 2 pairs to keep one for validation, got {len(ordered)} ({names})")
    count = min(max(round(len(ordered) * val_fraction), 1), len(ordered) - 1)
    last = np.arange(len(ordered))[::-1]
    order = last if seed is None else np.random.default_rng(seed).permutation(len(ordered))
    chosen = set(order[:count].tolist())
    train = [pair for index, pair in enumerate(ordered) if index not in chosen]
    return train, [ordered[index] for index in sorted(chosen)]


def labels_from_mask(mask: np.ndarray, classes: int) -> np.ndarray:
    """Turn mask values [H, W] into uint8 labels [H, W]: any value above 0 is 1 where `classes` is 1.

    Raises:
        DataError: several classes and a value that is none of their indices.
    """
    if classes == 1:
        return (mask > 0).astype(np.uint8)
    lowest, highest = mask.min(), mask.max()
    if lowest < 0 or highest >= classes:
        raise DataError(f"mask: expected class indices 0 to {classes - 1}, got values {lowest} to {highest}")
    return mask.astype(np.uint8)


def mask_from_labels(labels: np.ndarray, classes: int) -> np.ndarray:
    """Turn labels [H, W] into what is written to a file, uint8 [H, W]: 0 and 255 for one class, else the labels."""
    return labels.astype(np.uint8) * np.uint8(255 if classes == 1 else 1)


def moments(image: np.ndarray | Source) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel of an image [H, W, C], float64 [C]; 1 for that of a constant channel."""
    pixels = image.shape[0] * image.shape[1]
    mean = sum(block.sum((0, 1), dtype=np.float64) for block in _blocks(image)) / pixels
    # Deviations from the mean: sums of squares would cancel for a small signal on a large offset.
    squares = sum(np.square(block - mean).sum((0, 1)) for block in _blocks(image))
    std = np.sqrt(squares / pixels)
    # The sums of a constant channel are exact in float64, so its deviation is exactly 0.
    return mean, np.where(std > 0, std, 1.0)


def normalize(image: np.ndarray, mean_and_std: tuple[np.ndarray, np.ndarray] | None = None) -> Tensor:
    """Turn an image [H, W, C] of any dtype into (image - mean) / std, float32 [C, H, W].

    Each image goes by its own `moments`, so that exposure and staining, which differ from image to image, drop out; a
    crop is given those of its whole image. Takes little memory beyond the result.
    """
    mean, std = moments(image) if mean_and_std is None else mean_and_std
    scaled = np.empty((image.shape[2], *image.shape[:2]), np.float32)
    top = 0
    for block in _blocks(image):
        part = scaled[:, top : top + len(block)]
        np.subtract(block.transpose(2, 0, 1).astype(np.float32), mean.astype(np.float32)[:, None, None], out=part)
        part /= std.astype(np.float32)[:, None, None]
        top += len(block)
    return torch.from_numpy(scaled)


def _blocks(image: np.ndarray | Source) -> Iterator[np.ndarray]:
    """Cut into whole rows, of about a million values, so that what is made of one is small."""
    stored = image.rows if isinstance(image, Source) else 1
    rows = -(-max(1, 2**20 // math.prod(image.shape[1:])) // stored) * stored
    return (image[top : top + rows] for top in range(0, len(image), rows))


class SegmentationDataset(Dataset[tuple[Tensor, Tensor]]):
    """Samples (image float32 [C, H, W], normalised as a whole before any crop, labels int64 [H, W]).

    Without `crop`, item i is pair i whole. With `crop`, an epoch has `length` random crops [crop, crop] that depend
    only on (seed, epoch, index), in whatever order and process they are drawn; every `len(pairs)` indices visit each
    image once. An image smaller than the crop is extended by reflection, its labels with it.

    Args:
        summary: of the pairs, from `inspect`.
        crop: edge in pixels, or None.
        length: samples per epoch with `crop`; None takes one per pair.
        memory_limit: in bytes; decoded files are kept in memory if their largest possible total is below it.

    Raises:
        DataError: no pairs, or a file has become unreadable.
        ConfigError: `crop` or `length` below 1, or a `length` without `crop`.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        summary: DataSummary,
        *,
        crop: int | None = None,
        length: int | None = None,
        seed: int = 0,
        memory_limit: int = 2 * 2**30,
    ) -> None:
        if not pairs:
            raise DataError("dataset: expected at least one pair of image and mask, got none")
        if length is not None and crop is None:
            raise ConfigError(f"length: expected None without crop, got {length}")
        for name, value in (("crop", crop), ("length", length)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")
        self.pairs = list(pairs)
        self.summary = summary
        self.crop = crop
        self.length = len(self.pairs) if length is None else length
        self.seed = seed
        self.epoch = 0
        height, width = summary.size_max
        bytes_per_pixel = summary.channels * np.dtype(summary.dtype).itemsize + 1
        in_memory = len(self.pairs) * height * width * bytes_per_pixel < memory_limit
        self._decoded = _in_threads(self._read, self.pairs) if in_memory else None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's crops; call it before the epoch's iterator is made, which copies it to its workers."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"index: expected 0 <= index < {self.length}, got {index}")
        if self.crop is None:
            image, labels, own_moments = self._load(index)
        else:
            pass_over_images, position = divmod(index, len(self.pairs))
            order = np.random.default_rng((self.seed, self.epoch, pass_over_images)).permutation(len(self.pairs))
            image, labels, own_moments = self._load(int(order[position]))
            # The fourth number keeps the two generators apart.
            image, labels = _random_crop(
                image, labels, self.crop, np.random.default_rng((self.seed, self.epoch, index, 1))
            )
        return normalize(image, own_moments), torch.from_numpy(labels.astype(np.int64))

    def _load(self, index: int) -> _Decoded:
        return self._read(self.pairs[index]) if self._decoded is None else self._decoded[index]

    def _read(self, pair: Pair) -> _Decoded:
        image = read_image(pair.image)
        mask = read_mask(pair.mask)
        try:
            return image, labels_from_mask(mask, self.summary.classes), moments(image)
        except DataError as error:
            raise DataError(f"{pair.mask}: {error}") from error


def _random_crop(
    image: np.ndarray, labels: np.ndarray, size: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the same random square of `size` from image [H, W, C] and labels [H, W]."""
    image, labels = _reflect_to(image, size), _reflect_to(labels, size)
    top, left = (int(generator.integers(extent - size + 1)) for extent in labels.shape)
    window = (slice(top, top + size), slice(left, left + size))
    return image[window], labels[window]


def _reflect_to(pixels: np.ndarray, size: int) -> np.ndarray:
    """Extend [H, W, ...] by reflection on all sides until H and W are at least `size`."""
    missing = [max(size - extent, 0) for extent in pixels.shape[:2]]
    if not any(missing):
        return pixels
    widths = [(count // 2, count - count // 2) for count in missing] + [(0, 0)] * (pixels.ndim - 2)
    return np.pad(pixels, widths, mode="reflect")


def _read_facts(pair: Pair) -> _Facts:
    image, mask = read_image(pair.image), read_mask(pair.mask)
    if image.shape[:2] != mask.shape:
        expected, actual = (f"{height} x {width}" for height, width in (image.shape[:2], mask.shape))
        raise DataError(f"{pair.mask}: expected height x width {expected} as of {pair.image.name}, got {actual}")
    return _Facts(pair, image.shape, image.dtype.name, frozenset(np.unique(mask).tolist()))


def _check_mask_values(facts: Sequence[_Facts], classes: int | None) -> int:
    """Give the number of classes (1 = binary), or name the first file whose values do not fit."""
    found: frozenset[int] = frozenset().union(*(fact.values for fact in facts))
    count, allowed = _choose_classes(found, classes)
    guilty = next((fact for fact in facts if fact.values - allowed), None)
    if guilty is not None:
        expected = "0 and 1, or 0 and 255"
        if classes is None:
            expected += ", or class indices 0 to K-1 (if some never occur, give the number of classes)"
        elif classes > 2:
            expected = f"class indices 0 to {classes - 1}"
        raise DataError(
            f"{guilty.pair.mask}: expected mask values {expected}, got {some_of(sorted(guilty.values))} "
            f"(all masks together: {some_of(sorted(found))})"
        )
    if classes is None:
        check_foreground([fact.pair for fact in facts], found)
    return count


def _choose_classes(found: frozenset[int], classes: int | None) -> tuple[int, frozenset[int]]:
    """The number of classes (1 = binary) and the values that masks may then hold, of all values found."""
    if classes is not None and classes > 2:
        return classes, frozenset(range(classes))
    looks_like_255 = 255 in found and 1 not in found
    binary = frozenset({0, 255 if looks_like_255 else 1})
    if classes is not None or looks_like_255 or found <= binary:
        return 1, binary
    limit = range(MAX_INFERRED_CLASSES)
    count = next((value for value in limit if value not in found), MAX_INFERRED_CLASSES)
    return count, frozenset(range(count))


def _in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Map in order over a few threads (decoders release the lock); the first error stops the rest."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))
