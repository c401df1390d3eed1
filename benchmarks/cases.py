"""What is measured, as data: the net and its images, its layers as calls of fastunet.ops, their FLOPs and bytes.

Two ways to run a layer are counted. Fused, it is one pass, which reads every input and parameter once and writes every
output once. Eager, every op of the composition is a pass of its own, which reads and writes all its tensors:

    cat (inputs -> joined), conv (joined, weight -> sum), bias or norm (sum -> sum), activation (sum -> y), pool
    (y -> pooled) for a convolution; conv and bias for a transposed convolution and the head.

Nothing is taken to stay in a cache from one pass to the next. Weights are read once a batch. The norm is inference's,
by given statistics, but for instance norm, which first reads its own. An index that pooling leaves for its gradient is
not counted, nor is the padding of images whose sides 2**depth does not divide.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from fastunet.checks import ConfigError
from fastunet.train.config import LARGEST

# What layers and nets are timed in on a GPU.
DTYPE = torch.bfloat16
DIRECTIONS = ("forward", "backward")
TASKS = ("inference", "training")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CONV = "conv3x3_bias_relu"
UP_CONV = "conv_transpose2x2_concat_conv3x3_relu"
CONV_3D = "conv3x3x3_instance_norm_leaky_relu"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Settings:
    """What is measured: UNet(in_channels, out_channels, features=features, norm=norm) in dtype on `batch` images of
    size x size, on the device.

    rounds: samples of each time, at most. seconds: after which a timing takes no further sample. steady_seconds: for
    which a net runs without a break. compiles: with torch.compile; thorough: with what takes minutes to compile, too.
    layers: which of the net's, by name; None: all.
    """

    device: str = "cuda"
    dtype: str = "bfloat16"
    size: int = 512
    batch: int = 16
    features: tuple[int, ...] = (64, 128, 256, 512, 1024)
    in_channels: int = 3
    out_channels: int = 2
    norm: str | None = "batch"
    rounds: int = 50
    seconds: float = 3.0
    steady_seconds: float = 2.0
    warmup: int = 3
    compiles: bool = True
    thorough: bool = False
    layers: tuple[str, ...] | None = None

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def net_layers(self) -> list[Layer]:
        """Return the layers of the model, for its images."""
        channels = self.in_channels, self.out_channels, self.features
        return unet_layers(*channels, self.batch, self.size, self.size)

    def layer(self, name: str) -> Layer:
        return next(layer for layer in self.net_layers() if layer.name == name)


def check_settings(settings: Settings) -> None:
    """ConfigError unless there is a net of those features, its images reach its bottom, and something is timed."""
    if len(settings.features) < 2 or min(settings.features) < 1:
        raise ConfigError(f"features: expected two or more numbers from 1, got {settings.features}")
    least = 2 ** (len(settings.features) - 1)
    if settings.size < least or settings.batch < 1:
        raise ConfigError(f"expected size >= {least} and batch >= 1, got {settings.size} and {settings.batch}")
    if (most := max(settings.size, settings.batch, *settings.features)) > LARGEST:
        raise ConfigError(f"size, batch, features: expected at most {LARGEST}, got {most}")
    if settings.rounds < 1:
        raise ConfigError(f"rounds: expected 1 or more, got {settings.rounds}")


# The commands' options for settings, by their names there.
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "device": {"choices": ("cpu", "cuda")},
    "dtype": {"choices": [*DTYPES]},
    "size": {"type": int, "help": "side of the square images"},
    "batch": {"type": int, "help": "images at once"},
    "features": {"type": int, "nargs": "+", "help": "channels of each level"},
    "rounds": {"type": int, "help": "samples of each time, at most"},
    "seconds": {"type": float, "help": "for each comparison, at most"},
}


def add_settings(parser: argparse.ArgumentParser, usual: Settings | None, *names: str) -> None:
    """Declare options for the settings of these names. Without usual ones, the command sets these when it runs."""
    for name in names:
        parser.add_argument(f"--{name}", default=getattr(usual, name, None), **_OPTIONS[name])
    parser.set_defaults(usual=usual)


def settings_of(options: argparse.Namespace, **more: Any) -> Settings:
    """Return the usual settings with what the options and `more` say. ConfigError where they cannot be."""
    given = {name: value for name in _OPTIONS if (value := getattr(options, name, None)) is not None}
    if "features" in given:
        given["features"] = tuple(given["features"])
    settings = replace(options.usual, **given, **more)
    if settings.device == "cuda" and hasattr(options, "device") and not torch.cuda.is_available():
        raise ConfigError("torch finds no CUDA device here; --device cpu measures on the CPU")
    check_settings(settings)
    return settings


def usual_device() -> str:
    """Return "cuda" where there is such a device, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Layer:
    """One op of a net: its name there ("down1.c2"), the public op, the shapes of its tensors by parameter name, and the
    multiplications and additions of one forward pass over the batch.

    input_has_grad: whether its backward computes the gradient of its input: not for the image. stride: of a
    convolution.
    """

    name: str
    op: str
    shapes: Mapping[str, Shape]
    flops: int
    input_has_grad: bool = True
    stride: int = 1

    @property
    def inputs(self) -> dict[str, Shape]:
        """The shapes of the images that the op reads."""
        return {name: shape for name, shape in self.shapes.items() if name in ("x", "skip", "up", "low")}

    @property
    def parameters(self) -> dict[str, Shape]:
        """The shapes of its weights and biases."""
        return {name: shape for name, shape in self.shapes.items() if name not in self.inputs}

    @property
    def outputs(self) -> dict[str, Shape]:
        """The shapes of what it returns: "y" and, of a pooling op, "pooled"."""
        batch, _, *sides = next(iter(self.inputs.values()))
        if self.op in ("conv_transpose2x2", "conv_transpose2x2x2"):
            return {"y": (batch, self.shapes["weight"][1], *(2 * side for side in sides))}
        channels = self.shapes.get("head_weight", self.shapes["weight"])[0]
        shapes: dict[str, Shape] = {"y": (batch, channels, *(-(-side // self.stride) for side in sides))}
        if self.op.endswith("_pool"):
            shapes["pooled"] = (batch, channels, *(side // 2 for side in sides))
        return shapes

    @property
    def backward_flops(self) -> int:
        """Of the gradients of weight and, where wanted, input: as many as forward each."""
        return self.flops * (2 if self.input_has_grad else 1)


def unet_layers(
    in_channels: int, out_channels: int, features: Sequence[int], batch: int, height: int, width: int
) -> list[Layer]:
    """List the layers of a UNet with transposed convolutions, in the order they run, for images [batch, in_channels,
    height, width].

    A norm is taken as folded into the weight and bias before it, as for inference: what is left of a layer is
    conv3x3_bias_relu. Pooling belongs to the convolution before it, concatenation to the one after it.
    """
    return _layers(CONV, (in_channels, out_channels), features, batch, (height, width))


def nnunet_layers(in_channels: int, out_channels: int, features: Sequence[int], batch: int, size: int) -> list[Layer]:
    """List the layers of nnU-Net's 3d_fullres net, its PlainConvUNet, in the order they run, for cubes of size voxels a
    side.

    Twice convolution, instance norm and leaky ReLU in each stage, up and down; the first of a lower stage has stride 2.
    """
    return _layers(CONV_3D, (in_channels, out_channels), features, batch, (size,) * 3)


def _layers(
    conv: str, channels: tuple[int, int], features: Sequence[int], batch: int, sides: tuple[int, ...]
) -> list[Layer]:
    """List the layers of a net of such convolutions; each level down begins by pooling or, of volumes, a stride."""
    layers: list[Layer] = []
    pools = len(sides) == 2

    def add(name: str, op: str, level: int, c_in: int, c_out: int, *, skip: int = 0, stride: int = 1) -> None:
        size = tuple(side >> level for side in sides)
        shapes: dict[str, Shape] = {"x": (batch, c_in, *size)}
        if skip:
            shapes = {"skip": (batch, skip, *size), "up": (batch, c_in - skip, *size)}
        is_transposed, kernel = op.startswith("conv_transpose"), int(op.partition("x")[0][-1])
        of_channels = (c_in, c_out) if is_transposed else (c_out, c_in)
        shapes |= {"weight": (*of_channels, *(kernel,) * len(sides)), "bias": (c_out,)}
        if "norm" in op:
            shapes |= {"gamma": (c_out,), "beta": (c_out,)}
        # Each weight is multiplied, and its product added, once at every pixel of the output; of a transposed
        # convolution of the input.
        flops = 2 * batch * math.prod(-(-side // stride) for side in size) * math.prod(shapes["weight"])
        layers.append(Layer(name, op, shapes, flops, input_has_grad=bool(layers), stride=stride))

    *skips, bottom = features
    up, head = ("x".join(each * len(sides)) for each in "21")
    for level, (c_in, c) in enumerate(zip((channels[0], *skips), features, strict=True)):
        name, by_stride = f"down{level}" if level or not pools else "inc", level > 0 and not pools
        add(f"{name}.c1", conv, level - by_stride, c_in, c, stride=1 + by_stride)
        add(f"{name}.c2", f"{conv}_pool" if pools and level < len(skips) else conv, level, c, c)
    for i, (low, c) in enumerate(zip((bottom, *reversed(skips)), reversed(skips), strict=False), 1):
        level = len(skips) - i
        add(f"up{i}.up", f"conv_transpose{up}", level + 1, low, c)
        add(f"up{i}.c1", f"concat_{conv}", level, 2 * c, c, skip=c)
        add(f"up{i}.c2", conv, level, c, c)
    add("outc", f"conv{head}", 0, features[0], channels[1])
    return layers


def joined_layers(layers: Sequence[Layer]) -> list[Layer]:
    """The layers as the kernels run them in inference on sm_90 and above: each upsampling composed with the convolution
    after it, and the head in the last convolution's epilogue.

    A composed layer is a 3x3 convolution of the skip and a transposed one of 4x4 taps, of which a pixel meets four.
    """
    *body, last, head = layers
    found = body[:1]
    for up, layer in itertools.pairwise(body):
        if layer.op.startswith("concat"):
            x, out, (batch, skip, height, width) = up.shapes["x"], layer.shapes["bias"][0], layer.shapes["skip"]
            shapes = {"skip": layer.shapes["skip"], "low": x, "weight": (out, skip, 3, 3)}
            shapes |= {"low_weight": (x[1], out, 4, 4), "bias": (out,)}
            found.append(Layer(layer.name, UP_CONV, shapes, 2 * batch * height * width * out * (9 * skip + 4 * x[1])))
        elif layer.op != "conv_transpose2x2":
            found.append(layer)
    with_head = dict(last.shapes) | {f"head_{name}": shape for name, shape in head.parameters.items()}
    joined = Layer(f"{last.name}+{head.name}", "conv3x3_relu_conv1x1", with_head, last.flops + head.flops)
    return [*found, joined]


# --- work ---


class Pass(NamedTuple):
    """Work over the batch: the layer's multiplications and additions, of which biases, norms, activations and pools
    count none, and bytes read and written.
    """

    flops: int
    bytes: int


def fused_pass(layer: Layer, itemsize: int) -> Pass:
    """The layer with each byte of its tensors, of itemsize bytes an element, moved once: no implementation moves less.

    (It holds for instance norm too, but what computes each sum once reaches it only if the layer after it normalises
    what it loads: the sums must all be there before the first is normalised.)
    """
    return Pass(layer.flops, _bytes((*layer.shapes.values(), *layer.outputs.values()), itemsize))


def statistics_passes(layer: Layer, itemsize: int) -> list[Pass]:
    """The layer as a pass whose epilogue has the statistics of its result and, where it has an instance norm, one that
    normalises and activates. Partial sums are not counted.
    """
    normalise = Pass(0, 2 * _bytes([layer.outputs["y"]], itemsize))
    return [fused_pass(layer, itemsize), *([normalise] if "instance_norm" in layer.op else [])]


def eager_passes(layer: Layer, itemsize: int) -> list[Pass]:
    """The layer's ops, each a pass of its own, the convolution first."""
    inputs, y = _bytes(layer.inputs.values(), itemsize), _bytes([layer.outputs["y"]], itemsize)
    moved = [2 * inputs] if "up" in layer.inputs else []  # the concatenation
    moved.append((3 if "instance_norm" in layer.op else 2) * y)  # bias or norm
    moved += [2 * y] if "conv3x3" in layer.op else []  # activation
    moved += [y + _bytes([layer.outputs["pooled"]], itemsize)] if "pooled" in layer.outputs else []
    conv = Pass(layer.flops, inputs + _bytes(layer.parameters.values(), itemsize) + y)
    return [conv, *(Pass(0, each) for each in moved)]


def _bytes(shapes: Iterable[Shape], itemsize: int) -> int:
    return itemsize * sum(math.prod(shape) for shape in shapes)
