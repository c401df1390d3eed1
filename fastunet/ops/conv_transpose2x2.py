"""conv_transpose2x2."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastunet import checks, dispatch
from fastunet.cpu import onednn
from fastunet.ops import recompute
from fastunet.ops.convolution import convolution_grads, kernel_weight
from fastunet.ops.registration import define, define_autocast, define_backward, empty_in, memory_format, strided_like
from fastunet.reference import functional as reference

NAME = "conv_transpose2x2"


class UpArgs(NamedTuple):
    x: Tensor  # [N, Cin, H, W]
    weight: Tensor  # [Cin, Cout, 2, 2]
    bias: Tensor | None = None  # [Cout]
    needs_backward: bool = False  # there will be a backward

    def choice(self, *, training: bool = False) -> dispatch.Choice:
        return dispatch.choose(NAME, self.x, self.weight, training=training or self.needs_backward)


class UpGradArgs(NamedTuple):
    """Gradients of x, weight and bias, those that output_mask asks for."""

    grad: Tensor
    x: Tensor
    weight: Tensor
    output_mask: list[bool]


def conv_transpose2x2(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Upsample by 2: x [N, Cin, H, W], weight [Cin, Cout, 2, 2], bias [Cout] or None to [N, Cout, 2H, 2W].

    Equal to `F.conv_transpose2d(x, weight, bias, stride=2)`.
    """
    checks.check_activation(NAME, x=x)
    out_channels = checks.check_convolution(NAME, weight, x.shape[1], 2, transposed=True)
    checks.check_shape(NAME, "bias", bias, (out_channels,))
    checks.check_together(NAME, x, weight=weight, bias=bias)
    return _op.invoke(UpArgs(x, weight, bias))


def _forward(args: UpArgs, choice: dispatch.Choice) -> Tensor:
    x, weight, bias, needs_backward = args
    if choice.implementation == "triton":
        from fastunet.kernels import conv_transpose2x2 as kernels

        packed = kernel_weight(weight, x, training=needs_backward)
        y = kernels.conv_transpose2x2(x, packed, bias, allow_tf32=dispatch.tf32_allowed())
    elif choice.implementation == "onednn":
        y = onednn.conv_transpose2x2(x, weight, bias)
    else:
        y = F.conv_transpose2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), stride=2)
    return y.contiguous(memory_format=memory_format(x, weight))


def _forward_fake(args: UpArgs) -> Tensor:
    n, _, h, w = args.x.shape
    return empty_in(memory_format(args.x, args.weight), args.x, n, args.weight.shape[1], 2 * h, 2 * w)


def _backward(args: UpGradArgs, choice: dispatch.Choice) -> tuple[Tensor | None, ...]:
    if choice.implementation == "triton":
        return _backward_triton(args)
    return convolution_grads(*args, stride=2, transposed=True)


def _backward_triton(args: UpGradArgs) -> tuple[Tensor | None, ...]:
    from fastunet.kernels import conv_transpose2x2 as kernels
    from fastunet.kernels.pixel_weight_grad import pixel_weight_grad

    grad, x, weight, output_mask = args
    tf32 = dispatch.tf32_allowed()
    grad_x = grad_weight = grad_bias = None
    if output_mask[0]:
        packed = kernel_weight(weight, x, training=True)
        grad_x = strided_like(kernels.conv_transpose2x2_input_grad(grad, packed, allow_tf32=tf32), x)
    if output_mask[1] or output_mask[2]:
        grad_weight, grad_bias = pixel_weight_grad(grad, x, with_bias=output_mask[2], allow_tf32=tf32)
        grad_weight = strided_like(grad_weight, weight) if output_mask[1] else None
    return grad_x, grad_weight, grad_bias


class ConvTranspose2x2(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, needs_backward: bool) -> Tensor:
        recompute.save(ctx, x, weight)
        return _op.below_autograd(x, weight, bias, True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output_mask = list(ctx.needs_input_grad[:3])
        grads = _backward_op(grad, *recompute.saved(ctx, reads_values=output_mask[1]), output_mask)
        return *(g if needed else None for g, needed in zip(grads, output_mask, strict=True)), None


_op = define(
    NAME,
    UpArgs,
    1,
    implementation=_forward,
    fake=_forward_fake,
    composition=lambda args: reference.conv_transpose2x2(*args[:3]),
    autograd=ConvTranspose2x2,
    is_torchs=lambda args: True,
)
_backward_op = define_backward(_op, UpGradArgs, ("x", "weight", "bias"), implementation=_backward)
define_autocast(_op, cast=("x",), parameters=lambda args: ("weight", "bias"))
