"""max_pool2x2."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastunet import checks, dispatch
from fastunet.ops.epilogue import epilogue_grad
from fastunet.ops.registration import below_autograd, define, empty_in, invoke, memory_format, strided_like
from fastunet.reference import functional as reference

NAME = "max_pool2x2"


def max_pool2x2(x: Tensor) -> Tensor:
    """The maximum of each 2x2 window: [N, C, H, W] to [N, C, H // 2, W // 2], H and W >= 2.

    Equal to `F.max_pool2d(x, 2)`: an odd last row or column is dropped, NaN wins, and of equal values the first gets
    the gradient. The winners are found again in backward instead of kept as int64.
    """
    checks.check_activation(NAME, x=x)
    checks.check_pooled(NAME, *x.shape[2:])
    return invoke(_op, x)


def _forward(x: Tensor) -> Tensor:
    y = _forward_triton(x) if dispatch.choose(NAME, x).implementation == "triton" else F.max_pool2d(x, 2)
    return y.contiguous(memory_format=memory_format(x))


def _forward_triton(x: Tensor) -> Tensor:
    from fastunet.kernels import max_pool2x2 as kernels

    return kernels.max_pool2x2(x)


def _forward_fake(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return empty_in(memory_format(x), x, n, c, h // 2, w // 2)


def _backward(grad: Tensor, x: Tensor) -> Tensor:
    triton = dispatch.choose(NAME, x, training=True).implementation == "triton"
    return strided_like(_backward_triton(grad, x) if triton else epilogue_grad(None, grad, x, None), x)


def _backward_triton(grad: Tensor, x: Tensor) -> Tensor:
    from fastunet.kernels.activation_grad import activation_grad

    return activation_grad(x, None, grad, None)


def _backward_fake(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


class MaxPool2x2(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return below_autograd(_op, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _backward_op(grad, *ctx.saved_tensors)


_op = define(
    f"{NAME}(Tensor x) -> Tensor",
    implementation=_forward,
    fake=_forward_fake,
    composition=reference.max_pool2x2,
    autograd=MaxPool2x2,
    is_torchs=True,
)
_backward_op = define(
    f"{NAME}_backward(Tensor grad, Tensor x) -> Tensor", implementation=_backward, fake=_backward_fake
)
