"""The U-Net's blocks on fused ops. Parameters are those of `fastunet.reference`'s blocks; only forward differs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet import ops, reference
from fastunet.reference.unet import padding_to


class DoubleConv(reference.DoubleConv):
    """Twice conv3x3, norm, activation, each one op. x, or [x, up] where up is given; with pool, (y, max_pool2x2(y))."""

    def forward(self, x: Tensor, up: Tensor | None = None, *, pool: bool = False) -> Any:
        conv1, norm1, act1, conv2, norm2, act2 = self.double_conv
        x = conv_norm_activation(conv1, norm1, act1, x, up)
        return conv_norm_activation(conv2, norm2, act2, x, pool=pool)


class Down(reference.Down):
    """DoubleConv of an image that the level above has already pooled."""

    def forward(self, pooled: Tensor, *, pool: bool = False) -> Any:
        return self.maxpool_conv[1](pooled, pool=pool)


class Up(reference.Up):
    """Double the lower level, pad it to the skip's size, and DoubleConv the two without joining them."""

    def forward(self, low: Tensor, skip: Tensor) -> Tensor:
        up: Any = self.up
        low = ops.conv_transpose2x2(low, up.weight, up.bias) if _has(up, CONV_TRANSPOSE2X2) else up(low)
        padding = padding_to(low, skip)
        return self.conv(skip, F.pad(low, padding) if any(padding) else low)


class OutConv(reference.OutConv):
    """The 1x1 head with its activation."""

    def forward(self, x: Tensor) -> Tensor:
        if not _has(self.conv, CONV1X1):
            return super().forward(x)
        return ops.conv1x1(x, self.conv.weight, self.conv.bias, activation=self.head)


def conv_norm_activation(
    conv: Any, norm: Any, act: Any, x: Tensor, up: Tensor | None = None, *, pool: bool = False
) -> Any:
    """act(norm(conv(x))) as one op, or module by module where one of them is not what the op computes.

    A norm exchanged for another kind (SyncBatchNorm), a hook on one of the three: then they are called as they stand.
    """
    if not _is_fusable(conv, norm, act):
        y = act(norm(conv(x if up is None else torch.cat([x, up], dim=1))))
        return (y, ops.max_pool2x2(y)) if pool else y
    activation: dict[str, Any] = {"negative_slope": getattr(act, "negative_slope", 0.0)}
    if isinstance(norm, nn.BatchNorm2d):
        return _batch_norm(conv, norm, x, up, pool, activation)
    if isinstance(norm, nn.InstanceNorm2d):
        parameters = (conv.weight, norm.weight, norm.bias)
        if up is not None:
            return ops.concat_conv3x3_instance_norm_relu(x, up, *parameters, eps=norm.eps, **activation)
        op = ops.conv3x3_instance_norm_relu_pool if pool else ops.conv3x3_instance_norm_relu
        return op(x, *parameters, eps=norm.eps, **activation)
    if up is not None:
        return ops.concat_conv3x3_bias_relu(x, up, conv.weight, conv.bias, **activation)
    return (ops.conv3x3_bias_relu_pool if pool else ops.conv3x3_bias_relu)(x, conv.weight, conv.bias, **activation)


PLAIN_TYPES = (
    *(nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d),
    *(nn.Identity, nn.ReLU, nn.LeakyReLU),
)
_PLAIN_CONV = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
CONV3X3 = {**_PLAIN_CONV, "kernel_size": (3, 3), "transposed": False}
CONV1X1 = {**_PLAIN_CONV, "kernel_size": (1, 1), "padding": (0, 0), "transposed": False}
CONV_TRANSPOSE2X2 = {
    **_PLAIN_CONV,
    "kernel_size": (2, 2),
    "stride": (2, 2),
    "padding": (0, 0),
    "output_padding": (0, 0),
    "transposed": True,
}


def _is_fusable(conv: Any, norm: Any, act: Any) -> bool:
    """Whether the three are what one of the ops computes: as built, or changed by the user into something else."""
    return (
        _has(conv, CONV3X3)
        and _is_plain(norm)
        and _is_plain(act)
        and (conv.bias is None or isinstance(norm, nn.Identity))
    )


def _has(conv: Any, geometry: dict[str, Any]) -> bool:
    """Whether a plain convolution has exactly this geometry."""
    return _is_plain(conv) and all(getattr(conv, name, None) == value for name, value in geometry.items())


def _is_plain(module: nn.Module) -> bool:
    """One of the types the fused ops stand for, itself and not a subclass, without hooks or running instance norm."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    tracking = isinstance(module, nn.InstanceNorm2d) and module.track_running_stats
    return type(module) in PLAIN_TYPES and not any(hooks) and not tracking


def _batch_norm(conv: Any, norm: Any, x: Tensor, up: Tensor | None, pool: bool, activation: dict[str, Any]) -> Any:
    """As nn.BatchNorm2d.forward: which statistics, and how far the running ones move."""
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    use_batch = norm.training or norm.running_mean is None
    running = (norm.running_mean, norm.running_var) if not norm.training or norm.track_running_stats else (None, None)
    parameters = (conv.weight, norm.weight, norm.bias, *running)
    options: dict[str, Any] = {"training": use_batch, "momentum": momentum, "eps": norm.eps, **activation}
    if up is not None:
        return ops.concat_conv3x3_batch_norm_relu(x, up, *parameters, **options)
    return (ops.conv3x3_batch_norm_relu_pool if pool else ops.conv3x3_batch_norm_relu)(x, *parameters, **options)
