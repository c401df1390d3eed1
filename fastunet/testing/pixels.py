"""What pooling, the transposed convolution and the head, and their gradients, are to be, in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from .bounds import Expected, Operand, bilinear, pool_grad
from .convolutions import weight_grad_expected

# `rounds` of each: dtype, allow_tf32 and tensor_cores, as `bilinear` takes them.


def max_pool2x2_grad_expected(x: Tensor, grad: Tensor) -> Expected:
    """The gradient of max_pool2d(x, 2), from torch's backward: values moved, never changed."""
    return pool_grad(grad, Expected.exact(x))


def conv_transpose2x2_expected(x: Operand, weight: Tensor, bias: Tensor | None = None, **rounds: Any) -> Expected:
    """conv_transpose2d(x, weight, bias, stride=2): windows do not overlap, so a sum has Cin products."""

    def upsample(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv_transpose2d(x, weight, stride=2)

    return bilinear(upsample, x, weight, weight.shape[0], bias=bias, **rounds)


def conv_transpose2x2_input_grad_expected(grad: Operand, weight: Tensor, **rounds: Any) -> Expected:
    """The gradient of its input: a sum of 4*Cout products."""

    def downsample(grad: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(grad, weight, stride=2)

    return bilinear(downsample, grad, weight, weight[0].numel(), **rounds)


def conv_transpose2x2_weight_grad_expected(grad: Tensor, x: Tensor, **rounds: Any) -> Expected:
    """The gradient of its weight: a sum of N*H*W products."""
    shape = (x.shape[1], grad.shape[1], 2, 2)

    def product(grad: Tensor, x: Tensor) -> Tensor:
        # With the two images' roles exchanged it is a convolution's.
        return conv2d_weight(grad, shape, x, stride=2)

    return bilinear(product, grad, x, x[:, 0].numel(), **rounds)


def conv1x1_expected(
    x: Operand, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None, **rounds: Any
) -> Expected:
    """activation(conv2d(x, weight, bias)), rounded once: an activation takes the logits as they are summed."""
    if activation is None:
        return bilinear(F.conv2d, x, weight, weight.shape[1], bias=bias, **rounds)
    z = bilinear(F.conv2d, x, weight, weight.shape[1], bias=bias, is_stored=False, **rounds)
    return (z.sigmoid() if activation == "sigmoid" else z.softmax()).stored(rounds.get("dtype") or weight.dtype)


def conv1x1_logit_grad_expected(grad: Operand, y: Operand | None, activation: str | None) -> Expected:
    """The gradient of conv1x1's logits as float32 computes it from grad and y, before any rounding to a dtype."""
    g = Expected.of(grad)
    if activation is None or y is None:
        return g
    p = Expected.of(y)
    if activation == "sigmoid":
        return g * p * (Expected.exact(torch.ones_like(p.value)) - p)
    return p * (g - (g * p).sum((1,), keepdim=True))


def _operand(grad: Tensor, y: Tensor | None, activation: str | None) -> Expected:
    """The same as the operand of a product: rounded to 16 bits, where an activation made it anew."""
    result = conv1x1_logit_grad_expected(grad, y, activation)
    return result.stored(grad.dtype) if activation is not None and grad.dtype.itemsize == 2 else result


def conv1x1_input_grad_expected(
    grad: Tensor, weight: Tensor, y: Tensor | None = None, *, activation: str | None = None, **rounds: Any
) -> Expected:
    """The gradient of conv1x1's input: a sum of Cout products, whose one operand has an error of its own."""
    return bilinear(F.conv_transpose2d, _operand(grad, y, activation), weight, weight.shape[0], **rounds)


def conv1x1_weight_grad_expected(
    grad: Tensor, x: Tensor, y: Tensor | None = None, *, activation: str | None = None, **rounds: Any
) -> Expected:
    """The gradient of conv1x1's weight: a sum of N*H*W products, whose one operand has an error of its own."""
    return weight_grad_expected(_operand(grad, y, activation), x, 1, **rounds)


def conv1x1_bias_grad_expected(grad: Tensor, y: Tensor | None = None, *, activation: str | None = None) -> Expected:
    """The gradient of conv1x1's bias: a float32 sum of N*H*W values that were not rounded first."""
    return conv1x1_logit_grad_expected(grad, y, activation).sum((0, 2, 3)).stored(grad.dtype)
