"""The layers of a U-Net as calls of fastunet.ops: shapes, work, tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastunet import UNet

# The op of a layer that doubles an image by interpolation: PyTorch's, under any backend.
UPSAMPLE = "upsample_bilinear2x"


@dataclass(frozen=True)
class Layer:
    """One op of a net: its name there ("down1.c2"), the public op, the shapes of its tensors by parameter name, and the
    multiplications and additions of one forward pass over the batch.

    input_has_grad: whether its backward computes the gradient of its input: not for the image.
    """

    name: str
    op: str
    shapes: Mapping[str, tuple[int, ...]]
    flops: int
    input_has_grad: bool = True

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the images that the op reads."""
        return {name: shape for name, shape in self.shapes.items() if name in ("x", "skip", "up")}

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its weight and bias."""
        return {name: shape for name, shape in self.shapes.items() if name not in self.inputs}

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what it returns: "y" and, of a pooling op, "pooled"."""
        batch, channels, height, width = next(iter(self.inputs.values()))
        if self.op in ("conv_transpose2x2", UPSAMPLE):
            channels = channels if self.op == UPSAMPLE else self.shapes["weight"][1]
            return {"y": (batch, channels, 2 * height, 2 * width)}
        channels = self.shapes["weight"][0]
        shapes: dict[str, tuple[int, ...]] = {"y": (batch, channels, height, width)}
        if self.op.endswith("_pool"):
            shapes["pooled"] = (batch, channels, height // 2, width // 2)
        return shapes

    @property
    def backward_flops(self) -> int:
        """Of the gradients of weight and, where wanted, input: as many as forward each."""
        return self.flops * (2 if self.input_has_grad else 1)


def unet_layers(model: UNet, batch: int, height: int, width: int) -> list[Layer]:
    """The layers of a model, in the order they run, for images [batch, C, height, width].

    A norm is taken as folded into the weight and bias before it, as for inference: what is left of a layer is
    conv3x3_bias_relu. Pooling belongs to the convolution before it, concatenation to the one after it. Bilinear
    up-sampling is a layer too, UPSAMPLE, though it is no op of fastunet.ops.
    """
    layers: list[Layer] = []
    sizes = [(height >> level, width >> level) for level in range(model.depth + 1)]
    blocks = [("inc", model.inc), *((f"down{i}", down.maxpool_conv[1]) for i, down in enumerate(model.downs, 1))]
    for (name, block), size in zip(blocks, sizes, strict=True):
        first, second = _convolutions(block)
        is_bottom = size is sizes[-1]
        layers.append(_convolution(f"{name}.c1", "conv3x3_bias_relu", first, batch, size, image=name == "inc"))
        layers.append(
            _convolution(
                f"{name}.c2", "conv3x3_bias_relu" if is_bottom else "conv3x3_bias_relu_pool", second, batch, size
            )
        )
    for i, (up, low, size) in enumerate(zip(model.ups, sizes[:0:-1], sizes[-2::-1], strict=True), 1):
        first, second = _convolutions(up.conv)
        skip = _convolutions(blocks[-1 - i][1])[-1].out_channels
        if isinstance(up.up, nn.ConvTranspose2d):
            layers.append(_upsampling(f"up{i}.up", up.up, batch, low))
        else:
            layers.append(_interpolation(f"up{i}.up", first.in_channels - skip, batch, low))
        layers.append(_convolution(f"up{i}.c1", "concat_conv3x3_bias_relu", first, batch, size, skip=skip))
        layers.append(_convolution(f"up{i}.c2", "conv3x3_bias_relu", second, batch, size))
    layers.append(_head("outc", model.outc.conv, batch, sizes[0]))
    return layers


def _convolutions(block: nn.Module) -> list[nn.Conv2d]:
    return [module for module in block.modules() if isinstance(module, nn.Conv2d)]


def _convolution(
    name: str, op: str, conv: nn.Conv2d, batch: int, size: tuple[int, int], *, skip: int = 0, image: bool = False
) -> Layer:
    shapes = {"x": (batch, conv.in_channels, *size)}
    if skip:
        shapes = {"skip": (batch, skip, *size), "up": (batch, conv.in_channels - skip, *size)}
    return Layer(name, op, shapes | _parameters(conv), _flops(conv, batch, size), input_has_grad=not image)


def _upsampling(name: str, conv: nn.ConvTranspose2d, batch: int, size: tuple[int, int]) -> Layer:
    shapes = {"x": (batch, conv.in_channels, *size), **_parameters(conv)}
    return Layer(name, "conv_transpose2x2", shapes, _flops(conv, batch, size))


def _interpolation(name: str, channels: int, batch: int, size: tuple[int, int]) -> Layer:
    """Each value is the weighted mean of four: as many products, and three sums."""
    shape = (batch, channels, *size)
    return Layer(name, UPSAMPLE, {"x": shape}, 7 * 4 * math.prod(shape))


def _head(name: str, conv: nn.Conv2d, batch: int, size: tuple[int, int]) -> Layer:
    return Layer(
        name, "conv1x1", {"x": (batch, conv.in_channels, *size), **_parameters(conv)}, _flops(conv, batch, size)
    )


def _parameters(conv: nn.Conv2d | nn.ConvTranspose2d) -> dict[str, tuple[int, ...]]:
    return {"weight": tuple(conv.weight.shape), "bias": (conv.out_channels,)}


def _flops(conv: nn.Conv2d | nn.ConvTranspose2d, batch: int, size: tuple[int, int]) -> int:
    """Each weight is multiplied, and its product added, once at every pixel of the input."""
    return 2 * batch * math.prod(size) * conv.weight.numel()


def meta_unet(in_channels: int, out_channels: int, features: tuple[int, ...], **options: Any) -> UNet:
    """A model without memory, for its shapes. options: UNet's."""
    with torch.device("meta"):
        return UNet(in_channels, out_channels, features=features, **options)
