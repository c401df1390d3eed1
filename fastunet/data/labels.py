"""From the values of masks to labels 0..K-1 and back, and what values that are no classes are likely to be."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from fastunet.checks import DataError
from fastunet.data.layout import Value, text_of, texts_of

IGNORED = 255  # the label of pixels that do not count
MAX_INFERRED_CLASSES = 32  # beyond, values without a gap are rather grey levels than classes
FEW = 3  # values of a mask, each in one part, may be organs as well as objects
WHOLE = 0.9  # of the objects of instance labels are in one part, at least


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


def mask_from_labels(labels: np.ndarray, classes: int, values: Sequence[Value] = ()) -> np.ndarray:
    """Turn labels [H, W] into what is written to a file: 0 and 255 for one class, else the labels.

    Args:
        values: of each class in the masks that were trained on, where these were given; of colours, which a palette
            holds, the labels are written.

    Returns:
        uint8 [H, W], or uint16 where a value is larger.
    """
    if values and isinstance(values[0], int):
        return np.array(values, dtype_of(values))[labels]
    return labels.astype(np.uint8) * np.uint8(255 if classes == 1 and not values else 1)


def dtype_of(values: Sequence[Value]) -> str:
    """Return the dtype of a mask with these values: uint8 where it holds them, or colours by their indices."""
    return "uint16" if any(isinstance(value, int) and value > 255 for value in values) else "uint8"


def codes_of(values: Iterable[Value]) -> np.ndarray:
    """Return values as integers: colours as 0xRRGGBB."""
    return np.array([code_of(value) for value in values], np.int64)


def code_of(value: Value) -> int:
    """Return a value as an integer."""
    return value[0] << 16 | value[1] << 8 | value[2] if isinstance(value, tuple) else value


def value_of(code: int, is_colour: bool) -> Value:
    """Return the value that a code stands for."""
    return (code >> 16, code >> 8 & 255, code & 255) if is_colour else code


def labels_of(
    mask: np.ndarray,
    classes: int,
    *,
    values: Sequence[Value] = (),
    ignore: Sequence[Value] = (),
    threshold: float | None = None,
) -> np.ndarray:
    """Turn the codes of a mask [H, W] into uint8 labels [H, W], `IGNORED` where a pixel does not count.

    Args:
        values: of each class; none: as `labels_from_mask`.
        threshold: foreground is what is at least this; for masks of any numbers.

    Raises:
        DataError: a value that is none of these.
    """
    codes = codes_of(values)
    if values:  # which a mask of 8 bits may not hold
        mask = mask.astype(np.promote_types(mask.dtype, np.int32))
    skipped = np.isin(mask, codes_of(ignore)) if ignore else None
    kept = mask if skipped is None else np.where(skipped, mask.dtype.type(codes[0] if values else 0), mask)
    if threshold is not None:
        labels = (kept >= threshold).astype(np.uint8)
    elif values:
        order = np.argsort(codes)
        place = np.searchsorted(codes[order], kept).clip(max=len(codes) - 1)
        labels = order[place].astype(np.uint8)
        if (wrong := codes[labels] != kept).any():
            got = text_of(value_of(int(kept[wrong][0]), isinstance(values[0], tuple)))
            raise DataError(f"mask: expected {', '.join(map(text_of, values))}, got {got}")
    else:
        labels = labels_from_mask(kept, classes)
    if skipped is not None:
        labels[skipped] = IGNORED
    return labels


# --- what values are that are no classes ---


def parts_of_values(mask: np.ndarray) -> int:
    """Count the connected parts of equal values above 0 in a mask [H, W]."""
    from skimage.measure import label

    return int(label(mask, background=0, connectivity=2, return_num=True)[1])


def are_instances(masks: Iterable[tuple[Collection[int], int]]) -> bool:
    """Tell instance labels from classes, by the values above 0 of each mask and the number of their parts.

    In instance labels nearly every value is one connected part, and the values of a mask are 1 to n with its own n, or
    many more than classes are. Of classes many have several parts; organs, with one each, are the same in all images.
    """
    found = [(set(values) - {0}, parts) for values, parts in masks]
    counts = [len(values) for values, _ in found]
    if max(counts, default=0) <= FEW or sum(counts) < WHOLE * sum(parts for _, parts in found):
        return False
    numbered = all(values == set(range(1, len(values) + 1)) for values, _ in found)
    many = len(set().union(*(values for values, _ in found))) >= MAX_INFERRED_CLASSES
    return many or not numbered or len(set(counts)) > 1 or counts[0] > 8


def likely_cause(path: Path, found: Collection[Value], is_instances: bool) -> str:
    """Say what the values of masks are likely to be, of which `path` is one, and which option takes them."""
    is_jpeg = False
    if path.is_file():  # and no folder of sections
        with path.open("rb") as file:
            is_jpeg = file.read(3) == b"\xff\xd8\xff"
    numbers = [value for value in found if isinstance(value, int)]
    if is_jpeg:
        return f"JPEG is lossy: masks hold {len(found)} values; --threshold 128 tells foreground from background"
    if len(numbers) < len(found) <= MAX_INFERRED_CLASSES:
        return f"looks like a colour for each class: --labels {texts_of(found)}, the background's first"
    if len(numbers) < len(found):
        return f"{len(found)} colours are rather a picture than a mask"
    if is_instances:
        return (
            "looks like instance labels, a number for each object: --threshold 1 trains on objects against "
            "background; if they are classes, say how many by --classes"
        )
    if len(found) <= 16:
        return f"if these are the classes: --labels {texts_of(found)}"
    return f"{len(found)} values are rather grey levels than classes: --threshold {(min(numbers) + max(numbers)) // 2}?"
