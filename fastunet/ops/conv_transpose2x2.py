"""conv_transpose2x2."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastunet import checks, dispatch
from fastunet.ops import onednn, recompute
from fastunet.ops.convolution import convolution_grads, convolution_grads_fake, kernel_weight
from fastunet.ops.registration import (
    below_autograd,
    define,
    define_autocast,
    empty_in,
    invoke,
    memory_format,
    none_like,
    strided_like,
)
from fastunet.reference import functional as reference

NAME = "conv_transpose2x2"


def conv_transpose2x2(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Upsample by 2: x [N, Cin, H, W], weight [Cin, Cout, 2, 2], bias [Cout] or None to [N, Cout, 2H, 2W].

    Equal to `F.conv_transpose2d(x, weight, bias, stride=2)`.
    """
    checks.check_activation(NAME, x=x)
    out_channels = checks.check_convolution(NAME, weight, x.shape[1], 2, transposed=True)
    checks.check_shape(NAME, "bias", bias, (out_channels,))
    checks.check_together(NAME, x, weight=weight, bias=bias)
    return invoke(_op, x, weight, bias, False)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
    """keep: there will be a backward."""
    implementation = dispatch.choose(NAME, x, weight, training=keep).implementation
    if implementation == "triton":
        y = _forward_triton(x, kernel_weight(weight, x, training=keep), bias)
    elif implementation == "onednn":
        y = onednn.conv_transpose2x2(x, weight, bias)
    else:
        y = F.conv_transpose2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), stride=2)
    return y.contiguous(memory_format=memory_format(x, weight))


def _forward_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from fastunet.kernels import conv_transpose2x2 as kernels

    return kernels.conv_transpose2x2(x, weight, bias, allow_tf32=dispatch.tf32_allowed())


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
    n, _, h, w = x.shape
    return empty_in(memory_format(x, weight), x, n, weight.shape[1], 2 * h, 2 * w)


def _composition(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
    return reference.conv_transpose2x2(x, weight, bias)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias."""
    if dispatch.choose(NAME, x, weight, training=True).implementation == "triton":
        return _backward_triton(grad, x, weight, mask)
    return convolution_grads(grad, x, weight, mask, stride=2, transposed=True)


def _backward_triton(grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    from fastunet.kernels import conv_transpose2x2 as kernels

    tf32 = dispatch.tf32_allowed()
    grad_x = grad_weight = grad_bias = none_like(x)
    if mask[0]:
        packed = kernel_weight(weight, x, training=True)
        grad_x = strided_like(kernels.conv_transpose2x2_input_grad(grad, packed, allow_tf32=tf32), x)
    if mask[1] or mask[2]:
        sums = kernels.conv_transpose2x2_weight_grad(grad, x, with_bias=mask[2], allow_tf32=tf32)
        grad_weight = strided_like(sums[0], weight) if mask[1] else grad_weight
        grad_bias = grad_bias if sums[1] is None else sums[1]
    return grad_x, grad_weight, grad_bias


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    return convolution_grads_fake(x, weight, mask, transposed=True)


class ConvTranspose2x2(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
        recompute.save(ctx, x, weight)
        return below_autograd(_op, x, weight, bias, True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask = list(ctx.needs_input_grad[:3])
        grads = _backward_op(grad, *recompute.saved(ctx, reads_values=mask[1]), mask)
        return *(g if wanted else None for g, wanted in zip(grads, mask, strict=True)), None


_op = define(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, bool keep) -> Tensor",
    implementation=_forward,
    fake=_forward_fake,
    composition=_composition,
    autograd=ConvTranspose2x2,
    weight=lambda *args: (args[1], args[-1]),
    is_torchs=True,
)
_backward_op = define(
    f"{NAME}_backward(Tensor grad, Tensor x, Tensor weight, bool[] mask) -> (Tensor, Tensor, Tensor)",
    implementation=_backward,
    fake=_backward_fake,
)
define_autocast(_op, cast=(0,), parameters=(1, 2))
