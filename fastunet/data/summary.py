"""Read every file of a data set once, check that all fit together, and sum them up: `inspect`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fastunet.checks import ConfigError, DataError, some_of
from fastunet.data.labels import (
    IGNORED,
    MAX_INFERRED_CLASSES,
    are_instances,
    labels_of,
    likely_cause,
    parts_of_values,
    value_of,
)
from fastunet.data.layout import DataOptions, Value, text_of
from fastunet.data.pairing import Pair

MAX_CLASSES = 256  # labels travel and are written as uint8
SKIPPED = -1  # the code of ignored pixels where a threshold makes 0 and 1 of the others
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class DataSummary:
    """What `inspect` found: all that a model and its inputs depend on."""

    count: int  # number of pairs
    channels: int  # C of every image; where some are grey and others RGB, 3
    classes: int  # 1 for foreground and background (one logit), else K >= 3 (K logits)
    mask_values: tuple[Value, ...]  # every value that occurs in a mask, ascending
    dtype: str  # of every image: uint8, uint16 or float32
    size_min: tuple[int, int]  # smallest and largest (height, width), each taken by itself, in pixels
    size_max: tuple[int, int]
    labels: tuple[Value, ...] = ()  # the value or colour of each class; none: 0 and more, or class indices
    ignore: tuple[Value, ...] = ()  # values of pixels that do not count
    threshold: float | None = None  # foreground from this value on
    mixed: bool = False  # some images are grey, others RGB
    names: tuple[str, ...] = ()  # of the classes but the background's, where they have any

    @property
    def ignored(self) -> bool:
        """Whether labels may be `IGNORED`."""
        return bool(self.ignore)

    def class_text(self, label: int) -> str:
        """Name a class by its label and what stands for it in masks."""
        if self.names:
            return ("background", *self.names)[label]
        name = f"class {label}" if self.classes > 1 else ("background", "foreground")[label]
        if self.threshold is not None:
            return f"{name} ({'below' if label == 0 else 'from'} {self.threshold:g})"
        if self.labels:
            return f"{name} ({text_of(self.labels[label])})"
        return name

    def in_channels(self, image: np.ndarray) -> np.ndarray:
        """Return a grey image [H, W, 1] as RGB where others are; any other as it is."""
        return np.repeat(image, 3, -1) if self.mixed and image.shape[2] == 1 else image

    def labels_of(self, pair: Pair, size: tuple[int, int] | None = None) -> np.ndarray:
        """Read the mask of a pair as uint8 labels [H, W]: class indices, or `IGNORED`.

        `size` is the image's, where it has been read.

        Raises:
            DataError: a file that has changed since it was inspected.
        """
        colours = any(isinstance(value, tuple) for value in self.labels + self.ignore)
        mask, are_colours = pair.read_codes(size, colours=colours, any_numbers=self.threshold is not None)
        try:
            if are_colours and not colours:
                raise DataError("expected a mask of numbers, got colours")
            return labels_of(mask, self.classes, values=self.labels, ignore=self.ignore, threshold=self.threshold)
        except DataError as error:
            raise DataError(f"{pair.mask_name}: {error}") from error


@dataclass(frozen=True)
class Facts:
    """One pair, read."""

    pair: Pair
    shape: tuple[int, ...]  # of the image, [H, W, C]
    dtype: str
    digest: str  # of the image's pixels
    counts: dict[int, int]  # pixels of each code in the mask; of 0, 1 and SKIPPED, where a threshold makes them
    are_colours: bool
    parts: int  # connected parts of equal codes above 0, where there are enough to be objects; else 0

    @property
    def values(self) -> frozenset[Value]:
        """Values that occur in the mask, but for SKIPPED ones."""
        return frozenset(value_of(code, self.are_colours) for code in self.counts if code != SKIPPED)


def inspect(pairs: Sequence[Pair], classes: int | None = None, options: DataOptions | None = None) -> DataSummary:
    """Read every file once, check that all fit together, and sum them up.

    Args:
        classes: 1 or 2 for foreground and background, K >= 3 for class indices below K; None infers it: as many as
            `options` give values, else binary if the masks hold only 0 and 1 or only 0 and 255, else K <= 32 classes
            if they hold exactly 0..K-1.

    Raises:
        DataError: an unreadable file, sizes that differ in a pair, channels (but grey beside RGB) or dtypes that differ
            between images, mask values outside the classes, or, where `classes` is to be inferred, no foreground in
            any mask, or instance labels. The message names the file, and what it is likely to be.
        ConfigError: `classes` outside 1..256, or other than the values that `options` give.
    """
    if not pairs:
        raise DataError("data: expected at least one pair of image and mask, got none")
    options = options or DataOptions()
    check_classes(classes, options)
    return sum_up(in_threads(lambda pair: read_facts(pair, options), pairs), classes, options)


def check_classes(classes: int | None, options: DataOptions) -> None:
    """Raise ConfigError on a number of classes out of range, or other than that of the labels."""
    if classes is not None and not 1 <= classes <= MAX_CLASSES:
        raise ConfigError(f"classes: expected 1 to {MAX_CLASSES}, got {classes}")
    if classes is not None and options.labels and max(classes, 2) != len(options.label_values):
        raise ConfigError(f"classes: expected {len(options.label_values)} as of labels {options.labels}, got {classes}")
    if classes == MAX_CLASSES and options.ignore:
        raise ConfigError(f"classes: expected at most {MAX_CLASSES - 1} beside ignored values, got {classes}")


def sum_up(facts: Sequence[Facts], classes: int | None, options: DataOptions) -> DataSummary:
    """Check that pairs fit together, and sum them up; see `inspect`."""
    first = facts[0]
    channels = {fact.shape[2] for fact in facts}
    for fact in facts:
        if fact.shape[2] != first.shape[2] and channels != {1, 3}:
            expected = f"{first.shape[2]} channels as in {first.pair.image.name}"
            raise DataError(f"{fact.pair.image}: expected {expected}, got {fact.shape[2]}")
        if fact.dtype != first.dtype:
            expected = f"{first.dtype} as in {first.pair.image.name}"
            raise DataError(f"{fact.pair.image}: expected {expected}, got {fact.dtype}")
    sizes = np.array([fact.shape[:2] for fact in facts])
    summary = DataSummary(
        count=len(facts),
        channels=max(channels),
        classes=_check_mask_values(facts, classes, options),
        mask_values=tuple(sorted(frozenset().union(*(fact.values for fact in facts)))),
        dtype=first.dtype,
        size_min=(int(sizes[:, 0].min()), int(sizes[:, 1].min())),
        size_max=(int(sizes[:, 0].max()), int(sizes[:, 1].max())),
        labels=options.label_values,
        ignore=options.ignored_values,
        threshold=options.threshold,
        mixed=len(channels) > 1,
        names=first.pair.names,
    )
    if classes is None:
        check_foreground([fact.pair for fact in facts], summary)
    return summary


def check_foreground(pairs: Sequence[Pair], summary: DataSummary) -> None:
    """Refuse pairs to learn from of which no mask holds anything but background; to be scored on, they may be.

    Raises:
        DataError: only background. The message names the folder of masks.
    """
    background = summary.labels[0] if summary.labels else 0
    ignored = summary.ignore if summary.threshold is None else ()
    if set(summary.mask_values) <= {background, *ignored}:
        folder, got = pairs[0].mask.parent, ", ".join(map(text_of, summary.mask_values))
        raise DataError(f"{folder}: expected foreground in at least one of {len(pairs)} masks, got only {got}")


def read_facts(pair: Pair, options: DataOptions) -> Facts:
    """Read the files of a pair. Raises DataError where one cannot be read, or their sizes differ."""
    image = pair.read_image()
    height, width = image.shape[:2]
    any_numbers = options.threshold is not None
    mask, are_colours = pair.read_codes((height, width), colours=options.are_colours, any_numbers=any_numbers)
    if image.shape[:2] != mask.shape:
        expected, actual = (f"{height} x {width}" for height, width in (image.shape[:2], mask.shape))
        raise DataError(f"{pair.mask_name}: expected height x width {expected} as of {pair.image.name}, got {actual}")
    if options.threshold is not None:
        labels = labels_of(mask, 1, ignore=options.ignored_values, threshold=options.threshold)
        mask = np.where(labels == IGNORED, SKIPPED, labels.astype(np.int16))
    codes, numbers = np.unique(mask, return_counts=True)
    counts = {int(code): int(number) for code, number in zip(codes, numbers, strict=True)}
    parts = parts_of_values(mask) if len(counts) > 3 and not (are_colours or options.labels or pair.names) else 0
    digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16, usedforsecurity=False).hexdigest()
    return Facts(pair, image.shape, image.dtype.name, digest, counts, are_colours, parts)


def _check_mask_values(facts: Sequence[Facts], classes: int | None, options: DataOptions) -> int:
    """Give the number of classes (1 = binary), or name the first file whose values do not fit."""
    ignored = frozenset(options.ignored_values if options.threshold is None else ())
    found: frozenset[Value] = frozenset().union(*(fact.values for fact in facts)) - ignored
    names = facts[0].pair.names
    given = tuple(range(len(names) + 1)) if names else options.label_values
    if names and classes is not None and max(classes, 2) != len(given):
        raise ConfigError(f"classes: expected {len(given)}, the background and {', '.join(names)}, got {classes}")
    is_instances = not given and classes is None and are_instances((fact.counts, fact.parts) for fact in facts)
    if given:
        count, allowed = (1 if len(given) == 2 else len(given)), frozenset(given)
    elif is_instances:
        count, allowed = 0, frozenset({0})
    else:
        count, allowed = _choose_classes(found, classes)
    guilty = next((fact for fact in facts if fact.values - ignored - allowed), None)
    if guilty is None:
        return count
    if any(fact.are_colours for fact in facts):  # of which those that are all grey read as numbers
        found = frozenset(value if isinstance(value, tuple) else (value, value, value) for value in found)
    expected = "0 and 1, or 0 and 255"
    if given:
        expected = ", ".join(map(text_of, given))
    elif classes is None:
        expected += ", or class indices 0 to K-1 (if some never occur, give the number of classes)"
    elif classes > 2:
        expected = f"class indices 0 to {classes - 1}"
    cause, mask = likely_cause(guilty.pair.mask, found, is_instances), guilty.pair.mask_name
    got, all_values = (some_of(map(text_of, sorted(values))) for values in (guilty.values, found))
    raise DataError(f"{mask}: expected mask values {expected}, got {got} (all masks together: {all_values}): {cause}")


def _choose_classes(found: frozenset[Value], classes: int | None) -> tuple[int, frozenset[Value]]:
    """The number of classes (1 = binary) and the values that masks may then hold, of all values found."""
    if classes is not None and classes > 2:
        return classes, frozenset(range(classes))
    looks_like_255 = 255 in found and 1 not in found
    binary: frozenset[Value] = frozenset({0, 255 if looks_like_255 else 1})
    if classes is not None or looks_like_255 or found <= binary:
        return 1, binary
    limit = range(MAX_INFERRED_CLASSES)
    count = next((value for value in limit if value not in found), MAX_INFERRED_CLASSES)
    return count, frozenset(range(count))


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Map in order over a few threads (decoders release the lock); the first error stops the rest."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))
