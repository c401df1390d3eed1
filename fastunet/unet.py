"""`fastunet.UNet`: the U-Net on fused ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastunet import modules
from fastunet.checks import ShapeError, check_activation
from fastunet.reference import ReferenceUNet


class UNet(ReferenceUNet):
    """The U-Net of Ronneberger et al. 2015 (arXiv:1505.04597), every layer a fused op.

    [N, in_channels, H, W] to [N, out_channels, H, W]: logits, or probabilities where `head` is given. Any H and W from
    2**depth, odd ones included, depth = len(features) - 1. With the defaults, state_dict keys and shapes are those of
    milesial/Pytorch-UNet's UNet(in_channels, out_channels). Weights and activations are channels_last inside.

    Arguments:
        features: channels of each level, from the image to the bottom.
        norm: "batch", "instance" (affine), or None, where the convolutions have a bias instead.
        upsample: "transpose" (2x2 transposed convolution) or "bilinear" (align_corners=True, and half as many channels
            at each level's end).
        activation: "relu", or "leaky_relu" with slope 0.01.
        head: None, "sigmoid", or "softmax" over the channels.

    Raises ValueError on unknown options, ShapeError on an image too small or with other channels.
    """

    double_conv_type, down_type, up_type, out_type = modules.DoubleConv, modules.Down, modules.Up, modules.OutConv

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
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            features=features,
            norm=norm,
            upsample=upsample,
            activation=activation,
            head=head,
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        x = x.contiguous(memory_format=torch.channels_last)
        skip, x = modules.with_pool(self.inc, x)
        skips = [skip]
        *downs, bottom = self.downs
        for down in downs:
            skip, x = modules.with_pool(down, x)
            skips.append(skip)
        x = bottom(x)
        *ups, last = self.ups
        for up in ups:
            x = up(x, skips.pop())
        return last(x, skips.pop(), head=self.outc)

    def _check_input(self, x: Tensor) -> None:
        check_activation("UNet", input=x)
        channels, least = self.config["in_channels"], 2**self.depth
        if x.shape[1] != channels:
            raise ShapeError(f"UNet: expected {channels} input channels, got {x.shape[1]} in {list(x.shape)}")
        height, width = x.shape[2:]
        if height < least or width < least:
            raise ShapeError(f"UNet: expected height and width >= {least} (2**depth), got {height}x{width}")
        if self.config["norm"] == "instance" and height < 2 * least and width < 2 * least:
            raise ShapeError(
                f"UNet: instance norm needs more than one pixel at the bottom: "
                f"expected height or width >= {2 * least} (2**(depth + 1)), got {height}x{width}"
            )

    def to_reference(self) -> ReferenceUNet:
        """The plain PyTorch twin with a copy of the weights, on the same device, dtype and mode."""
        parameter = next(self.parameters())
        twin = ReferenceUNet(**self.config).to(device=parameter.device, dtype=parameter.dtype)
        twin.load_state_dict(self.state_dict())
        return twin.train(self.training)
