"""The U-Nets that people already have, from the packages they have them from: what the drop-in benchmark times and its
tests compare.

segmentation_models_pytorch, dynamic_network_architectures, timm and torchvision are taken from where they are
installed. `make test` leaves some beside the environment (`tests/dropin/requirements.txt`): their torchvision is of
another torch, and what imports it by the way, as torchmetrics does, is not to find it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .drop_in_nets import PaddedUNet, ResidualUNet, SigmoidUNet


@dataclass(frozen=True)
class DropInModel:
    """A model of somebody else's.

    Attributes:
        name: the package and the class.
        build: the model for a number of channels in its first level, with two classes.
        channels: of its images.
        package: what must be installed, as it is imported.
        any_size: whether it takes images of odd sizes.
        is_unet: whether it is a U-Net, with skips joined at every level.
    """

    name: str
    build: Callable[[int], nn.Module]
    channels: int = 1
    package: str = "torch"
    any_size: bool = False
    is_unet: bool = True

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


def _smp(name: str, **options: Any) -> Callable[[int], nn.Module]:
    def build(width: int) -> nn.Module:
        find_packages()
        import segmentation_models_pytorch as smp

        return getattr(smp, name)("resnet18", encoder_weights=None, classes=2, **options)

    return build


def _smp_decoder(name: str) -> Callable[[int], nn.Module]:
    def build(width: int) -> nn.Module:
        return _smp(name, decoder_channels=[width * 2**level for level in (3, 2, 1, 0)] + [width])(width)

    return build


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


MODELS = (
    DropInModel("U-Net, padded", lambda width: PaddedUNet(1, 2, _levels(width)), any_size=True),
    DropInModel("U-Net, bilinear", lambda width: PaddedUNet(1, 2, _levels(width), bilinear=True), any_size=True),
    DropInModel("U-Net, sigmoid", lambda width: SigmoidUNet(3, 1, _levels(width)), channels=3),
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
    DropInModel("smp Unet", _smp_decoder("Unet"), channels=3, package="segmentation_models_pytorch"),
    DropInModel("smp UnetPlusPlus", _smp_decoder("UnetPlusPlus"), channels=3, package="segmentation_models_pytorch"),
    DropInModel("smp FPN", _smp("FPN"), channels=3, package="segmentation_models_pytorch", is_unet=False),
)
