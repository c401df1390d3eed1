"""The ops of `fastunet.ops`, each as the composition of torch functions it stands for.

Same names and arguments as `fastunet.ops`; activations are [N, C, H, W] in any float dtype, and autograd is torch's
own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(x: Tensor, *, relu: bool = True, negative_slope: float = 0.0) -> Tensor:
    """ReLU, LeakyReLU where negative_slope > 0, or x itself where relu is False."""
    if not relu:
        return x
    return F.leaky_relu(x, negative_slope) if negative_slope else F.relu(x)


def max_pool2x2(x: Tensor) -> Tensor:
    """The maximum of each 2x2 window; an odd last row or column is dropped."""
    return F.max_pool2d(x, 2)


def conv3x3_bias_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = True, negative_slope: float = 0.0
) -> Tensor:
    """activate(conv2d(x, weight, bias)), zeros around the image."""
    return activate(F.conv2d(x, weight, bias, padding=1), relu=relu, negative_slope=negative_slope)


def conv3x3_bias_relu_pool(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = True, negative_slope: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(y, max_pool2x2(y)) of y = conv3x3_bias_relu(x, ...)."""
    y = conv3x3_bias_relu(x, weight, bias, relu=relu, negative_slope=negative_slope)
    return y, max_pool2x2(y)


def concat_conv3x3_bias_relu(
    skip: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = True,
    negative_slope: float = 0.0,
) -> Tensor:
    """conv3x3_bias_relu of [skip, up] joined along the channels."""
    return conv3x3_bias_relu(torch.cat([skip, up], dim=1), weight, bias, relu=relu, negative_slope=negative_slope)


def conv3x3_batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    negative_slope: float = 0.0,
) -> Tensor:
    """activate(batch_norm(conv2d(x, weight))); in training the running statistics are updated in place, as torch
    does.
    """
    y = F.conv2d(x, weight, padding=1)
    y = F.batch_norm(y, running_mean, running_var, gamma, beta, training, momentum, eps)
    return activate(y, relu=relu, negative_slope=negative_slope)


def conv3x3_batch_norm_relu_pool(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """(y, max_pool2x2(y)) of y = conv3x3_batch_norm_relu(x, ...)."""
    y = conv3x3_batch_norm_relu(x, *args, **kwargs)
    return y, max_pool2x2(y)


def concat_conv3x3_batch_norm_relu(skip: Tensor, up: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """conv3x3_batch_norm_relu of [skip, up] joined along the channels."""
    return conv3x3_batch_norm_relu(torch.cat([skip, up], dim=1), *args, **kwargs)


def conv3x3_instance_norm_relu(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    eps: float = 1e-5,
    relu: bool = True,
    negative_slope: float = 0.0,
) -> Tensor:
    """activate(instance_norm(conv2d(x, weight))), statistics of each image and channel."""
    y = F.instance_norm(F.conv2d(x, weight, padding=1), weight=gamma, bias=beta, eps=eps)
    return activate(y, relu=relu, negative_slope=negative_slope)


def conv3x3_instance_norm_relu_pool(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """(y, max_pool2x2(y)) of y = conv3x3_instance_norm_relu(x, ...)."""
    y = conv3x3_instance_norm_relu(x, *args, **kwargs)
    return y, max_pool2x2(y)


def concat_conv3x3_instance_norm_relu(skip: Tensor, up: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """conv3x3_instance_norm_relu of [skip, up] joined along the channels."""
    return conv3x3_instance_norm_relu(torch.cat([skip, up], dim=1), *args, **kwargs)


def conv_transpose2x2(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """conv_transpose2d with a 2x2 kernel and stride 2: [N, Cin, H, W] to [N, Cout, 2H, 2W], weight [Cin, Cout,
    2, 2].
    """
    return F.conv_transpose2d(x, weight, bias, stride=2)


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """conv2d with a 1x1 kernel, then nothing, sigmoid, or softmax over the channels."""
    y = F.conv2d(x, weight, bias)
    if activation is None:
        return y
    return y.sigmoid() if activation == "sigmoid" else y.softmax(dim=1)


def dice_sums(logits: Tensor, target: Tensor, *, squared: bool = False) -> Tensor:
    """[3, N, C]: over the pixels of each image and channel, the sums of p*t, of p (or p^2) and of t (or t^2), p =
    sigmoid(logits).

    Summed in float32, or float64 for float64 logits.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    p, t = logits.to(dtype).sigmoid().flatten(2), target.to(dtype).flatten(2)
    terms = (p * t, p * p, t * t) if squared else (p * t, p, t)
    return torch.stack([term.sum(-1) for term in terms])


def sigmoid_dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    smooth: float = 1.0,
    squared: bool = False,
    batch: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """1 - (2 sum(p*t) + smooth) / (sum(p) + sum(t) + smooth), p = sigmoid(logits), per image and channel (per
    channel if batch).
    """
    sums = dice_sums(logits, target, squared=squared)
    intersection, predicted, actual = sums.sum(1) if batch else sums
    loss = 1 - (2 * intersection + smooth) / (predicted + actual + smooth)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()
