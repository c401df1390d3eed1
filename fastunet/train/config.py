"""The settings of a training: what each means, its usual value, and which values are in range."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass, field, fields
from typing import Any

from fastunet.checks import ConfigError

LARGEST = 2**16  # crops, batches and channels beyond would overflow sizes before memory runs out
_MOST = sys.float_info.max
MAX_LEVELS = 16
SUPERVISED_LEVELS = 4  # with fewer, none is between the first of the decoder and the lowest, which has no head
TILE = 1536  # pixels: what goes through whole in validation, and where nothing else is said
# May differ between a run and its continuation: how long it goes on, and on what.
PLANNED = ("crop", "features", "batch_size")  # from the images and the memory, where None
RESUMABLE = ("steps", "max_minutes", "patience", "tensorboard", "device", "workers")


def _setting(default: Any, meaning: str, *, group: str = "training", **limits: Any) -> Any:
    """Return a field of `TrainConfig`: its usual value, meaning and group in help; limits: low and high, or choices."""
    return field(default=default, metadata={"meaning": meaning, "group": group, **limits})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train`, with what each means as `fastunet train --help` shows it."""

    steps: int = _setting(3000, "Optimiser steps.", low=1, high=sys.maxsize)
    max_minutes: float | None = _setting(
        None, "Limit of the training in minutes; steps or minutes end it, whichever comes first [none]."
    )
    batch_size: int | None = _setting(
        None, "Crops per step in each process [by the memory; at most 4 on a CPU].", low=1, high=LARGEST
    )
    # Below 3 augmentation has nothing to blur.
    crop: int | None = _setting(
        None, "Side of the crops in pixels [by the images; at most 256 on a CPU].", low=3, high=LARGEST
    )
    features: tuple[int, ...] | None = _setting(
        None,
        "Channels of each level, the first at full size [by the crops; at most 16,32,64,128,256 on a CPU].",
        group="model",
    )
    norm: str = _setting(
        "batch", "Normalisation: batch, instance or none.", choices=("batch", "instance", "none"), group="model"
    )
    lr: float = _setting(
        1e-3, "Peak learning rate of AdamW: it rises over the first 3 % and falls along a cosine.", low=0, high=_MOST
    )
    weight_decay: float = _setting(5e-2, "Weight decay of AdamW.", low=0, high=_MOST)
    ema: float = _setting(
        0.0,
        "Validate and keep a moving average of the weights with this decay per step, such as 0.999; 0: none.",
        low=0.0,
        high=0.999999,
    )
    patience: int | None = _setting(
        None, "End after so many of the ten validations without a better score [never].", low=1, high=sys.maxsize
    )
    init: str = _setting("", "Initial weights: a RUN or a file of weights [random].", group="model")
    border_weight: float = _setting(
        0.0, "Weight of background between close objects, w0 of the U-Net paper (10 there); 0: none.", low=0, high=1e6
    )
    augment: str = _setting(
        "default",
        "none; light (flips, quarter turns); default (warps and lighting too); strong (any angle, zoom and gamma too).",
        choices=("none", "light", "default", "strong"),
    )
    flip: bool = _setting(
        True,
        "Mirror and turn by quarters, but for the last 15 %; --no-flip if orientation matters (strong then turns by up "
        "to 15 degrees).",
    )
    balance: float = _setting(
        0.0,
        "Share of the crops taken around a pixel of a foreground class, of each class equally often.",
        low=0.0,
        high=1.0,
    )
    class_weights: str = _setting(
        "none", "Weights in the loss: none, balanced (rare classes count more), or a number for each class: 1,2,5."
    )
    val_fraction: float = _setting(
        0.15, "Share of the images kept out of training, for the scores; 0: none.", group="validation"
    )
    fold: str = _setting(
        "", "Keep out this part instead: 2/5 is the second fifth [the share of --val-fraction].", group="validation"
    )
    deep_supervision: bool = _setting(
        False, "Also train the decoder's lower levels, by heads that the final model drops (4 levels or more)."
    )
    split: str = _setting(
        "last",
        "Images to keep out: the last by name (in a stack, neighbours are alike), or random ones.",
        choices=("last", "random"),
        group="validation",
    )
    classes: int | None = _setting(None, "Number of classes [inferred from the masks].", low=1, high=256, group="model")
    tta: bool = _setting(
        False, "Average eight flips and turns for the scores, for eight times the work.", group="validation"
    )
    tensorboard: bool = _setting(
        False, "Also write event files for TensorBoard (`tensorboard --logdir OUT`).", group="output"
    )
    precision: str = _setting(
        "auto",
        "auto (bf16 where it is faster: on GPUs that multiply it, on CPUs with AMX), fp32, bf16 or fp16.",
        choices=("auto", "fp32", "bf16", "fp16"),
        group="hardware",
    )
    sync_batch_norm: bool = _setting(
        False, "Take batch norm's statistics over the batches of all GPUs (torchrun).", group="hardware"
    )
    device: str = _setting(
        "auto", "auto (a GPU where there is one), cpu or cuda.", choices=("auto", "cpu", "cuda"), group="hardware"
    )
    workers: int | None = _setting(
        None, "Processes that read images [4 with a GPU, else 0].", low=0, high=256, group="hardware"
    )
    seed: int = _setting(0, "Seed of split, weights, crops and augmentation.", low=0, high=2**32 - 1)  # numpy's

    @property
    def split_seed(self) -> int | None:
        """The seed for `data.split`."""
        return self.seed if self.split == "random" else None

    @property
    def fold_number(self) -> tuple[int, int] | None:
        """Which of how many folds is kept out. Raises ConfigError on a text that does not say."""
        if not self.fold:
            return None
        found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", self.fold)
        number, count = (int(part) for part in found.groups()) if found else (1, 1)
        if not number <= count > 1:
            raise ConfigError(f"fold: expected I/N with 1 <= I <= N and N of at least 2, got {self.fold!r}")
        return number, count

    def weights_of_classes(self) -> list[float] | None:
        """Return the weights that were given as numbers; None for others. Raises ConfigError on a wrong one."""
        if self.class_weights in ("none", "balanced"):
            return None
        try:
            weights = [float(part) for part in self.class_weights.split(",")]
        except ValueError:
            weights = [0.0]
        if not all(0 < weight < math.inf for weight in weights):
            raise ConfigError(
                f"class_weights: expected none, balanced or positive numbers with commas between, got "
                f"{self.class_weights!r}"
            )
        return weights

    def check(self) -> None:
        """Raise ConfigError on a value out of range, or where a crop leaves a norm nothing to take statistics of."""
        for each in fields(self):
            name, value = each.name, getattr(self, each.name)
            low, high, choices = (each.metadata.get(key) for key in ("low", "high", "choices"))
            # Written so that NaN is out of every range.
            if None not in (low, value) and not low <= value <= high:
                expected = f"{low} to {high}" if isinstance(high, int) else f"a finite number from {low}"
                raise ConfigError(f"{name}: expected {expected}, got {value}")
            if choices and value not in choices:
                raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        for name, value in (("max_minutes", self.max_minutes), ("lr", self.lr)):
            if value is not None and not value > 0:
                raise ConfigError(f"{name}: expected more than 0, got {value}")
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(f"val_fraction: expected 0 <= fraction < 1, got {self.val_fraction}")
        self.weights_of_classes()
        _ = self.fold_number
        if self.features is not None:
            self._check_net(self.features)

    def _check_net(self, features: tuple[int, ...]) -> None:
        levels, crop = len(features), self.crop
        if not (2 <= levels <= MAX_LEVELS and all(1 <= width <= LARGEST for width in features)):
            got = ",".join(map(str, features))
            raise ConfigError(f"features: expected 2 to {MAX_LEVELS} numbers from 1 to {LARGEST}, got {got}")
        if self.deep_supervision and levels < SUPERVISED_LEVELS:
            raise ConfigError(f"deep_supervision: expected at least {SUPERVISED_LEVELS} levels, got {levels}")
        if crop is not None and (reason := too_small(crop, crop, levels, self.norm)):
            raise ConfigError(f"crop: {reason}")
        if self.norm == "batch" and self.batch_size == 1 and crop is not None and crop < 2**levels:
            raise ConfigError(
                f"batch_size, crop: expected more than one value per channel at the bottom for batch norm, got one: "
                f"take a batch of 2, or crops of {2**levels}"
            )


def too_small(height: int, width: int, levels: int, norm: str | None) -> str | None:
    """Say why an image of this size does not go through a net of so many levels, or None where it does."""
    least = 2 ** (levels - 1)
    if min(height, width) < least:
        return f"expected at least {least}x{least} pixels for {levels} levels, got {height}x{width}"
    if norm == "instance" and max(height, width) < 2 * least:
        size = f"{least}x{2 * least}"
        return f"expected at least {size} pixels for {levels} levels with instance norm, got {height}x{width}"
    return None


def is_faster_in_bf16(cpu: bool) -> bool:
    """Whether bf16 is faster than fp32: by tensor cores, or a CPU's AMX.

    AVX512-BF16 alone gains less than Winograd's algorithm does in fp32.
    """
    import torch

    from fastunet.torch_private import has_amx

    if torch.cuda.is_available() and not cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return has_amx()
