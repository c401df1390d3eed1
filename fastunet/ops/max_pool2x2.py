"""max_pool2x2."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastunet import checks, dispatch
from fastunet.cpu import pooling
from fastunet.ops.epilogue import epilogue_grad
from fastunet.ops.registration import define, empty_in, memory_format, strided_like
from fastunet.reference import functional as reference

NAME = "max_pool2x2"


class PoolArgs(NamedTuple):
    x: Tensor  # [N, C, H, W]

    def choice(self, *, training: bool = False) -> dispatch.Choice:
        return dispatch.choose(NAME, self.x, training=training)


class PoolGradArgs(NamedTuple):
    grad: Tensor
    x: Tensor

    def choice(self) -> dispatch.Choice:
        return dispatch.choose(NAME, self.x, training=True)


def max_pool2x2(x: Tensor) -> Tensor:
    """Take the maximum of each 2x2 window: [N, C, H, W] to [N, C, H // 2, W // 2], H and W >= 2.

    Equal to `F.max_pool2d(x, 2)`: an odd last row or column is dropped, NaN wins, and of equal values the first gets
    the gradient. Backward recomputes the indices of the maxima instead of keeping them as int64.
    """
    checks.check_activation(NAME, x=x)
    checks.check_pooled(NAME, *x.shape[2:])
    return _op.invoke(PoolArgs(x))


def _forward(args: PoolArgs, choice: dispatch.Choice) -> Tensor:
    if choice.implementation == "triton":
        from fastunet.kernels import max_pool2x2 as kernels

        y = kernels.max_pool2x2(args.x)
    else:
        y = pooling.max_pool2x2(args.x)
    return y.contiguous(memory_format=memory_format(args.x))


def _forward_fake(args: PoolArgs) -> Tensor:
    n, c, h, w = args.x.shape
    return empty_in(memory_format(args.x), args.x, n, c, h // 2, w // 2)


def _backward(args: PoolGradArgs, choice: dispatch.Choice) -> Tensor:
    if choice.implementation == "triton":
        from fastunet.kernels.norm_grad import activation_grad

        grad = activation_grad(args.x, None, args.grad, None)
    else:
        grad = epilogue_grad(None, args.grad, args.x, None)
    return strided_like(grad, args.x)


class MaxPool2x2(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _op.below_autograd(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _backward_op(grad, *ctx.saved_tensors)


_op = define(
    NAME,
    PoolArgs,
    1,
    implementation=_forward,
    fake=_forward_fake,
    composition=lambda args: reference.max_pool2x2(args.x),
    autograd=MaxPool2x2,
    is_torchs=lambda args: True,
)
_backward_op = define(
    f"{NAME}_backward", PoolGradArgs, 1, implementation=_backward, fake=lambda args: torch.empty_like(args.x)
)
