"""What is measured, as data: the net and its images, its layers as calls of fastunet.ops, their FLOPs and bytes.

Two ways to run a layer are counted. Fused, it is one pass, which reads every input and parameter once and writes every
output once. Eager, every op of the composition is a pass of its own, which reads and writes all its tensors:

    cat (inputs -> joined), conv (joined, weight -> sum), bias or norm (sum -> sum), activation (sum -> y), pool
    (y -> pooled) for a convolution; conv and bias for a transposed convolution and the head.

Nothing is taken to stay in a cache from one pass to the next. Weights are read once a batch. The norm is inference's,
by given statistics; instance norm takes its own, for which eager reads the sum once more. An index that pooling leaves
for its gradient is not counted, nor is the padding of images whose sides 2**depth does not divide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastunet import UNet

# The op of a layer that doubles an image by interpolation: PyTorch's, under any backend.
UPSAMPLE = "upsample_bilinear2x"
# What layers and nets are timed in on a GPU.
DTYPE = torch.bfloat16
DIRECTIONS = ("forward", "backward")
TASKS = ("inference", "training")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """What is measured: UNet(in_channels, out_channels, features=features, norm=norm, upsample=upsample) in dtype on
    `batch` images of size x size, on the device.

    rounds: samples of each time, at most. seconds: after which a timing takes no further sample. steady_seconds: for
    which a net runs without a break. compiles: with torch.compile; thorough: with what takes minutes to compile, too.
    layers: which of the net's, by name; None: all. table: the file of measured configurations that margins are measured
    with, None for the one of the GPU.
    """

    device: str = "cuda"
    dtype: str = "bfloat16"
    size: int = 512
    batch: int = 16
    features: tuple[int, ...] = (64, 128, 256, 512, 1024)
    in_channels: int = 3
    out_channels: int = 2
    norm: str | None = "batch"
    upsample: str = "transpose"
    rounds: int = 50
    seconds: float = 3.0
    steady_seconds: float = 2.0
    warmup: int = 3
    compiles: bool = True
    thorough: bool = False
    layers: tuple[str, ...] | None = None
    table: str | None = None

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def net_layers(self) -> list[Layer]:
        """Return the layers of the model, for its images."""
        options: dict[str, Any] = {"norm": self.norm, "upsample": self.upsample}
        model = meta_unet(self.in_channels, self.out_channels, self.features, **options)
        return unet_layers(model, self.batch, self.size, self.size)


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


# --- work ---


@dataclass(frozen=True)
class Pass:
    """Work over the batch: the layer's multiplications and additions, of which biases, norms, activations and pools
    count none, and bytes read and written.
    """

    name: str
    flops: int
    bytes: int


def fused_pass(layer: Layer, itemsize: int) -> Pass:
    """The layer with each byte of its tensors, of itemsize bytes an element, moved once: no implementation moves less.

    (It holds for instance norm too, but nothing that computes each sum once can reach it: the sums must all be there
    before the first is normalised.)
    """
    tensors = (*layer.inputs.values(), *layer.parameters.values(), *layer.outputs.values())
    return Pass(layer.op, layer.flops, _bytes(tensors, itemsize))


def eager_passes(layer: Layer, itemsize: int, *, instance_norm: bool = False) -> list[Pass]:
    """The layer's ops, each a pass of its own, in the order they run."""
    inputs, y = _bytes(layer.inputs.values(), itemsize), _bytes([layer.outputs["y"]], itemsize)
    if layer.op == UPSAMPLE:
        return [fused_pass(layer, itemsize)]
    passes = []
    if "up" in layer.inputs:
        passes.append(Pass("cat", 0, 2 * inputs))
    passes.append(Pass("conv", layer.flops, inputs + _bytes(layer.parameters.values(), itemsize) + y))
    is_conv3x3 = "conv3x3" in layer.op
    if is_conv3x3 and instance_norm:
        passes.append(Pass("statistics", 0, y))
    passes.append(Pass("bias or norm", 0, 2 * y))
    if is_conv3x3:
        passes.append(Pass("activation", 0, 2 * y))
    if "pooled" in layer.outputs:
        passes.append(Pass("pool", 0, y + _bytes([layer.outputs["pooled"]], itemsize)))
    return passes


def _bytes(shapes: Iterable[tuple[int, ...]], itemsize: int) -> int:
    return itemsize * sum(math.prod(shape) for shape in shapes)
