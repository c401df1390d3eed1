"""The settings of a training: what each means, its usual value, and which values are in range."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from fastunet.checks import ConfigError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
CHOICES = {
    "precision": PRECISIONS,
    "norm": ("batch", "instance", "none"),
    "split": ("last", "random"),
    "device": ("auto", "cpu", "cuda"),
}
LARGEST = 2**16  # crops, batches and channels beyond would overflow sizes before memory runs out
MAX_LEVELS = 16
TILE = 2048  # pixels: what goes through whole in validation, and where nothing else is said
RANGES = {
    "steps": (1, sys.maxsize),
    "batch_size": (1, LARGEST),
    "crop": (3, LARGEST),  # below, augmentation has nothing to blur
    "weight_decay": (0, sys.float_info.max),
    "lr": (0, sys.float_info.max),
    "classes": (1, 256),
    "workers": (0, 256),
    "seed": (0, 2**32 - 1),  # numpy's
}
# May differ between a run and its continuation: how long it goes on, and on what.
RESUMABLE = ("steps", "max_minutes", "device", "workers")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train`.

    Attributes:
        steps: optimiser steps.
        max_minutes: wall-clock limit for the training loop; the learning rate reaches its end by whichever of the two
            limits comes first. None for no limit.
        batch_size: crops per step.
        crop: their edge in pixels.
        features: channels of each level of the U-Net.
        norm: "batch", "instance" or "none".
        lr, weight_decay: of AdamW; the rate rises over the first 3 % and falls to zero along a cosine.
        val_fraction: share of the images kept out of training, on which the metrics are taken; 0 keeps none.
        split: which are kept out: the "last" by name, since neighbours in a stack or a film are nearly the same
            picture, or a "random" choice by the seed.
        classes: None infers them from the masks.
        tta: average the final predictions over the eight flips and quarter turns.
        precision: "fp32", "bf16", "fp16", or "auto": bf16 where the hardware multiplies it natively, else fp32.
        device: "cpu", "cuda", or "auto": the accelerator, where there is one.
        workers: processes that read images; None takes up to 4 beside a GPU, none on the CPU.
        seed: of the split, the weights, the crops and the augmentation.
    """

    steps: int = 3000
    max_minutes: float | None = None
    batch_size: int = 4
    crop: int = 256
    features: tuple[int, ...] = (16, 32, 64, 128, 256)
    norm: str = "batch"
    lr: float = 1e-3
    weight_decay: float = 5e-2
    val_fraction: float = 0.15
    split: str = "last"
    classes: int | None = None
    tta: bool = True
    precision: str = "auto"
    device: str = "auto"
    workers: int | None = None
    seed: int = 0

    @property
    def split_seed(self) -> int | None:
        """The seed for `data.split`."""
        return self.seed if self.split == "random" else None

    def check(self) -> None:
        """Raise ConfigError on a value out of range, or where a crop leaves a norm nothing to take statistics of."""
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            # Written so that NaN is out of every range.
            if value is not None and not low <= value <= high:
                expected = f"{low} to {high}" if isinstance(high, int) else f"a finite number from {low}"
                raise ConfigError(f"{name}: expected {expected}, got {value}")
        for name, value in (("max_minutes", self.max_minutes), ("lr", self.lr)):
            if value is not None and not value > 0:
                raise ConfigError(f"{name}: expected more than 0, got {value}")
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(f"val_fraction: expected 0 <= fraction < 1, got {self.val_fraction}")
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise ConfigError(f"{name}: expected one of {', '.join(values)}, got {getattr(self, name)!r}")
        levels = len(self.features)
        if not (2 <= levels <= MAX_LEVELS and all(1 <= width <= LARGEST for width in self.features)):
            got = ",".join(map(str, self.features))
            raise ConfigError(f"features: expected 2 to {MAX_LEVELS} numbers from 1 to {LARGEST}, got {got}")
        if reason := too_small(self.crop, self.crop, levels, self.norm):
            raise ConfigError(f"crop: {reason}")
        if self.norm == "batch" and self.batch_size == 1 and self.crop < 2**levels:
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


def multiplies_bf16(cpu: bool) -> bool:
    """Whether bf16 is faster than fp32: tensor cores, or a CPU with AMX or AVX512-BF16."""
    import torch

    if torch.cuda.is_available() and not cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
