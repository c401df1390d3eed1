"""Images and masks, from files to tensors. What reads them is imported when it is used: options need no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastunet.data.dataset import SegmentationDataset as SegmentationDataset
    from fastunet.data.dataset import moments as moments
    from fastunet.data.dataset import normalize as normalize
    from fastunet.data.images import find_images as find_images
    from fastunet.data.images import read_image as read_image
    from fastunet.data.images import read_mask as read_mask
    from fastunet.data.labels import IGNORED as IGNORED
    from fastunet.data.labels import labels_from_mask as labels_from_mask
    from fastunet.data.labels import mask_from_labels as mask_from_labels
    from fastunet.data.layout import DataOptions as DataOptions
    from fastunet.data.pairing import Pair as Pair
    from fastunet.data.pairing import find_pairs as find_pairs
    from fastunet.data.pairing import split as split
    from fastunet.data.summary import DataSummary as DataSummary
    from fastunet.data.summary import check_foreground as check_foreground
    from fastunet.data.summary import inspect as inspect

# Module -> the public names that it holds.
_HELD = {
    "dataset": ("SegmentationDataset", "moments", "normalize"),
    "images": ("find_images", "read_image", "read_mask"),
    "labels": ("IGNORED", "labels_from_mask", "mask_from_labels"),
    "layout": ("DataOptions",),
    "pairing": ("Pair", "find_pairs", "split"),
    "summary": ("DataSummary", "check_foreground", "inspect"),
}
_HOMES = {name: module for module, names in _HELD.items() for name in names}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastunet.data' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastunet.data.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
