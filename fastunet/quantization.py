"""Inference in 8 bits: the U-Net's 3x3 convolutions on e4m3 values.

Weights are scaled by output channel, the images that a convolution reads by one number, the largest magnitude that
calibration has seen, so that each fills e4m3's range (Micikevicius et al. 2022, arXiv:2209.05433). Products are summed
in float32. Norm, activation and pooling follow in float32, as without quantisation; transposed convolutions, the head
and convolutions whose channels are no multiples of 32, such as the first, stay as they are.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import dispatch, modules
from .checks import ConfigError, DataError
from .unet import UNet

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max


@torch.no_grad()
def quantize(model: UNet, images: Tensor | Iterable[Tensor]) -> UNet:
    """A copy of the model, for inference, whose 3x3 convolutions compute in e4m3. The model itself stays as it is.

    images: batches [N, C, H, W] as the model gets them, on its device: some typical ones, for the ranges of what its
    convolutions read. Larger values than theirs are held to the range later. A batch norm is taken by its running
    statistics; instance norm has none to take and raises.

    On an NVIDIA GPU from sm_90 on, images in 16 bits (under autocast, or of a model in 16 bits) run on 8-bit tensor
    cores. Everywhere else the same values are multiplied in float32: slower than the model, but of its accuracy in 8
    bits it tells the truth.

    Raises:
        ConfigError: a model with instance norm, with changed blocks, or quantised before.
        DataError: no images, or calibration that met no finite value.
    """
    if model.config["norm"] == "instance":
        raise ConfigError("quantize: expected a model with batch norm or none, got instance norm")
    observed = copy.deepcopy(model).eval()
    for name, block in _blocks(observed):
        if type(block) is not modules.DoubleConv:
            raise ConfigError(f"quantize: {name}: expected fastunet's DoubleConv, got {type(block).__name__}")
        _put(observed, name, SplitDoubleConv(*(_Observed(*parts) for parts in _halves(block))))
    count = 0
    for batch in [images] if isinstance(images, Tensor) else images:
        observed(batch)
        count += len(batch)
    if not count:
        raise DataError("quantize: expected some images for calibration, got none")
    for name, block in _blocks(observed):
        _put(observed, name, SplitDoubleConv(*(_quantised(name, half) for half in (block.first, block.second))))
    return observed.eval()


def _blocks(model: UNet) -> list[tuple[str, Any]]:
    """The double convolutions by their paths."""
    downs = [(f"down{i}.maxpool_conv.1", down.maxpool_conv[1]) for i, down in enumerate(model.downs, 1)]
    return [("inc", model.inc), *downs, *((f"up{i}.conv", up.conv) for i, up in enumerate(model.ups, 1))]


def _put(model: nn.Module, path: str, block: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = block


def _halves(block: Any) -> list[tuple[nn.Module, nn.Module, nn.Module]]:
    steps = list(block.double_conv)
    return [(steps[0], steps[1], steps[2]), (steps[3], steps[4], steps[5])]


ON_TENSOR_CORES = dispatch.Choice("triton", "in 8 bits on tensor cores")
EMULATED = dispatch.Choice(
    "aten", "emulated in float32, slowly: tensor cores want sm_90, images in 16 bits, and Triton"
)


class SplitDoubleConv(nn.Module):
    """A DoubleConv of two modules, each of which takes (x, up, pool=...)."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, up: Tensor | None = None, *, pool: bool = False, head: Any = None) -> Any:
        y = self.second(self.first(x, up), None, pool=pool)
        return y if head is None else head(y)


class Conv3x3(nn.Module):
    """A convolution with what follows it, as in the float model."""

    def __init__(self, conv: nn.Module, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act

    def forward(self, x: Tensor, up: Tensor | None = None, *, pool: bool = False) -> Any:
        return modules.conv_norm_activation(self.conv, self.norm, self.act, x, up, pool=pool)


class _Observed(Conv3x3):
    """It remembers the largest magnitude it has read, and by how many channels each input has."""

    largest = 0.0
    channels: tuple[int, ...] = ()

    def forward(self, x: Tensor, up: Tensor | None = None, *, pool: bool = False) -> Any:
        inputs = [x] if up is None else [x, up]
        self.channels = tuple(t.shape[1] for t in inputs)
        for t in inputs:
            largest = float(t.abs().max())
            if not math.isfinite(largest):  # `max` would pass over NaN.
                raise DataError(f"quantize: expected finite values in calibration, got {largest} within the net")
            self.largest = max(self.largest, largest)
        return super().forward(x, up, pool=pool)


def _quantised(name: str, half: Any) -> nn.Module:
    """The quantised convolution of an observed one, or a plain one where its channels do not suit."""
    largest = half.largest
    if largest == 0:
        raise DataError(f"quantize: {name}: expected values other than 0 in calibration, got none")
    if any(channels % 32 for channels in half.channels):
        return Conv3x3(half.conv, half.norm, half.act)
    return QuantizedConv3x3(half.conv, half.norm, half.act, largest)


class QuantizedConv3x3(nn.Module):
    """activation(norm(conv2d(x, weight, padding=1))) of images [N, C, H, W] and weights in e4m3, for inference.

    Buffers: weight e4m3 [Cout, C, 3, 3]; scale, that of the images; mean, variance, gamma, bias, float32 [Cout]: batch
    norm's, as it is to be taken of the sums of e4m3 values, so that they hold the scales.
    """

    weight: Tensor
    scale: Tensor
    mean: Tensor
    variance: Tensor
    gamma: Tensor
    bias: Tensor
    eps: float

    def __init__(self, conv: Any, norm: Any, act: Any, largest: float) -> None:
        super().__init__()
        weight = conv.weight.detach().float()
        largest_weights = weight.abs().amax((1, 2, 3))
        weight_scale = torch.where(largest_weights > 0, largest_weights, LARGEST) / LARGEST
        scale = largest / LARGEST
        quantised = (weight / weight_scale[:, None, None, None]).clamp(-LARGEST, LARGEST).to(E4M3)
        mean, variance, gamma, bias, self.eps = _affine(conv, norm)
        self.negative_slope = modules._slope(act)
        # (scales * sum - mean) * gamma = (sum - mean / scales) * (gamma * scales)
        scales = scale * weight_scale
        self.register_buffer("weight", quantised.contiguous(memory_format=torch.channels_last))
        self.register_buffer("scale", torch.tensor([scale], dtype=torch.float32, device=weight.device))
        for key, value in (("mean", mean / scales), ("variance", variance), ("gamma", gamma * scales), ("bias", bias)):
            self.register_buffer(key, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move to another device, but to no other dtype: the buffers have the one they need."""
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)

    @torch.no_grad()
    def forward(self, x: Tensor, up: Tensor | None = None, *, pool: bool = False) -> Any:
        if self.training:
            raise ConfigError("a quantised model is for inference: expected eval mode, got train mode")
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, up = x.to(dtype), None if up is None else up.to(dtype)
        choice = self.choose(x, up)
        on_tensor_cores = choice.implementation == "triton"
        if x.is_cuda and not on_tensor_cores:
            warnings.warn(f"8 bits are {choice.reason}", RuntimeWarning, stacklevel=2)
        y, pooled = (self._on_tensor_cores if on_tensor_cores else self._emulated)(x, up, pool)
        return (y, pooled) if pool else y

    def choose(self, x: Tensor, up: Tensor | None) -> dispatch.Choice:
        """What runs this layer on inputs like these, and why."""
        return EMULATED if self._obstacle(x, up) else ON_TENSOR_CORES

    def _obstacle(self, x: Tensor, up: Tensor | None) -> bool:
        is_absent = x.device.type == "cuda" and not torch.cuda.is_available()
        if is_absent or x.dtype.itemsize != 2 or x.numel() == 0 or dispatch.selected_backend() == "aten":
            return True
        if dispatch.triton_obstacle(x.device, x.dtype) is not None:
            return True
        from fastunet.kernels import config, gpu

        inputs = (x.shape[1], 0 if up is None else up.shape[1])
        return not config.fits_fp8(gpu.target(x.device), inputs, self.weight.shape[0])

    def _on_tensor_cores(self, x: Tensor, up: Tensor | None, pool: bool) -> tuple[Tensor, Tensor | None]:
        from fastunet.kernels.conv3x3_fp8 import conv3x3_fp8
        from fastunet.kernels.epilogue import Normalisation

        norm = Normalisation(self.mean, self.variance, self.gamma, self.eps)
        return conv3x3_fp8(x, up, self.weight, self.scale, self.bias, norm, self.negative_slope, pool=pool)

    def _emulated(self, x: Tensor, up: Tensor | None, pool: bool) -> tuple[Tensor, Tensor | None]:
        joined = x if up is None else torch.cat([x, up], dim=1)
        values = (joined.float() / self.scale).clamp(-LARGEST, LARGEST).to(E4M3).float()
        with torch.autocast(x.device.type, enabled=False):
            sums = F.conv2d(values, self.weight.float(), padding=1)
        scale = self.gamma * (self.variance + self.eps).rsqrt()
        y = (sums - self.mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        y = F.leaky_relu(y, self.negative_slope).to(x.dtype)
        return y, F.max_pool2d(y, 2) if pool else None


def _affine(conv: Any, norm: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """mean, variance, gamma, bias, float32 [Cout], and eps of what follows the sums: a norm, or a bias alone."""
    like = conv.weight.new_ones(conv.weight.shape[0], dtype=torch.float32)
    if isinstance(norm, nn.Identity):
        bias = like * 0 if conv.bias is None else conv.bias.detach().float()
        return like * 0, like, like.clone(), bias.clone(), 0.0
    if type(norm) is not nn.BatchNorm2d or norm.running_mean is None:
        raise ConfigError(f"quantize: expected batch norm with running statistics, or none, got {norm}")
    given = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, variance, gamma, bias = (None if t is None else t.detach().float().clone() for t in given)
    assert mean is not None
    assert variance is not None
    return mean, variance, like if gamma is None else gamma, like * 0 if bias is None else bias, norm.eps
