"""What pooling, the transposed convolution and the head, and their gradients, are to be, in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from .budget import FP32_SMALLEST, UNIT_ROUNDOFF, Expected, conv_tolerance, stored, sum_error
from .convolutions import conv3x3_activation_grad_expected


def max_pool2x2_grad_expected(x: Tensor, grad: Tensor) -> Expected:
    """The gradient of max_pool2d(x, 2), from torch's backward: values moved, never changed."""
    value = conv3x3_activation_grad_expected(x, None, grad, None).value
    return Expected(value, torch.zeros_like(value))


def conv_transpose2x2_expected(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    allow_tf32: bool = False,
    tensor_cores: bool | None = None,
) -> Expected:
    """conv_transpose2d(x, weight, bias, stride=2): windows do not overlap, so a sum has Cin products."""
    b = None if bias is None else bias.double()
    value = F.conv_transpose2d(x.double(), weight.double(), b, stride=2)
    magnitude = F.conv_transpose2d(x.double().abs(), weight.double().abs(), None if b is None else b.abs(), stride=2)
    return _product_expected(value, magnitude, x.shape[1] + 1, x.dtype, allow_tf32, tensor_cores)


def conv_transpose2x2_input_grad_expected(
    grad: Tensor, weight: Tensor, *, allow_tf32: bool = False, tensor_cores: bool | None = None
) -> Expected:
    """The gradient of its input: a sum of 4*Cout products."""
    value = F.conv2d(grad.double(), weight.double(), stride=2)
    magnitude = F.conv2d(grad.double().abs(), weight.double().abs(), stride=2)
    return _product_expected(value, magnitude, 4 * grad.shape[1] + 1, grad.dtype, allow_tf32, tensor_cores)


def conv_transpose2x2_weight_grad_expected(
    grad: Tensor, x: Tensor, *, allow_tf32: bool = False, tensor_cores: bool | None = None
) -> Expected:
    """The gradient of its weight: a sum of N*H*W products."""
    shape = (x.shape[1], grad.shape[1], 2, 2)
    # With the two images' roles exchanged it is a convolution's.
    value = conv2d_weight(grad.double(), shape, x.double(), stride=2)
    magnitude = conv2d_weight(grad.double().abs(), shape, x.double().abs(), stride=2)
    terms = x.shape[0] * x.shape[2] * x.shape[3] + 1
    return _product_expected(value, magnitude, terms, grad.dtype, allow_tf32, tensor_cores)


def _product_expected(
    value: Tensor,
    magnitude: Tensor,
    terms: int,
    dtype: torch.dtype,
    allow_tf32: bool,
    tensor_cores: bool | None,
) -> Expected:
    tolerance = conv_tolerance(value, magnitude, terms, dtype, allow_tf32=allow_tf32, tensor_cores=tensor_cores)
    return Expected(value, tolerance)


def conv1x1_expected(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    allow_tf32: bool = False,
    tensor_cores: bool | None = None,
) -> Expected:
    """activation(conv2d(x, weight, bias)): the logits' error E carried through the activation, to first order in u.

    With u that of float32, exp(t) in float32 is off by (2|t| + 4) u relatively: exp2(t * log2(e)) rounds its constant
    and its product, and GPUs' exp2 is good to 2^-22. A division is good to 2 ulp, 4u. What is below 2^-126 may be lost.

    sigmoid, s = 1/(1 + exp(-z)): its slope is s(1 - s), and within E of z at most exp(E) times that. exp(-z) weighs
    1 - s in the sum below, which is rounded once:
        error = E exp(E) s(1 - s) + s ((1 - s)(2|z| + 4) + 5) u + 2^-126
    softmax, p_k = exp(t_k) / sum of exp(t_j), t = z - max(z): errors d_j of the logits make it p_k exp(d_k) / sum of
    p_j exp(d_j), within a factor exp(E_k + A) of p_k for A = log(sum of p_j exp(E_j)). t_k is rounded too, so
    r_k = (3|t_k| + 4) u is exp(t_k)'s own error; C positive terms are summed:
        error = p_k (exp(E_k + A) - 1 + r_k + sum of p_j r_j + (6 sqrt(C) + 4) u) + 2^-126
    """
    b = None if bias is None else bias.double()
    z = F.conv2d(x.double(), weight.double(), b)
    magnitude = F.conv2d(x.double().abs(), weight.double().abs(), None if b is None else b.abs())
    error = sum_error(magnitude, x.shape[1] + 1, x.dtype, allow_tf32=allow_tf32, tensor_cores=tensor_cores)
    u = UNIT_ROUNDOFF[torch.float32]
    value = z
    if activation == "sigmoid":
        value = z.sigmoid()
        other = (-z).sigmoid()
        error = error * error.exp() * value * other + value * (other * (2 * z.abs() + 4) + 5) * u + FP32_SMALLEST
    elif activation == "softmax":
        value = z.softmax(1)
        own = (3 * (z - z.amax(1, keepdim=True)).abs() + 4) * u
        spread = error + (value * error.exp()).sum(1, keepdim=True).log()
        own = own + (value * own).sum(1, keepdim=True) + (6 * math.sqrt(z.shape[1]) + 4) * u
        error = value * (spread.expm1() + own) + FP32_SMALLEST
    return Expected(value, stored(value, error, x.dtype))


def _conv1x1_logit_grad(grad: Tensor, y: Tensor | None, activation: str | None) -> Expected:
    """The gradient of conv1x1's logits as float32 computes it from grad and y as they are, before any rounding.

    g y (1 - y) takes three roundings; y (g - d) two, with an error of d = sum of g_j y_j before them.
    """
    g, u = grad.double(), UNIT_ROUNDOFF[torch.float32]
    if activation is None or y is None:
        return Expected(g, torch.zeros_like(g))
    p = y.double()
    if activation == "sigmoid":
        value = g * p * (1 - p)
        return Expected(value, 3 * u * value.abs())
    value = p * (g - (g * p).sum(1, keepdim=True))
    dots_error = 6 * math.sqrt(g.shape[1]) * u * (g * p).abs().sum(1, keepdim=True)
    return Expected(value, 2 * u * value.abs() + p * dots_error)


def _operand(logit_grad: Expected, dtype: torch.dtype, activation: str | None) -> Expected:
    """The same as the operand of a product: rounded to dtype, where an activation made it anew."""
    rounds = activation is not None and dtype.itemsize == 2
    value, error = logit_grad
    return Expected(value, stored(value, error, dtype) if rounds else error)


def conv1x1_input_grad_expected(
    grad: Tensor,
    weight: Tensor,
    y: Tensor | None = None,
    *,
    activation: str | None = None,
    allow_tf32: bool = False,
    tensor_cores: bool | None = None,
) -> Expected:
    """The gradient of conv1x1's input: a sum of Cout products, whose one operand has an error of its own."""
    g, g_error = _operand(_conv1x1_logit_grad(grad, y, activation), grad.dtype, activation)
    w = weight.double()
    value, magnitude = F.conv_transpose2d(g, w), F.conv_transpose2d(g.abs() + g_error, w.abs())
    terms = grad.shape[1] + 1
    error = sum_error(magnitude, terms, grad.dtype, allow_tf32=allow_tf32, tensor_cores=tensor_cores)
    return Expected(value, stored(value, error + F.conv_transpose2d(g_error, w.abs()), grad.dtype))


def conv1x1_weight_grad_expected(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None = None,
    *,
    activation: str | None = None,
    allow_tf32: bool = False,
    tensor_cores: bool | None = None,
) -> Expected:
    """The gradient of conv1x1's weight: a sum of N*H*W products, whose one operand has an error of its own."""
    g, g_error = _operand(_conv1x1_logit_grad(grad, y, activation), grad.dtype, activation)
    shape = (grad.shape[1], x.shape[1], 1, 1)
    magnitude = conv2d_weight(x.double().abs(), shape, g.abs() + g_error)
    value, carried = conv2d_weight(x.double(), shape, g), conv2d_weight(x.double().abs(), shape, g_error)
    terms = x.shape[0] * x.shape[2] * x.shape[3] + 1
    error = sum_error(magnitude, terms, grad.dtype, allow_tf32=allow_tf32, tensor_cores=tensor_cores)
    return Expected(value, stored(value, error + carried, grad.dtype))


def conv1x1_bias_grad_expected(grad: Tensor, y: Tensor | None = None, *, activation: str | None = None) -> Expected:
    """The gradient of conv1x1's bias: a float32 sum of N*H*W values that were not rounded first."""
    g, g_error = _conv1x1_logit_grad(grad, y, activation)
    value, magnitude = g.sum((0, 2, 3)), (g.abs() + g_error).sum((0, 2, 3))
    terms = grad.shape[0] * grad.shape[2] * grad.shape[3] + 1
    error = sum_error(magnitude, terms, grad.dtype, tensor_cores=False) + g_error.sum((0, 2, 3))
    return Expected(value, stored(value, error, grad.dtype))
