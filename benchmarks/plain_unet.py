"""The U-Net people write by hand today, trained the way they train it: the opponent of `benchmarks.accuracy`.

Plain PyTorch, NCHW float32, features 16..256, random 256x256 crops with flips and quarter turns, batches of 4,
AdamW at 1e-3 with a cosine schedule, BCE + Dice. Nothing of fastunet's is used here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers += [nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)]
        layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class PlainUNet(nn.Module):
    def __init__(
        self, in_channels: int = 1, out_channels: int = 1, features: Sequence[int] = (16, 32, 64, 128, 256)
    ) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            double_conv(a, b) for a, b in zip((in_channels, *features), features, strict=False)
        )
        pairs = list(zip(features[:0:-1], features[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.decoder = nn.ModuleList(double_conv(a, b) for a, b in pairs)
        self.head = nn.Conv2d(features[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level in self.encoder:
            x = level(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        for up, level, skip in zip(self.up, self.decoder, reversed(skips[:-1]), strict=True):
            x = level(torch.cat([skip, up(x)], dim=1))
        return self.head(x)


def bce_dice(logits: Tensor, target: Tensor) -> Tensor:
    p = logits.sigmoid()
    dice = 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, target) + dice


def random_batch(
    images: Tensor, masks: Tensor, rng: np.random.Generator, crop: int, batch: int
) -> tuple[Tensor, Tensor]:
    """`batch` random crops of images and masks [N, 1, H, W], each flipped and turned at random."""
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    for _ in range(batch):
        n = rng.integers(len(images))
        top, left = (int(rng.integers(size - crop + 1)) for size in images.shape[-2:])
        turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
        for source, out in ((images, xs), (masks, ys)):
            tile = torch.rot90(source[n, :, top : top + crop, left : left + crop], turns, (-2, -1))
            out.append(tile.flip(-1) if mirror else tile)
    return torch.stack(xs), torch.stack(ys)


def train_plain(
    images: Tensor,
    masks: Tensor,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    crop: int = 256,
    batch: int = 4,
) -> tuple[PlainUNet, int, float]:
    """Train on images [N, 1, H, W] in 0..1 and masks of 0 and 1 for `steps` or `minutes`: (model, steps, seconds)."""
    if (steps is None) == (minutes is None):
        raise ValueError("give exactly one of steps and minutes")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = PlainUNet().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start, step, progress = time.perf_counter(), 0, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = 0.5e-3 * (1 + math.cos(math.pi * progress))
        x, y = random_batch(images, masks, rng, crop, batch)
        optimizer.zero_grad()
        bce_dice(model(x), y).backward()
        optimizer.step()
        step += 1
        elapsed = time.perf_counter() - start
        progress = step / steps if steps is not None else elapsed / (60 * (minutes or 0))
    return model.eval(), step, time.perf_counter() - start


@torch.no_grad()
def predict_plain(model: PlainUNet, images: Tensor) -> Tensor:
    """The mask (bool, [N, 1, H, W]) the plain model gives, one whole image at a time."""
    return torch.cat([model(image[None]).sigmoid() > 0.5 for image in images])
