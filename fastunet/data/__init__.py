"""Images and masks, from files to tensors."""

from fastunet.data.images import find_images, read_image, read_mask
from fastunet.data.pairs import (
    DataSummary,
    Pair,
    SegmentationDataset,
    check_foreground,
    find_pairs,
    inspect,
    labels_from_mask,
    mask_from_labels,
    moments,
    normalize,
    split,
)

__all__ = [
    "DataSummary",
    "Pair",
    "SegmentationDataset",
    "check_foreground",
    "find_images",
    "find_pairs",
    "inspect",
    "labels_from_mask",
    "mask_from_labels",
    "moments",
    "normalize",
    "read_image",
    "read_mask",
    "split",
]
