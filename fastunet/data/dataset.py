"""From pairs of files to training samples: reading, normalising, cropping. `inspect` has checked the files before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastunet.checks import ConfigError, DataError
from fastunet.data.labels import IGNORED
from fastunet.data.pairing import Pair
from fastunet.data.sources import Source, source_of_array
from fastunet.data.summary import DataSummary, in_threads

Moments = tuple[np.ndarray, np.ndarray]
# An image [H, W, C], its labels [H, W] and its moments.
_Decoded = tuple[np.ndarray, np.ndarray, Moments]


class Whole(NamedTuple):
    """A pair that is read in windows: what is made of it takes no memory that grows with its pixels."""

    image: Source
    labels: np.ndarray  # uint8 [H, W]: class indices, or `IGNORED`
    moments: Moments  # of the image


def moments(image: np.ndarray | Source) -> Moments:
    """Mean and standard deviation per channel of an image [H, W, C], float64 [C]; 1 for that of a constant channel."""
    pixels = image.shape[0] * image.shape[1]
    mean = sum(block.sum((0, 1), dtype=np.float64) for block in _blocks(image)) / pixels
    # Deviations from the mean: sums of squares would cancel for a small signal on a large offset.
    squares = sum(np.square(block - mean).sum((0, 1)) for block in _blocks(image))
    std = np.sqrt(squares / pixels)
    # The sums of a constant channel are exact in float64, so its deviation is exactly 0.
    return mean, np.where(std > 0, std, 1.0)


def normalize(image: np.ndarray, mean_and_std: Moments | None = None) -> Tensor:
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

    Labels are class indices, and `IGNORED` where a pixel does not count.

    Without `crop`, item i is pair i whole. With `crop`, an epoch has `length` random crops [crop, crop] that depend
    only on (seed, epoch, index), in whatever order and process they are drawn; every `len(pairs)` indices visit each
    image once. An image smaller than the crop is extended by reflection, its labels with it.

    `balance` is the share of crops that hold a pixel of a foreground class drawn among those of the image, a rare one
    as often as another.

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
        balance: float = 0.0,
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
        self.balance = balance
        self.epoch = 0
        height, width = summary.size_max
        bytes_per_pixel = summary.channels * np.dtype(summary.dtype).itemsize + 1
        in_memory = len(self.pairs) * height * width * bytes_per_pixel < memory_limit
        self._decoded = in_threads(self._read, self.pairs) if in_memory else None

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
            generator = np.random.default_rng((self.seed, self.epoch, index, 1))
            image, labels = _random_crop(image, labels, self.crop, generator, self.balance)
        return normalize(image, own_moments), torch.from_numpy(labels.astype(np.int64))

    def whole(self, index: int) -> Whole:
        """Return the image and labels of pair `index`: from memory where they are kept there, else from the disk."""
        pair = self.pairs[index]
        if self._decoded is not None:
            image, labels, own_moments = self._decoded[index]
            return Whole(source_of_array(image, pair.image), labels, own_moments)
        source = pair.open_image()
        if self.summary.mixed and source.shape[2] == 1:
            source = source.as_rgb()
        return Whole(source, self.summary.labels_of(pair, source.size), moments(source))

    def _load(self, index: int) -> _Decoded:
        return self._read(self.pairs[index]) if self._decoded is None else self._decoded[index]

    def _read(self, pair: Pair) -> _Decoded:
        image = self.summary.in_channels(pair.read_image())
        height, width = image.shape[:2]
        return image, self.summary.labels_of(pair, (height, width)), moments(image)


def _random_crop(
    image: np.ndarray, labels: np.ndarray, size: int, generator: np.random.Generator, balance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the same random square of `size` from image [H, W, C] and labels [H, W]."""
    image, labels = _reflect_to(image, size), _reflect_to(labels, size)
    top, left = (int(generator.integers(extent - size + 1)) for extent in labels.shape)
    if balance and generator.random() < balance:
        top, left = _corner_around_class(labels, size, generator) or (top, left)
    window = (slice(top, top + size), slice(left, left + size))
    return image[window], labels[window]


def _corner_around_class(labels: np.ndarray, size: int, generator: np.random.Generator) -> tuple[int, int] | None:
    """Draw the corner of a crop around a pixel of a foreground class, each as likely; None where there is none."""
    present = np.flatnonzero(np.bincount(labels.ravel(), minlength=IGNORED + 1)[1:IGNORED]) + 1
    if not len(present):
        return None
    pixels = np.flatnonzero(labels.ravel() == generator.choice(present))
    pixel = divmod(int(generator.choice(pixels)), labels.shape[1])
    ranges = ((max(0, at - size + 1), min(at, extent - size)) for at, extent in zip(pixel, labels.shape, strict=True))
    top, left = (int(generator.integers(low, high + 1)) for low, high in ranges)
    return top, left


def _reflect_to(pixels: np.ndarray, size: int) -> np.ndarray:
    """Extend [H, W, ...] by reflection on all sides until H and W are at least `size`."""
    missing = [max(size - extent, 0) for extent in pixels.shape[:2]]
    if not any(missing):
        return pixels
    widths = [(count // 2, count - count // 2) for count in missing] + [(0, 0)] * (pixels.ndim - 2)
    return np.pad(pixels, widths, mode="reflect")
