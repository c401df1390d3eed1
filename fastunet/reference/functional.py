"""The ops of `fastunet.ops`, each as the composition of torch functions it stands for.

Same names and arguments as `fastunet.ops`; activations are [N, C, H, W] in any float dtype, and autograd is torch's
own. **activation are the arguments of `activate`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
Norm = tuple[Tensor, Tensor, Tensor | None, float]  # running_mean, running_var, gamma, eps


def activate(x: Tensor, *, relu: bool = True, negative_slope: float = 0.0) -> Tensor:
    """ReLU, LeakyReLU where negative_slope > 0, or x itself where relu is False."""
    if not relu:
        return x
    return F.leaky_relu(x, negative_slope) if negative_slope else F.relu(x)


def max_pool2x2(x: Tensor) -> Tensor:
    """Return the maximum of each 2x2 window; an odd last row or column is dropped."""
    return F.max_pool2d(x, 2)


def conv3x3_bias_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, **activation: Any
) -> Tensor:
    """Compute activate(conv2d(x, weight, bias)), zeros around the image; by stride 2 of every second pixel."""
    return activate(F.conv2d(x, weight, bias, stride, padding=1), **activation)


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
    stride: int = 1,
    **activation: Any,
) -> Tensor:
    """Compute activate(batch_norm(conv2d(x, weight))); in training the running statistics are updated in place, as
    torch does.
    """
    y = F.conv2d(x, weight, stride=stride, padding=1)
    return activate(F.batch_norm(y, running_mean, running_var, gamma, beta, training, momentum, eps), **activation)


def conv3x3_instance_norm_relu(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    eps: float = 1e-5,
    stride: int = 1,
    **activation: Any,
) -> Tensor:
    """Compute activate(instance_norm(conv2d(x, weight))), statistics of each image and channel."""
    y = F.conv2d(x, weight, stride=stride, padding=1)
    return activate(F.instance_norm(y, weight=gamma, bias=beta, eps=eps), **activation)


def pooled(op: Callable[P, Tensor]) -> Callable[P, tuple[Tensor, Tensor]]:
    """Return the op that gives y and max_pool2x2(y), of y = op(...)."""

    def run(*args: P.args, **options: P.kwargs) -> tuple[Tensor, Tensor]:
        y = op(*args, **options)
        return y, max_pool2x2(y)

    return run


def concatenated(op: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, Tensor, P], Tensor]:
    """Return the op that takes [skip, up], concatenated along the channels, in the place of x."""

    def run(skip: Tensor, up: Tensor, *args: P.args, **options: P.kwargs) -> Tensor:
        return op(torch.cat([skip, up], dim=1), *args, **options)

    return run


conv3x3_bias_relu_pool = pooled(conv3x3_bias_relu)
conv3x3_batch_norm_relu_pool = pooled(conv3x3_batch_norm_relu)
conv3x3_instance_norm_relu_pool = pooled(conv3x3_instance_norm_relu)
concat_conv3x3_bias_relu = concatenated(conv3x3_bias_relu)
concat_conv3x3_batch_norm_relu = concatenated(conv3x3_batch_norm_relu)
concat_conv3x3_instance_norm_relu = concatenated(conv3x3_instance_norm_relu)


def double_conv3x3_bias_relu(
    x: Tensor,
    up: Tensor | None,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    *,
    pool: bool = False,
    **activation: Any,
) -> Any:
    """Compute conv3x3_bias_relu twice, first of x or of [x, up]: y, or with pool (y, max_pool2x2(y))."""
    joined = x if up is None else torch.cat([x, up], dim=1)
    middle = conv3x3_bias_relu(joined, weights[0], biases[0], **activation)
    return (conv3x3_bias_relu_pool if pool else conv3x3_bias_relu)(middle, weights[1], biases[1], **activation)


def conv_transpose2x2(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute conv_transpose2d with a 2x2 kernel and stride 2: [N, Cin, H, W] to [N, Cout, 2H, 2W], weight [Cin, Cout,
    2, 2].
    """
    return F.conv_transpose2d(x, weight, bias, stride=2)


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """Compute conv2d with a 1x1 kernel, then nothing, sigmoid, or softmax over the channels."""
    y = F.conv2d(x, weight, bias)
    if activation is None:
        return y
    return y.sigmoid() if activation == "sigmoid" else y.softmax(dim=1)


def conv3x3_relu_conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    sigmoid: bool = False,
    **activation: Any,
) -> Tensor:
    """Compute conv1x1 of conv3x3_bias_relu, or of conv3x3_batch_norm_relu by norm = (running_mean, running_var, gamma,
    eps), whose beta the bias is.
    """
    y = _conv3x3_in_inference(x, weight, bias, norm, **activation)
    return conv1x1(y, head_weight, head_bias, activation="sigmoid" if sigmoid else None)


def conv_transpose2x2_concat_conv3x3_relu(
    skip: Tensor,
    low: Tensor,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    up_first: bool = False,
    **activation: Any,
) -> Tensor:
    """Return the convolution of conv3x3_relu_conv1x1, of [skip, up] or, if up_first, [up, skip]: up is
    conv_transpose2x2(low), or without up_weight low's pixels repeated, with zeros below and right where skip is one
    larger.
    """
    if up_weight is None:
        up = F.interpolate(low, scale_factor=2, mode="nearest")
    else:
        up = conv_transpose2x2(low, up_weight, up_bias)
    up = F.pad(up, [0, skip.shape[3] - up.shape[3], 0, skip.shape[2] - up.shape[2]])
    joined = torch.cat([up, skip] if up_first else [skip, up], dim=1)
    return _conv3x3_in_inference(joined, weight, bias, norm, **activation)


def _conv3x3_in_inference(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, **activation: Any
) -> Tensor:
    if norm is None:
        return conv3x3_bias_relu(x, weight, bias, **activation)
    mean, variance, gamma, eps = norm
    return conv3x3_batch_norm_relu(x, weight, gamma, bias, mean, variance, training=False, eps=eps, **activation)


def segmentation_sums(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    activation: str = "sigmoid",
    squared: bool = False,
    entropy: bool = False,
) -> Tensor:
    """Return [rows, N, C]: over the pixels of each image and channel, the sums of p*t, of p (or p^2), of t (or t^2), p
    and t zero where the mask is; with entropy also of -t*log(p) and, for sigmoid, of -(1-t)*log(1-p).

    target [N, C, H, W], or class indices [N, 1, H, W], which may be anything where the mask is zero. Summed in float32,
    or float64 for float64 logits.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    x, t, m = logits.to(dtype), target.to(dtype), 1 if mask is None else mask.to(dtype)
    index = None
    if target.shape != logits.shape:
        index = target.long() if mask is None else target.long().masked_fill(mask == 0, 0)
        t = torch.zeros_like(x).scatter(1, index, 1.0)
    p = x.sigmoid() if activation == "sigmoid" else x.softmax(1)
    pm, tm = p * m, t * m
    terms = [pm * tm, pm * pm, tm * tm] if squared else [pm * tm, pm, tm]
    if entropy and activation == "sigmoid":
        terms += [-tm * F.logsigmoid(x), -m * (1 - t) * F.logsigmoid(-x)]
    elif entropy:
        # Of labels that of their class alone: others may be infinite.
        terms.append(-tm * (x.log_softmax(1) if index is None else x.log_softmax(1).gather(1, index)))
    return torch.stack([term.flatten(2).sum(-1) for term in terms])


def sigmoid_dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    smooth: float = 1.0,
    squared: bool = False,
    batch: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Compute 1 - (2 sum(p*t) + smooth) / (sum(p) + sum(t) + smooth), p = sigmoid(logits), per image and channel (per
    channel if batch).
    """
    sums = segmentation_sums(logits, target, squared=squared)
    intersection, predicted, actual = sums.sum(1) if batch else sums
    loss = 1 - (2 * intersection + smooth) / (predicted + actual + smooth)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()
