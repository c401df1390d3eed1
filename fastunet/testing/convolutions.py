"""What convolutions, pooling and their gradients are to be, in float64. Operands may have errors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from fastunet.cpu.folding import compose_upsampling, split_joined

from .bounds import Expected, Operand, activation_grad, bilinear, join, pool_grad
from .budget import E4M3_PRODUCTS, E4M3_TRUNCATION, sum_error

# `rounds` of each: dtype, allow_tf32 and tensor_cores, as `bilinear` takes them.


def conv3x3_expected(
    x: Operand,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    up: Operand | None = None,
    stride: int = 1,
    negative_slope: float | None = None,
    **rounds: Any,
) -> Expected:
    """Compute activation(conv2d(cat([x, up], 1), weight, bias, stride, padding=1)); negative_slope None is no
    activation, 0 ReLU.
    """
    inputs = Expected.of(x) if up is None else join(Expected.of(x), Expected.of(up))
    convolve = partial(F.conv2d, stride=stride, padding=1)
    return bilinear(convolve, inputs, weight, weight[0].numel(), bias=bias, **rounds).activate(negative_slope)


def composed_sums_expected(
    skip: Tensor,
    low: Tensor,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    weight: Tensor,
    *,
    up_first: bool = False,
) -> Expected:
    """Compute conv2d(cat([skip, up], 1), weight, padding=1) of up = conv_transpose2d(low, up_weight, up_bias,
    stride=2), or without up_weight interpolate(low, scale_factor=2), padded with zeros below and right where skip is
    one larger, and how far off it may be, before it is stored, by a composed weight of skip's dtype: that is rounded
    once, by which the result is off by u_out times the sum of its products, and each of its sums has 9 C1 + 4 Cl terms.
    up_first: cat([up, skip], 1) instead.
    """
    dtype, terms = skip.dtype, 9 * skip.shape[1] + 4 * low.shape[1]
    of_skip, of_up = split_joined(weight.double(), skip, up_first)
    odd = [size % 2 for size in skip.shape[2:]]
    upsample = partial(F.conv_transpose2d, stride=2, padding=1, output_padding=odd)
    convolve = partial(F.conv2d, padding=1)
    rounds: dict[str, Any] = {"dtype": dtype, "is_stored": False}
    up_weight = None if up_weight is None else up_weight.double()
    composed = Expected.exact(compose_upsampling(up_weight, of_up)).stored(dtype)
    sums = bilinear(upsample, low, composed, terms, **rounds)
    sums += bilinear(convolve, skip, of_skip, terms, **rounds)
    if up_bias is None:
        return sums
    inside = up_bias.double()[None, :, None, None].expand(-1, -1, 2 * low.shape[2], 2 * low.shape[3])
    of_bias = F.pad(inside, [0, odd[1], 0, odd[0]])
    return sums + bilinear(convolve, of_bias, of_up, terms, **rounds)


def e4m3_sums_expected(x: Tensor, weight: Tensor, *, step: int | None = None) -> Expected:
    """Compute conv2d(x, weight, padding=1) of e4m3 values, and how far off its float32 sums may be, before they are
    stored.

    step: of sm_90, how many products its tensor cores add up before float32 adds that sum to the others'; None for
    every other device, whose sums are float32's throughout.

    An instruction aligns 32 products and the sum so far to the largest exponent among them and cuts off each, and then
    the sum, below 2^-13 of it: 34 errors, all of which may have one sign. Summands only shrink, so that no exponent is
    above that of the sum of the step's magnitudes; but numbers below 2^-6 have the exponent -6, and count as that:

        error = 34/32 step 2^-13 S'        with S' the sum of magnitudes, at least 2^-6 each where they are not 0,

    over the steps, whose S' add up; and the error of as many float32 additions as there are steps.
    """
    x, weight = x.double(), weight.double()
    value, magnitude = F.conv2d(x, weight, padding=1), F.conv2d(x.abs(), weight.abs(), padding=1)
    terms = 9 * x.shape[1]
    if step is None:
        return Expected(value, sum_error(magnitude, terms, torch.float32, tensor_cores=magnitude.is_cuda))
    x, weight = (t.abs().clamp(min=2.0**-6) * (t != 0) for t in (x, weight))
    aligned = F.conv2d(x, weight, padding=1)
    truncations = (E4M3_PRODUCTS + 2) * step // E4M3_PRODUCTS
    across = sum_error(magnitude, terms // step, torch.float32, tensor_cores=False)
    return Expected(value, truncations * E4M3_TRUNCATION * aligned + across)


def conv3x3_input_grad_expected(
    grad: Operand, weight: Tensor, *, stride: int = 1, size: Sequence[int] = (), **rounds: Any
) -> Expected:
    """Return the gradient of the convolution's input: a sum of 9*Cout products; by stride 2, of an input of that height
    and width, of four taps' at most.
    """
    convolve = partial(F.conv_transpose2d, padding=1)
    if stride == 1:
        return bilinear(convolve, grad, weight, 9 * weight.shape[0], **rounds)
    convolve = partial(convolve, stride=stride, output_padding=[1 - side % 2 for side in size])
    return bilinear(convolve, grad, weight, 4 * weight.shape[0], **rounds)


def conv3x3_weight_grad_expected(grad: Operand, x: Operand, *, stride: int = 1, **rounds: Any) -> Expected:
    """Return the gradient of the convolution's weight: a sum of as many products as grad has pixels."""
    return weight_grad_expected(grad, x, 3, stride=stride, padding=1, **rounds)


def weight_grad_expected(
    grad: Operand, x: Operand, kernel: int, *, stride: int = 1, padding: int = 0, **rounds: Any
) -> Expected:
    """Return the gradient of the weight of a convolution of x with kernels of that side."""
    shape = (Expected.of(grad).value.shape[1], Expected.of(x).value.shape[1], kernel, kernel)

    def product(grad: Tensor, x: Tensor) -> Tensor:
        return conv2d_weight(x, shape, grad, stride=stride, padding=padding)

    return bilinear(product, grad, x, Expected.of(grad).value[:, 0].numel(), **rounds)


def bias_grad_expected(grad: Tensor) -> Expected:
    """Return the gradient of a bias: a float32 sum of N*H*W values, with no products and so no TF32."""
    return Expected.exact(grad).sum((0, 2, 3)).stored(grad.dtype)


def conv3x3_activation_grad_expected(
    y: Tensor, grad_y: Tensor | None, grad_pooled: Tensor | None, negative_slope: float | None
) -> Expected:
    """Return the gradient behind activation and pooling: an addition and a product may err."""
    before = Expected.exact(y)
    grad = Expected.exact(torch.zeros_like(y) if grad_y is None else grad_y)
    if grad_pooled is not None:
        grad = grad + pool_grad(grad_pooled, before)
    return activation_grad(grad, before, negative_slope).stored(y.dtype)


def conv_transpose2x2_expected(x: Operand, weight: Tensor, bias: Tensor | None = None, **rounds: Any) -> Expected:
    """Compute conv_transpose2d(x, weight, bias, stride=2): windows do not overlap, so a sum has Cin products."""
    return bilinear(partial(F.conv_transpose2d, stride=2), x, weight, weight.shape[0], bias=bias, **rounds)


def conv_transpose2x2_input_grad_expected(grad: Operand, weight: Tensor, **rounds: Any) -> Expected:
    """Return the gradient of its input: a sum of 4*Cout products."""
    return bilinear(partial(F.conv2d, stride=2), grad, weight, weight[0].numel(), **rounds)


def conv_transpose2x2_weight_grad_expected(grad: Tensor, x: Tensor, **rounds: Any) -> Expected:
    """Return the gradient of its weight: a sum of N*H*W products."""
    # With the two images' roles exchanged it is a convolution's.
    return weight_grad_expected(x, grad, 2, stride=2, **rounds)


def conv1x1_expected(
    x: Operand, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None, **rounds: Any
) -> Expected:
    """Compute activation(conv2d(x, weight, bias)), rounded once: an activation takes the logits as they are summed."""
    if activation is None:
        return bilinear(F.conv2d, x, weight, weight.shape[1], bias=bias, **rounds)
    z = bilinear(F.conv2d, x, weight, weight.shape[1], bias=bias, is_stored=False, **rounds)
    return (z.sigmoid() if activation == "sigmoid" else z.softmax()).stored(rounds.get("dtype") or weight.dtype)


def conv1x1_logit_grad_expected(grad: Operand, y: Operand | None, activation: str | None) -> Expected:
    """Return the gradient of conv1x1's logits as float32 computes it from grad and y, not rounded to a dtype."""
    g = Expected.of(grad)
    if activation is None or y is None:
        return g
    p = Expected.of(y)
    if activation == "sigmoid":
        return g * p * (Expected.exact(torch.ones_like(p.value)) - p)
    return p * (g - (g * p).sum((1,), keepdim=True))


def _operand(grad: Tensor, y: Tensor | None, activation: str | None) -> Expected:
    """Return that as the operand of a product: rounded to 16 bits, where there is an activation."""
    result = conv1x1_logit_grad_expected(grad, y, activation)
    return result.stored(grad.dtype) if activation is not None and grad.dtype.itemsize == 2 else result


def conv1x1_input_grad_expected(
    grad: Tensor, weight: Tensor, y: Tensor | None = None, *, activation: str | None = None, **rounds: Any
) -> Expected:
    """Return the gradient of conv1x1's input: a sum of Cout products, whose one operand has an error of its own."""
    return bilinear(F.conv_transpose2d, _operand(grad, y, activation), weight, weight.shape[0], **rounds)


def conv1x1_weight_grad_expected(
    grad: Tensor, x: Tensor, y: Tensor | None = None, *, activation: str | None = None, **rounds: Any
) -> Expected:
    """Return the gradient of conv1x1's weight: a sum of N*H*W products, whose one operand has an error of its own."""
    return weight_grad_expected(_operand(grad, y, activation), x, 1, **rounds)


def conv1x1_bias_grad_expected(grad: Tensor, y: Tensor | None = None, *, activation: str | None = None) -> Expected:
    """Return the gradient of conv1x1's bias: a float32 sum of N*H*W values that were not rounded first."""
    return conv1x1_logit_grad_expected(grad, y, activation).sum((0, 2, 3)).stored(grad.dtype)
