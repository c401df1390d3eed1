"""The settings of a training: what each means, its usual value, and which values are in range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .checks import ConfigError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
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
        """Raise ConfigError on a value out of range."""
        for name in ("steps", "batch_size", "crop"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ConfigError(f"max_minutes: expected more than 0, got {self.max_minutes}")
        if not (self.lr > 0 and self.weight_decay >= 0):
            raise ConfigError(f"expected lr > 0 and weight_decay >= 0, got {self.lr} and {self.weight_decay}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.norm not in ("batch", "instance", "none"):
            raise ConfigError(f"norm: expected batch, instance or none, got {self.norm!r}")
        if self.split not in ("last", "random"):
            raise ConfigError(f"split: expected last or random, got {self.split!r}")
        least = 2 ** (len(self.features) - 1)
        if self.crop < least:
            raise ConfigError(
                f"crop: expected at least {least} pixels for {len(self.features)} levels, got {self.crop}"
            )


def multiplies_bf16(cpu: bool) -> bool:
    """Whether bf16 is faster than fp32: tensor cores, or a CPU with AMX or AVX512-BF16."""
    if torch.cuda.is_available() and not cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
