"""The U-Net of Ronneberger et al. 2015 (arXiv:1505.04597) in plain PyTorch modules, with the parameter names of
milesial/Pytorch-UNet.

Differences from the paper are milesial's: 'same' padding, batch norm after each convolution, the up-sampled map
padded to its skip's size. Read it as the definition of `fastunet.UNet`, which has the same parameters and another
forward. With dims=3 every layer is the one of volumes, as in the 3D U-Net of Cicek et al. 2016 (arXiv:1606.06650).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = (None, "sigmoid", "softmax")
CHOICES: dict[str, tuple[str | None, ...]] = {
    "norm": ("batch", "instance", None),
    "activation": ("relu", "leaky_relu"),
    "head": HEADS,
}
LEAKY_SLOPE = 0.01


class Layers(NamedTuple):
    """torch's layers of images, or of volumes, and how their upsampling interpolates."""

    conv: Any
    batch_norm: Any
    instance_norm: Any
    max_pool: Any
    conv_transpose: Any
    interpolation: str


LAYERS = {
    2: Layers(nn.Conv2d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.MaxPool2d, nn.ConvTranspose2d, "bilinear"),
    3: Layers(nn.Conv3d, nn.BatchNorm3d, nn.InstanceNorm3d, nn.MaxPool3d, nn.ConvTranspose3d, "trilinear"),
}


class DoubleConv(nn.Module):
    """Twice conv3x3, norm, activation: [N, in, H, W] to [N, out, H, W], or conv3x3x3 of [N, in, D, H, W]. A convolution
    has a bias where no norm follows.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int,
        *,
        norm: str | None,
        activation: str,
        dims: int = 2,
    ) -> None:
        super().__init__()
        of, layers = LAYERS[dims], list[nn.Module]()
        for a, b in ((in_channels, mid_channels), (mid_channels, out_channels)):
            layers.append(of.conv(a, b, 3, padding=1, bias=norm is None))
            if norm == "batch":
                layers.append(of.batch_norm(b))
            else:
                layers.append(of.instance_norm(b, affine=True) if norm == "instance" else nn.Identity())
            layers.append(nn.ReLU() if activation == "relu" else nn.LeakyReLU(LEAKY_SLOPE))
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Down(nn.Module):
    """Halve the image by max-pooling, then DoubleConv."""

    def __init__(self, double_conv: DoubleConv, *, dims: int = 2) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(LAYERS[dims].max_pool(2), double_conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


def padding_to(low: Tensor, skip: Tensor, dims: int = 2) -> list[int]:
    """Return zeros [left, right, top, bottom], of volumes also [front, back], that bring low to skip's size; of an odd
    difference the larger half right, below and behind.
    """
    missing = [skip.shape[axis] - low.shape[axis] for axis in range(-1, -1 - dims, -1)]
    return [zeros for less in missing for zeros in (less // 2, less - less // 2)]


class Up(nn.Module):
    """Double the lower level, pad it to the skip's size, and DoubleConv the two joined as [skip, up]."""

    def __init__(self, up: nn.Module, conv: DoubleConv, *, dims: int = 2) -> None:
        super().__init__()
        self.up, self.conv, self.dims = up, conv, dims

    def forward(self, low: Tensor, skip: Tensor) -> Tensor:
        low = self.up(low)
        return self.conv(torch.cat([skip, F.pad(low, padding_to(low, skip, self.dims))], dim=1))


class OutConv(nn.Module):
    """The 1x1 head: logits, or probabilities where head is "sigmoid" or "softmax"."""

    def __init__(self, in_channels: int, out_channels: int, head: str | None, *, dims: int = 2) -> None:
        super().__init__()
        self.conv, self.head = LAYERS[dims].conv(in_channels, out_channels, 1), head

    def extra_repr(self) -> str:
        return f"head={self.head!r}"

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.conv(x))

    def activate(self, y: Tensor) -> Tensor:
        """Return what the head makes of the logits."""
        if self.head is None:
            return y
        return y.sigmoid() if self.head == "sigmoid" else y.softmax(dim=1)


class ReferenceUNet(nn.Module):
    """The U-Net in plain PyTorch: [N, in_channels, H, W] to [N, out_channels, H, W], any float dtype; with dims=3
    [N, in_channels, D, H, W] to [N, out_channels, D, H, W].

    Arguments are those of `fastunet.UNet`, which says what each means. `double_conv_type`, `down_type`, `up_type` and
    `out_type` are the blocks a subclass may replace by ones with the same parameters.
    """

    double_conv_type, down_type, up_type, out_type = DoubleConv, Down, Up, OutConv

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        features: Sequence[int] = (64, 128, 256, 512, 1024),
        norm: str | None = "batch",
        upsample: str = "transpose",
        activation: str = "relu",
        head: str | None = None,
        dims: int = 2,
    ) -> None:
        super().__init__()
        features = tuple(features)
        if dims not in LAYERS:
            raise ValueError(f"dims: expected 2, of images, or 3, of volumes, got {dims!r}")
        if len(features) < 2 or min(in_channels, out_channels, *features) < 1:
            raise ValueError(
                f"expected in_channels, out_channels >= 1 and two or more features >= 1, "
                f"got {in_channels}, {out_channels} and {features}"
            )
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "features": features,
            "norm": norm,
            "upsample": upsample,
            "activation": activation,
            "head": head,
            "dims": dims,
        }
        of = LAYERS[dims]
        for name, choices in {**CHOICES, "upsample": ("transpose", of.interpolation)}.items():
            if (value := self.config[name]) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
        self.depth, self.dims = len(features) - 1, dims
        interpolates = upsample != "transpose"

        def double_conv(a: int, b: int, mid: int | None = None) -> DoubleConv:
            return self.double_conv_type(a, b, mid or b, norm=norm, activation=activation, dims=dims)

        self.inc = double_conv(in_channels, features[0])
        for level in range(1, self.depth + 1):
            # Interpolation keeps the channel count, so each level already ends with the count of the skip above
            # it.
            narrow = interpolates and level == self.depth
            block = double_conv(features[level - 1], features[level - 1] if narrow else features[level])
            self.add_module(f"down{level}", self.down_type(block, dims=dims))
        for level in range(self.depth - 1, -1, -1):
            skip = features[level]
            up: nn.Module
            if interpolates:
                up = nn.Upsample(scale_factor=2, mode=of.interpolation, align_corners=True)
                conv = double_conv(2 * skip, features[max(level - 1, 0)], mid=skip)
            else:
                up = of.conv_transpose(features[level + 1], skip, 2, stride=2)
                conv = double_conv(2 * skip, skip)
            self.add_module(f"up{self.depth - level}", self.up_type(up, conv, dims=dims))
        self.outc = self.out_type(features[0], out_channels, head, dims=dims)

    @property
    def downs(self) -> list[Any]:
        """Return down1..downN, from the image towards the bottom."""
        return [getattr(self, f"down{level}") for level in range(1, self.depth + 1)]

    @property
    def ups(self) -> list[Any]:
        """Return up1..upN, from the bottom towards the image."""
        return [getattr(self, f"up{level}") for level in range(1, self.depth + 1)]

    def forward(self, x: Tensor) -> Tensor:
        return self._by_modules(x)

    def _by_modules(self, x: Tensor, levels: list[Tensor] | None = None) -> Tensor:
        skips = [self.inc(x)]
        for down in self.downs:
            skips.append(down(skips[-1]))
        y = skips.pop()
        for up in self.ups:
            y = up(y, skips.pop())
            if levels is not None:
                levels.append(y)
        return self.outc(y)
