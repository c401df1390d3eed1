"""U-Nets as people write them by hand, in plain torch.nn: models for the drop-in benchmark and its tests.

Three habits that `torch.compile(model, backend="fastunet")` meets: padding to the skip's size, [skip, up] order and
activations in place; [up, skip] order and a sigmoid at the end; residual blocks of group norm and SiLU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Twice(nn.Sequential):
    """Two times convolution, batch norm and ReLU in place."""

    def __init__(self, channels: int, out: int) -> None:
        layers: list[nn.Module] = []
        for given in (channels, out):
            layers += [nn.Conv2d(given, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class PaddedUNet(nn.Module):
    """Any size: what is upsampled is padded to the skip's size. Transposed or bilinear upsampling."""

    def __init__(self, channels: int, classes: int, widths: Sequence[int], *, bilinear: bool = False) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.first = Twice(channels, widths[0])
        self.downs = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), Twice(a, b)) for a, b in pairs)
        self.ups = nn.ModuleList(
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            if bilinear
            else nn.ConvTranspose2d(b, a, 2, stride=2)
            for a, b in reversed(pairs)
        )
        self.blocks = nn.ModuleList(Twice(a + (b if bilinear else a), a) for a, b in reversed(pairs))
        self.last = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.first(x)]
        for down in self.downs:
            skips.append(down(skips[-1]))
        x = skips.pop()
        for up, block in zip(self.ups, self.blocks, strict=True):
            x, skip = up(x), skips.pop()
            dy, dx = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
            x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
            x = block(torch.cat([skip, x], dim=1))
        return self.last(x)


class SigmoidUNet(nn.Module):
    """Sizes divisible by 2**depth; [up, skip] order; probabilities."""

    def __init__(self, channels: int, classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.encoders = nn.ModuleList(Twice(a, b) for a, b in zip((channels, *widths[:-1]), widths, strict=True))
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(b, a, kernel_size=2, stride=2) for a, b in reversed(pairs))
        self.decoders = nn.ModuleList(Twice(2 * a, a) for a, _ in reversed(pairs))
        self.conv = nn.Conv2d(widths[0], classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for encoder in self.encoders:
            x = encoder(self.pool(skips[-1]) if skips else x)
            skips.append(x)
        skips.pop()
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            x = decoder(torch.cat((up(x), skips.pop()), dim=1))
        return torch.sigmoid(self.conv(x))


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution where the channels change."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(2, out), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class ResidualUNet(nn.Module):
    """As diffusion models have it: strided convolutions down, nearest upsampling and a convolution up."""

    def __init__(self, channels: int, classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(Residual(a, a) for a in widths)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.ups = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in reversed(pairs))
        self.merges = nn.ModuleList(Residual(2 * a, a) for a, _ in reversed(pairs))
        self.last = nn.Conv2d(widths[0], classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.blocks[0](self.first(x))]
        for down, block in zip(self.downs, list(self.blocks)[1:], strict=True):
            skips.append(block(down(skips[-1])))
        x = skips.pop()
        for up, merge in zip(self.ups, self.merges, strict=True):
            x = up(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = merge(torch.cat([x, skips.pop()], dim=1))
        return self.last(F.silu(x))
