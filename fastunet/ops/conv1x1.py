"""conv1x1: the U-Net's head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastunet import checks, dispatch, torch_private
from fastunet.ops import recompute
from fastunet.ops.convolution import convolution_grads
from fastunet.ops.registration import define, define_autocast, define_backward, empty_in, memory_format, strided_like
from fastunet.reference import functional as reference

NAME = "conv1x1"
ACTIVATIONS = (None, "sigmoid", "softmax")
aten = torch.ops.aten


class HeadArgs(NamedTuple):
    x: Tensor  # [N, Cin, H, W]
    weight: Tensor  # [Cout, Cin, 1, 1]
    bias: Tensor | None = None  # [Cout]
    activation: str | None = None

    def choice(self, *, training: bool = False) -> dispatch.Choice:
        return dispatch.choose(NAME, self.x, self.weight, training=training)


class HeadGradArgs(NamedTuple):
    """Gradients of x, weight and bias, those that output_mask asks for."""

    grad: Tensor
    x: Tensor
    weight: Tensor
    y: Tensor | None
    activation: str | None
    output_mask: list[bool]


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """Compute activation(conv2d(x, weight, bias)): x [N, Cin, H, W], weight [Cout, Cin, 1, 1], bias [Cout] or None.

    activation None gives logits, "sigmoid" and "softmax" (over the channels) probabilities, in x's dtype and
    memory format; under autocast softmax is torch's own, which on CUDA answers in float32.
    """
    if activation not in ACTIVATIONS:
        raise checks.ConfigError(f"{NAME}: activation: expected None, 'sigmoid' or 'softmax', got {activation!r}")
    checks.check_activation(NAME, x=x)
    out_channels = checks.check_convolution(NAME, weight, x.shape[1], 1)
    checks.check_shape(NAME, "bias", bias, (out_channels,))
    checks.check_together(NAME, x, weight=weight, bias=bias)
    return _op.invoke(HeadArgs(x, weight, bias, activation))


def _forward(args: HeadArgs, choice: dispatch.Choice) -> Tensor:
    if choice.implementation == "triton":
        y = _forward_triton(*args)
    else:
        y = reference.conv1x1(args.x, args.weight, args.bias, activation=args.activation)
    return y.contiguous(memory_format=memory_format(args.x, args.weight))


def _forward_triton(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    from fastunet.kernels import config_pixels
    from fastunet.kernels import conv1x1 as kernels

    tf32 = dispatch.tf32_allowed()
    if activation == "softmax" and weight.shape[0] > config_pixels.LARGEST_SOFTMAX:
        return kernels.conv1x1(x, weight, bias, allow_tf32=tf32).softmax(dim=1)
    return kernels.conv1x1(x, weight, bias, activation=activation, allow_tf32=tf32)


def _forward_fake(args: HeadArgs) -> Tensor:
    n, _, h, w = args.x.shape
    return empty_in(memory_format(args.x, args.weight), args.x, n, args.weight.shape[0], h, w)


def _composition(args: HeadArgs) -> Tensor:
    x, weight, bias, activation = args
    y = reference.conv1x1(x, weight, bias, activation=activation)
    if activation != "softmax" or torch_private.in_transform():
        return y
    return y.contiguous(memory_format=memory_format(x, weight))  # torch's softmax answers contiguous for any format.


def _backward(args: HeadGradArgs, choice: dispatch.Choice) -> tuple[Tensor | None, ...]:
    grad, x, weight, y, activation, output_mask = args
    if choice.implementation == "triton":
        return _backward_triton(args)
    if activation == "sigmoid":
        grad = aten.sigmoid_backward(grad, y)
    elif activation == "softmax":
        grad = aten._softmax_backward_data(grad, y, 1, x.dtype)
    return convolution_grads(grad, x, weight, output_mask)


def _backward_triton(args: HeadGradArgs) -> tuple[Tensor | None, ...]:
    from fastunet.kernels import conv1x1 as kernels
    from fastunet.kernels.pixel_weight_grad import pixel_weight_grad

    grad, x, weight, y, activation, output_mask = args
    options: dict[str, Any] = {"activation": activation, "allow_tf32": dispatch.tf32_allowed()}
    grad_x = grad_weight = grad_bias = None
    if output_mask[0]:
        grad_x = strided_like(kernels.conv1x1_input_grad(grad, weight, y, **options), x)
    if output_mask[1] or output_mask[2]:
        grad_weight, grad_bias = pixel_weight_grad(grad, x, y, with_bias=output_mask[2], **options)
        grad_weight = strided_like(grad_weight, weight) if output_mask[1] else None
    return grad_x, grad_weight, grad_bias


class Conv1x1(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        y = _op.below_autograd(x, weight, bias, activation)
        recompute.save(ctx, x, weight, y if activation is not None else None)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output_mask = list(ctx.needs_input_grad[:3])
        grads = _backward_op(grad, *recompute.saved(ctx, reads_values=output_mask[1]), ctx.activation, output_mask)
        return *(g if needed else None for g, needed in zip(grads, output_mask, strict=True)), None


def _softmax_rule(args: HeadArgs) -> Tensor | None:
    """Softmax has an autocast rule of its own, so under autocast it stays torch's softmax of our logits."""
    if args.activation != "softmax":
        return None
    return _op(*args._replace(activation=None)).softmax(dim=1)


_op = define(
    NAME,
    HeadArgs,
    1,
    implementation=_forward,
    fake=_forward_fake,
    composition=_composition,
    autograd=Conv1x1,
    is_torchs=lambda args: True,
)
_backward_op = define_backward(_op, HeadGradArgs, ("x", "weight", "bias"), implementation=_backward)
define_autocast(_op, cast=("x", "weight", "bias"), rule=_softmax_rule)
