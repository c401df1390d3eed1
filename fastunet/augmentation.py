"""`fastunet.train.augmentation` under the name that it was first imported by."""

from fastunet.train.augmentation import Augmentation

__all__ = ["Augmentation"]
