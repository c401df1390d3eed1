"""The U-Nets that people already have, from the packages they have them from: what the drop-in benchmark times and its
tests compare.

segmentation_models_pytorch, dynamic_network_architectures, timm and torchvision are taken from where they are
installed. `make test` leaves some beside the environment (`tests/compiler/requirements.txt`): their torchvision is of
another torch, and what imports it by the way, as torchmetrics does, is not to find it.

Others are written here, in plain torch.nn, with habits that `torch.compile(model, backend="fastunet")` meets:
padding to the skip's size, [skip, up] order and activations in place; [up, skip] order and a sigmoid at the end;
residual blocks of group norm and SiLU.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DropInModel:
    """A model of somebody else's.

    Attributes:
        name: the package and the class.
        build: the model for a number of channels in its first level, with two classes.
        channels: of its images.
        package: what must be installed, as it is imported.
        any_size: whether it takes images of odd sizes.
    """

    name: str
    build: Callable[[int], nn.Module]
    channels: int = 1
    package: str = "torch"
    any_size: bool = False

    def is_installed(self) -> bool:
        """Whether it can be built here."""
        find_packages()
        return importlib.util.find_spec(self.package) is not None


@cache
def find_packages() -> Any:
    """Let packages be imported from beside the environment, and torchvision's build for another torch with them: two
    ops that it asks for get their names. Does nothing where torchvision is installed.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return None
    sys.path.append(str(Path(sys.prefix) / "dropin"))
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _smp(name: str, *, has_widths: bool = True) -> DropInModel:
    def build(width: int) -> nn.Module:
        find_packages()
        import segmentation_models_pytorch as smp

        widths = {"decoder_channels": [*reversed(_levels(width)), width]} if has_widths else {}
        return getattr(smp, name)("resnet18", encoder_weights=None, classes=2, **widths)

    return DropInModel(f"smp {name}", build, channels=3, package="segmentation_models_pytorch")


def _monai(name: str, make: Callable[[Any, int], nn.Module]) -> DropInModel:
    def build(width: int) -> nn.Module:
        from monai.networks import nets

        return make(getattr(nets, name), width)

    return DropInModel(f"MONAI {name}", build, package="monai", any_size=name == "BasicUNet")


def _nnunet(name: str, **options: Any) -> DropInModel:
    def build(width: int) -> nn.Module:
        find_packages()
        from dynamic_network_architectures.architectures import unet

        return getattr(unet, name)(
            input_channels=1,
            n_stages=4,
            features_per_stage=_levels(width),
            conv_op=nn.Conv2d,
            kernel_sizes=3,
            strides=(1, 2, 2, 2),
            num_classes=2,
            n_conv_per_stage_decoder=(1, 1, 1),
            conv_bias=True,
            norm_op=nn.InstanceNorm2d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            deep_supervision=True,
            **options,
        )

    return DropInModel(f"nnU-Net {name}", build, package="dynamic_network_architectures")


def _levels(width: int) -> list[int]:
    return [width * 2**level for level in range(4)]


# --- U-Nets as people write them by hand ---


class Twice(nn.Sequential):
    """Two times convolution, batch norm and ReLU in place."""

    def __init__(self, channels: int, out: int) -> None:
        layers: list[nn.Module] = []
        for given in (channels, out):
            layers += [nn.Conv2d(given, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class PlainUNet(nn.Module):
    """Any size: what is upsampled, transposed or bilinear, is padded to the skip's size. as_probabilities: sizes
    divisible by 2**depth alone; [up, skip] order; a sigmoid at the end.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        widths: Sequence[int],
        *,
        bilinear: bool = False,
        as_probabilities: bool = False,
    ) -> None:
        super().__init__()
        self.as_probabilities, pairs = as_probabilities, list(itertools.pairwise(widths))
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
            if self.as_probabilities:
                x = block(torch.cat([x, skip], dim=1))
            else:
                dy, dx = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
                x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
                x = block(torch.cat([skip, x], dim=1))
        return torch.sigmoid(self.last(x)) if self.as_probabilities else self.last(x)


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


MODELS = (
    DropInModel("U-Net, padded", lambda width: PlainUNet(1, 2, _levels(width)), any_size=True),
    DropInModel("U-Net, bilinear", lambda width: PlainUNet(1, 2, _levels(width), bilinear=True), any_size=True),
    DropInModel("U-Net, sigmoid", lambda width: PlainUNet(3, 1, _levels(width), as_probabilities=True), channels=3),
    DropInModel("U-Net, residual", lambda width: ResidualUNet(3, 2, _levels(width)), channels=3),
    _monai("BasicUNet", lambda net, w: net(2, 1, 2, features=(w, w, 2 * w, 4 * w, 8 * w, w))),
    _monai("UNet", lambda net, w: net(2, 1, 2, channels=_levels(w), strides=(2, 2, 2), num_res_units=2)),
    _monai(
        "DynUNet",
        lambda net, w: net(2, 1, 2, [3] * 4, [1, 2, 2, 2], [2, 2, 2], filters=_levels(w)),
    ),
    _monai("AttentionUnet", lambda net, w: net(2, 1, 2, channels=_levels(w), strides=(2, 2, 2))),
    _nnunet("PlainConvUNet", n_conv_per_stage=(2, 2, 2, 2)),
    _nnunet("ResidualEncoderUNet", n_blocks_per_stage=(1, 2, 2, 2)),
    _smp("Unet"),
    _smp("UnetPlusPlus"),
    _smp("FPN", has_widths=False),
)
