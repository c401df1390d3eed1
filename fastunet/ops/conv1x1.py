"""conv1x1: the U-Net's head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastunet import checks, dispatch
from fastunet.ops import recompute
from fastunet.ops.convolution import convolution_grads, convolution_grads_fake
from fastunet.ops.registration import (
    below_autograd,
    define,
    define_autocast,
    empty_in,
    in_transform,
    invoke,
    memory_format,
    none_like,
    strided_like,
)
from fastunet.reference import functional as reference

NAME = "conv1x1"
ACTIVATIONS = (None, "sigmoid", "softmax")
aten = torch.ops.aten


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """activation(conv2d(x, weight, bias)): x [N, Cin, H, W], weight [Cout, Cin, 1, 1], bias [Cout] or None.

    activation None gives logits, "sigmoid" and "softmax" (over the channels) probabilities, in x's dtype and
    memory format; under autocast softmax is torch's own, which on CUDA answers in float32.
    """
    if activation not in ACTIVATIONS:
        raise checks.ConfigError(f"{NAME}: activation: expected None, 'sigmoid' or 'softmax', got {activation!r}")
    checks.check_activation(NAME, x=x)
    out_channels = checks.check_convolution(NAME, weight, x.shape[1], 1)
    checks.check_shape(NAME, "bias", bias, (out_channels,))
    checks.check_together(NAME, x, weight=weight, bias=bias)
    return invoke(_op, x, weight, bias, activation)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    if dispatch.choose(NAME, x, weight).implementation == "triton":
        y = _forward_triton(x, weight, bias, activation)
    else:
        y = _activate(F.conv2d(x, weight, bias), activation)
    return y.contiguous(memory_format=memory_format(x, weight))


def _activate(y: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return y
    return y.sigmoid_() if activation == "sigmoid" else y.softmax(dim=1)


def _forward_triton(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    from fastunet.kernels import config_pixels
    from fastunet.kernels import conv1x1 as kernels

    tf32 = dispatch.tf32_allowed()
    if activation == "softmax" and weight.shape[0] > config_pixels.LARGEST_SOFTMAX:
        return _activate(kernels.conv1x1(x, weight, bias, allow_tf32=tf32), activation)
    return kernels.conv1x1(x, weight, bias, activation=activation, allow_tf32=tf32)


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    n, _, h, w = x.shape
    return empty_in(memory_format(x, weight), x, n, weight.shape[0], h, w)


def _composition(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = reference.conv1x1(x, weight, bias, activation=activation)
    if activation != "softmax" or in_transform():
        return y
    return y.contiguous(memory_format=memory_format(x, weight))  # torch's softmax answers contiguous for any format.


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, y: Tensor | None, activation: str | None, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias."""
    if dispatch.choose(NAME, x, weight, training=True).implementation == "triton":
        return _backward_triton(grad, x, weight, y, activation, mask)
    if activation == "sigmoid":
        grad = aten.sigmoid_backward(grad, y)
    elif activation == "softmax":
        grad = aten._softmax_backward_data(grad, y, 1, x.dtype)
    return convolution_grads(grad, x, weight, mask)


def _backward_triton(
    grad: Tensor, x: Tensor, weight: Tensor, y: Tensor | None, activation: str | None, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    from fastunet.kernels import conv1x1 as kernels

    tf32 = dispatch.tf32_allowed()
    grad_x = grad_weight = grad_bias = none_like(x)
    if mask[0]:
        grad_x = kernels.conv1x1_input_grad(grad, weight, y, activation=activation, allow_tf32=tf32)
        grad_x = strided_like(grad_x, x)
    if mask[1] or mask[2]:
        sums = kernels.conv1x1_weight_grad(grad, x, y, activation=activation, with_bias=mask[2], allow_tf32=tf32)
        grad_weight = strided_like(sums[0], weight) if mask[1] else grad_weight
        grad_bias = grad_bias if sums[1] is None else sums[1]
    return grad_x, grad_weight, grad_bias


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, y: Tensor | None, activation: str | None, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return convolution_grads_fake(x, weight, mask)


class Conv1x1(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        y = below_autograd(_op, x, weight, bias, activation)
        recompute.save(ctx, x, weight, y if activation is not None else None)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask = list(ctx.needs_input_grad[:3])
        grads = _backward_op(grad, *recompute.saved(ctx, reads_values=mask[1]), ctx.activation, mask)
        return *(g if wanted else None for g, wanted in zip(grads, mask, strict=True)), None


def _softmax_rule(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor | None:
    """Softmax has an autocast rule of its own, so under autocast it stays torch's softmax of our logits."""
    if activation != "softmax":
        return None
    return _op(x, weight, bias, None).softmax(dim=1)


_op = define(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, str? activation) -> Tensor",
    implementation=_forward,
    fake=_forward_fake,
    composition=_composition,
    autograd=Conv1x1,
    weight=lambda *args: (args[1], False),
    is_torchs=True,
)
_backward_op = define(
    f"{NAME}_backward(Tensor grad, Tensor x, Tensor weight, Tensor? y, str? activation, bool[] mask) "
    "-> (Tensor, Tensor, Tensor)",
    implementation=_backward,
    fake=_backward_fake,
)
define_autocast(_op, cast=(0, 1, 2), rule=_softmax_rule)
