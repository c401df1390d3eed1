"""What the 3x3 convolution and its gradients are to be, in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from fastunet.folding import compose_upsampling

from .budget import FP16_UNDERFLOW, UNIT_ROUNDOFF, Expected, conv_tolerance, stored, sum_error


def conv3x3_expected(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    up: Tensor | None = None,
    negative_slope: float | None = None,
    allow_tf32: bool = False,
    tensor_cores: bool | None = None,
) -> Expected:
    """activation(conv2d(cat([x, up], 1), weight, bias, padding=1)); negative_slope None is no activation, 0 ReLU."""
    inputs = (x if up is None else torch.cat([x, up], dim=1)).double()
    b = None if bias is None else bias.double()
    value = F.conv2d(inputs, weight.double(), b, padding=1)
    magnitude = F.conv2d(inputs.abs(), weight.double().abs(), None if b is None else b.abs(), padding=1)
    terms = 9 * inputs.shape[1] + 1
    tolerance = conv_tolerance(value, magnitude, terms, x.dtype, allow_tf32=allow_tf32, tensor_cores=tensor_cores)
    if negative_slope is not None:  # Neither activation magnifies an error, unless its slope is above 1.
        value = torch.where(value <= 0, value * negative_slope if negative_slope else 0.0, value)
        tolerance = tolerance * max(1.0, negative_slope)
    return Expected(value, tolerance)


def composed_sums_expected(
    skip: Tensor, low: Tensor, up_weight: Tensor, up_bias: Tensor | None, weight: Tensor
) -> Expected:
    """conv2d(cat([skip, up], 1), weight, padding=1) of up = conv_transpose2d(low, up_weight, up_bias, stride=2), padded
    with zeros below and right where skip is one larger, and how far off it may be, before it is stored, by a composed
    weight of skip's dtype: that is rounded once, by which the result is off by u_out times the sum of its products, and
    each of its sums has 9 C1 + 4 Cl terms.
    """
    dtype, split = skip.dtype, skip.shape[1]
    skip, low, up_weight, weight = (t.double() for t in (skip, low, up_weight, weight))
    up_bias = None if up_bias is None else up_bias.double()
    odd = [size % 2 for size in skip.shape[2:]]

    def convolve(skip: Tensor, low: Tensor, up_weight: Tensor, up_bias: Tensor | None, weight: Tensor) -> Tensor:
        up = F.pad(F.conv_transpose2d(low, up_weight, up_bias, stride=2), [0, odd[1], 0, odd[0]])
        return F.conv2d(torch.cat([skip, up], dim=1), weight, padding=1)

    def upsample(weight: Tensor) -> Tensor:
        return F.conv_transpose2d(low.abs(), weight, stride=2, padding=1, output_padding=odd)

    composed = compose_upsampling(up_weight, weight[:, split:]).abs()
    of_low = upsample(composed)
    of_bias = None if up_bias is None else up_bias.abs()
    magnitude = of_low + convolve(skip.abs(), torch.zeros_like(low), up_weight, of_bias, weight.abs())
    error = sum_error(magnitude, 9 * split + 4 * low.shape[1] + 1, dtype) + UNIT_ROUNDOFF[dtype] * of_low
    if dtype == torch.float16:
        error += FP16_UNDERFLOW * upsample(torch.ones_like(composed))
    return Expected(convolve(skip, low, up_weight, up_bias, weight), error)


def pooled_expected(expected: Expected) -> Expected:
    """The 2x2 maxima of an expected result: a maximum is off by no more than the worst of its window."""
    return Expected(F.max_pool2d(expected.value, 2), F.max_pool2d(expected.tolerance, 2))


def conv3x3_input_grad_expected(
    grad: Tensor, weight: Tensor, *, allow_tf32: bool = False, tensor_cores: bool | None = None
) -> Expected:
    """The gradient of the convolution's input: a sum of 9*Cout products."""
    g, w = grad.double(), weight.double()
    value = F.conv_transpose2d(g, w, padding=1)
    magnitude = F.conv_transpose2d(g.abs(), w.abs(), padding=1)
    terms = 9 * weight.shape[0] + 1
    return Expected(
        value,
        conv_tolerance(value, magnitude, terms, grad.dtype, allow_tf32=allow_tf32, tensor_cores=tensor_cores),
    )


def conv3x3_weight_grad_expected(
    grad: Tensor, x: Tensor, *, allow_tf32: bool = False, tensor_cores: bool | None = None
) -> Expected:
    """The gradient of the convolution's weight: a sum of N*H*W products."""
    shape = (grad.shape[1], x.shape[1], 3, 3)
    value = conv2d_weight(x.double(), shape, grad.double(), padding=1)
    magnitude = conv2d_weight(x.double().abs(), shape, grad.double().abs(), padding=1)
    terms = grad.shape[0] * grad.shape[2] * grad.shape[3] + 1
    return Expected(
        value,
        conv_tolerance(value, magnitude, terms, grad.dtype, allow_tf32=allow_tf32, tensor_cores=tensor_cores),
    )


def bias_grad_expected(grad: Tensor) -> Expected:
    """The gradient of a bias: a float32 sum of N*H*W values, with no products and so no TF32."""
    value, magnitude = grad.double().sum((0, 2, 3)), grad.double().abs().sum((0, 2, 3))
    terms = grad.shape[0] * grad.shape[2] * grad.shape[3] + 1
    return Expected(value, conv_tolerance(value, magnitude, terms, grad.dtype, tensor_cores=False))


def conv3x3_activation_grad_expected(
    y: Tensor, grad_y: Tensor | None, grad_pooled: Tensor | None, negative_slope: float | None
) -> Expected:
    """The gradient behind activation and pooling, from torch's backward: an addition and a product may err."""
    leaf = y.detach().double().requires_grad_()
    gradient = torch.zeros_like(leaf) if grad_y is None else grad_y.double()
    if grad_pooled is not None:
        (unpooled,) = torch.autograd.grad(F.max_pool2d(leaf, 2), leaf, grad_pooled.double())
        gradient = gradient + unpooled
    if negative_slope is not None:
        gradient = torch.where(y > 0, gradient, torch.where(y <= 0, gradient * negative_slope, gradient))
    error = 2 * UNIT_ROUNDOFF[torch.float32] * gradient.abs()
    return Expected(gradient, stored(gradient, error, y.dtype))
