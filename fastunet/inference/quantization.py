"""Inference in 8 bits: the U-Net's 3x3 convolutions on e4m3 values.

Weights are scaled by output channel, the images that a convolution reads by one number, the largest magnitude that
calibration has seen, so that each fills e4m3's range (Micikevicius et al. 2022, arXiv:2209.05433). Products are summed
in float32; on sm_90, up to 128 of them first in the 14 bits that its tensor cores keep. Norm, activation and pooling
follow in float32, as without quantisation. Transposed convolutions, the head and convolutions whose channels are no
multiples of 32, such as the first, compute as they did. What is for quantised convolutions alone is written in e4m3 at
once, by whatever computes it.
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

from fastunet import dispatch, measuring, modules, ops
from fastunet.checks import ConfigError, DataError
from fastunet.cpu.model_state import autocast_dtype
from fastunet.ops.registration import check_untransformed
from fastunet.torch_private import untraced
from fastunet.unet import UNet, check_is_of_images

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
ON_TENSOR_CORES = dispatch.Choice("triton", "in 8 bits on tensor cores")
EMULATED = dispatch.Choice(
    "aten", "emulated in float32, slowly: tensor cores want sm_90, images in 16 bits, and Triton"
)


@torch.no_grad()
def quantize(model: UNet, images: Tensor | Iterable[Tensor]) -> UNet:
    """Return a copy of the model, for inference, whose 3x3 convolutions compute in e4m3. The model itself stays as it
    is.

    images: batches [N, C, H, W] as the model gets them, on its device: some typical ones, for the ranges of what its
    convolutions read. Larger values than theirs are held to the range later. A batch norm is taken by its running
    statistics; instance norm has none to take and raises.

    On an NVIDIA GPU from sm_90 on, images in 16 bits (under autocast, or of a model in 16 bits) run on 8-bit tensor
    cores. Everywhere else the same values are multiplied and summed in float32: slower than the model, but of its
    accuracy in 8 bits it tells the truth, but for what sm_90's sums of 14 bits cost. torch.compile leaves its layers as
    they are.

    Raises:
        ConfigError: a model of volumes, with instance norm, with hooks or exchanged parts, or quantised before.
        DataError: no images, or calibration that met no finite value.
    """
    _check(model)
    observed = copy.deepcopy(model).eval()
    observed.__class__ = QuantizedUNet
    for name, block in _blocks(observed):
        observed.set_submodule(name, SplitDoubleConv(*(_Observed(*parts) for parts in _halves(block))))
    count = 0
    for batch in [images] if isinstance(images, Tensor) else images:
        observed(batch)
        count += len(batch)
    if not count:
        raise DataError("quantize: expected some images for calibration, got none")
    for name, block in _blocks(observed):
        observed.set_submodule(name, SplitDoubleConv(*(_quantised(name, half) for half in (block.first, block.second))))
    _chain(observed)
    return observed.eval()


def _check(model: UNet) -> None:
    """Raise ConfigError unless the blocks are fastunet's as they were built, with norms that can be quantised."""
    check_is_of_images("quantize", model)
    if type(model).forward is not UNet.forward:
        raise ConfigError(f"quantize: expected UNet's forward, got {type(model).__name__}'s own")
    kinds = {"inc": modules.DoubleConv, "down": modules.Down, "up": modules.Up, "outc": modules.OutConv}
    for name, part in model.named_children():
        kind: Any = kinds.get(name.rstrip("0123456789"))
        if kind is not None and not modules.is_plain_block(part, kind):
            expected = f"fastunet's {kind.__name__} with the layers of a new UNet, without hooks or patches"
            raise ConfigError(f"quantize: {name}: expected {expected}, got another {type(part).__name__}")
    for name, block in _blocks(model):
        for _, norm, _ in _halves(block):
            if not isinstance(norm, nn.Identity) and getattr(norm, "running_mean", None) is None:
                raise ConfigError(f"quantize: {name}: expected norms with running statistics, or none, got {norm}")


def _chain(model: UNet) -> None:
    """Tell each layer for which quantised convolutions alone its results are: they are written in e4m3 for those."""
    blocks = [block for _, block in _blocks(model)]
    for up in model.ups:
        if isinstance(up.up, nn.ConvTranspose2d) and isinstance(up.conv.first, QuantizedConv3x3):
            up.up = ChainedConvTranspose2x2(up.up, up.conv.first.scale.clone())
    for block in blocks:
        _write_for(block.first, y=block.second)
    depth = len(model.downs)
    for level in range(depth):
        _write_for(blocks[level].second, y=blocks[-1 - level].first, pooled=blocks[level + 1].first)


def _write_for(producer: nn.Module, **consumers: nn.Module) -> None:
    for result, consumer in consumers.items():
        if hasattr(producer, f"{result}_scale") and isinstance(consumer, QuantizedConv3x3):
            setattr(producer, f"{result}_scale", consumer.scale.clone())


def _blocks(model: UNet) -> list[tuple[str, Any]]:
    """Return the double convolutions by their paths."""
    downs = [(f"down{i}.maxpool_conv.1", down.maxpool_conv[1]) for i, down in enumerate(model.downs, 1)]
    return [("inc", model.inc), *downs, *((f"up{i}.conv", up.conv) for i, up in enumerate(model.ups, 1))]


def _halves(block: Any) -> list[tuple[nn.Module, nn.Module, nn.Module]]:
    steps = list(block.double_conv)
    return [(steps[0], steps[1], steps[2]), (steps[3], steps[4], steps[5])]


class QuantizedUNet(UNet):
    """A UNet of `quantize`, whose layers hand each other images in e4m3, as hooks see. Down and Up are not called."""

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x, getattr(self.inc.first, "conv", self.inc.first).weight)
        x = x.to(memory_format=torch.channels_last)
        skips = []
        for block in self.encoder:
            skip, x = block(x, pool=True)
            skips.append(skip)
        x = self.bottleneck(x)
        for up, skip in zip(self.decoder, reversed(skips), strict=True):
            x = up.conv(skip, modules.padded_to(modules.upsample(up.up, x), skip))
        return self.head(x)


class SplitDoubleConv(nn.Module):
    """A DoubleConv of two modules, each of which takes (x, up, pool=...)."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, up: Tensor | None = None, *, pool: bool = False) -> Any:
        return self.second(self.first(x, up), None, pool=pool)


class _Scaled(nn.Module):
    """A layer whose own buffers stay in their dtype, whatever the model is cast to. y_scale: its result is for a
    quantised convolution alone, and on tensor cores is divided by this and in e4m3.
    """

    y_scale: Tensor | None

    def __init__(self, y_scale: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("y_scale", y_scale)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, t in kept.items():
            setattr(self, name, t.to(getattr(self, name).device))
        return self


class Conv3x3(_Scaled):
    """A convolution with what follows it, as in the float model."""

    def __init__(self, conv: nn.Module, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act

    @untraced
    @torch.no_grad()
    def forward(self, x: Tensor, up: Tensor | None = None, *, pool: bool = False) -> Any:
        if self.y_scale is None or up is not None or pool or not self._chains(x):
            return modules.conv_norm_activation(self.conv, self.norm, self.act, x, up, pool=pool)
        from fastunet.kernels.conv3x3.pointer import conv3x3
        from fastunet.kernels.epilogue import Normalisation

        dtype = _dtype_of(x)
        bias, given = modules._bias_and_norm(self.conv, self.norm)
        options = {"norm": None if given is None else Normalisation(*given), "negative_slope": modules._slope(self.act)}
        y, _ = conv3x3(x.to(dtype), self.conv.weight.to(dtype), bias, y_scale=self.y_scale, **options)
        return y

    def _chains(self, x: Tensor) -> bool:
        if not _has_tensor_cores(x, _dtype_of(x)):
            return False
        from fastunet.kernels.conv3x3 import config

        return x.shape[1] < config.FOLDED_BELOW


class ChainedConvTranspose2x2(_Scaled):
    """A 2x2 transposed convolution whose result is for a quantised one alone."""

    up: Any

    def __init__(self, up: nn.Module, y_scale: Tensor) -> None:
        super().__init__(y_scale)
        self.up = up

    @untraced
    @torch.no_grad()
    def forward(self, low: Tensor) -> Tensor:
        dtype = _dtype_of(low)
        if not self._chains(low, dtype):
            return ops.conv_transpose2x2(low, self.up.weight, self.up.bias)
        from fastunet.kernels.conv_transpose2x2 import conv_transpose2x2

        weight, bias = (None if t is None else t.to(dtype) for t in (self.up.weight, self.up.bias))
        return conv_transpose2x2(low.to(dtype), weight, bias, y_scale=self.y_scale)

    def _chains(self, low: Tensor, dtype: torch.dtype) -> bool:
        if not _has_tensor_cores(low, dtype):
            return False
        from fastunet.kernels import config_pixels, gpu

        channels = self.up.weight.shape[:2]
        return config_pixels.writes_e4m3(*channels, dtype, gpu.target(low.device))


def _dtype_of(x: Tensor) -> torch.dtype:
    """In which a layer computes on x."""
    return autocast_dtype(x.device.type) or x.dtype


def _has_tensor_cores(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels on 8-bit tensor cores run on images like x, in a net that computes in dtype."""
    return _might_have_tensor_cores(x, dtype) and not _failure(x.device)


def _might_have_tensor_cores(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether such kernels would run if they pass their check."""
    is_absent = x.device.type == "cuda" and not torch.cuda.is_available()
    if is_absent or dtype.itemsize != 2 or x.numel() == 0 or dispatch.selected_backend() == "aten":
        return False
    if dispatch.triton_unsupported(x.device, dtype) is not None:
        return False
    from fastunet.kernels import gpu
    from fastunet.kernels.conv3x3 import config

    return config.has_fp8(gpu.target(x.device))


def _failure(device: torch.device) -> str:
    """What is wrong with the kernels on that GPU, "" if nothing."""
    return measuring.failure_of("conv3x3_fp8", "bfloat16", device) if device.type == "cuda" else ""


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
    """Return the quantised convolution of an observed one, or a plain one where its channels do not suit."""
    largest = half.largest
    if largest == 0:
        raise DataError(f"quantize: {name}: expected values other than 0 in calibration, got none")
    if any(channels % 32 for channels in half.channels):
        return Conv3x3(half.conv, half.norm, half.act)
    return QuantizedConv3x3(half.conv, half.norm, half.act, largest)


class QuantizedConv3x3(_Scaled):
    """activation(norm(conv2d(x, weight, padding=1))) of images [N, C, H, W] and weights in e4m3, for inference.

    Images come in the model's dtype, or divided by scale and in e4m3, as another such module has left them. Results are
    of the model's dtype, autocast's, or, where they have a scale, divided by it and in e4m3.
    """

    weight: Tensor  # e4m3 [Cout, C, 3, 3]
    scale: Tensor  # that of the images
    # Batch norm's, float32 [Cout], as it is to be taken of the sums of e4m3 values, so that they hold the scales.
    mean: Tensor
    variance: Tensor
    gamma: Tensor
    bias: Tensor
    pooled_scale: Tensor | None  # like y_scale, that of a result, or None

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
        self.register_buffer("pooled_scale", None)
        # No values, but the model's dtype, which an image in e4m3 does not tell.
        self._like = conv.weight.detach().new_empty(0)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._like = fn(self._like)
        return super()._apply(fn, recurse)

    @untraced
    @torch.no_grad()
    def forward(self, x: Tensor, up: Tensor | None = None, *, pool: bool = False) -> Any:
        if self.training:
            raise ConfigError("a quantised model is for inference: expected eval mode, got train mode")
        check_untransformed("a quantised model")
        choice = self.choose(x, up)
        on_tensor_cores = choice.implementation == "triton"
        if x.is_cuda and not on_tensor_cores:
            warnings.warn(f"8 bits are {choice.reason}", RuntimeWarning, stacklevel=2)
        y, pooled = (self._on_tensor_cores if on_tensor_cores else self._emulated)(x, up, pool)
        return (y, pooled) if pool else y

    def choose(self, x: Tensor, up: Tensor | None) -> dispatch.Choice:
        """Return what runs this layer on inputs like these, and why."""
        if _has_tensor_cores(x, self._dtype(x, up)):
            from fastunet.kernels.conv3x3 import config

            if config.fits_fp8((x.shape[1], 0 if up is None else up.shape[1]), self.weight.shape[0]):
                return ON_TENSOR_CORES
        failed = _failure(x.device) if _might_have_tensor_cores(x, self._dtype(x, up)) else ""
        return dispatch.Choice("aten", f"emulated in float32, slowly: {failed}") if failed else EMULATED

    def _dtype(self, x: Tensor, up: Tensor | None) -> torch.dtype:
        """Of results that are not in e4m3."""
        images = (t.dtype for t in (x, up) if t is not None and t.dtype != E4M3)
        return autocast_dtype(x.device.type) or next(images, self._like.dtype)

    def _on_tensor_cores(self, x: Tensor, up: Tensor | None, pool: bool) -> tuple[Tensor, Tensor | None]:
        from fastunet.kernels.conv3x3.fp8 import conv3x3_fp8
        from fastunet.kernels.epilogue import Normalisation

        dtype = self._dtype(x, up)
        images = (t if t is None or t.dtype == E4M3 else t.to(dtype) for t in (x, up))
        norm = Normalisation(self.mean, self.variance, self.gamma, self.eps)
        results = {"dtype": dtype, "pool": pool, "y_scale": self.y_scale, "pooled_scale": self.pooled_scale}
        return conv3x3_fp8(*images, self.weight, self.scale, self.bias, norm, self.negative_slope, **results)

    def _emulated(self, x: Tensor, up: Tensor | None, pool: bool) -> tuple[Tensor, Tensor | None]:
        dtype = self._dtype(x, up)
        images = (t if t.dtype == E4M3 else _to_e4m3(t.to(dtype), self.scale) for t in (x, up) if t is not None)
        with torch.autocast(x.device.type, enabled=False):
            sums = F.conv2d(torch.cat([t.float() for t in images], dim=1), self.weight.float(), padding=1)
        scale = self.gamma * (self.variance + self.eps).rsqrt()
        y = (sums - self.mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        y = F.leaky_relu(y, self.negative_slope)
        pooled = _as_result(F.max_pool2d(y, 2), self.pooled_scale, dtype) if pool else None
        return _as_result(y, self.y_scale, dtype), pooled


def _to_e4m3(t: Tensor, scale: Tensor) -> Tensor:
    """As the kernels: by the reciprocal."""
    return (t.float() * (1 / scale)).clamp(-LARGEST, LARGEST).to(E4M3)


def _as_result(t: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if scale is None else _to_e4m3(t, scale)


def _affine(conv: Any, norm: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Return mean, variance, gamma, bias, float32 [Cout], and eps of what follows the sums: a norm, or a bias alone."""
    like = conv.weight.new_ones(conv.weight.shape[0], dtype=torch.float32)
    if isinstance(norm, nn.Identity):
        bias = like * 0 if conv.bias is None else conv.bias.detach().float()
        return like * 0, like, like.clone(), bias.clone(), 0.0
    mean, variance = (t.detach().float().clone() for t in (norm.running_mean, norm.running_var))
    gamma, bias = (None if t is None else t.detach().float().clone() for t in (norm.weight, norm.bias))
    return mean, variance, like if gamma is None else gamma, like * 0 if bias is None else bias, norm.eps
