"""interpolate: torch's upsampling as one op, for compiled graphs.

Inductor takes the gradient of an upsampling apart into a scatter of additions, which on a CPU costs it several times
what ATen's own kernel takes. An op of its own stays whole.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastunet.dispatch import Choice
from fastunet.ops.registration import define, empty_in, memory_format

NAME = "interpolate"
MODES = ("nearest", "bilinear")


class InterpolateArgs(NamedTuple):
    """F.interpolate(x, (height, width), mode=mode, align_corners=align_corners), of "nearest" None."""

    x: Tensor  # [N, C, H, W]
    height: int
    width: int
    mode: str
    align_corners: bool

    def choice(self, *, training: bool = False) -> Choice:
        return Choice("aten", "there are no kernels for upsampling by interpolation")


class InterpolateGradArgs(NamedTuple):
    grad: Tensor
    height: int  # with width, x's
    width: int
    mode: str
    align_corners: bool

    def choice(self) -> Choice:
        return Choice("aten", "there are no kernels for upsampling by interpolation")


def _composition(args: InterpolateArgs) -> Tensor:
    x, height, width, mode, align_corners = args
    return F.interpolate(x, (height, width), mode=mode, align_corners=None if mode == "nearest" else align_corners)


def _forward(args: InterpolateArgs, choice: Choice) -> Tensor:
    return _composition(args).contiguous(memory_format=memory_format(args.x))


def _forward_fake(args: InterpolateArgs) -> Tensor:
    return empty_in(memory_format(args.x), args.x, *args.x.shape[:2], args.height, args.width)


def _backward(args: InterpolateGradArgs, choice: Choice) -> Tensor:
    grad, height, width, mode, align_corners = args
    sizes = [*grad.shape[2:]], [*grad.shape[:2], height, width]
    if mode == "nearest":
        result = torch.ops.aten.upsample_nearest2d_backward(grad, *sizes)
    else:
        result = torch.ops.aten.upsample_bilinear2d_backward(grad, *sizes, align_corners)
    return result.contiguous(memory_format=memory_format(grad))


def _backward_fake(args: InterpolateGradArgs) -> Tensor:
    return empty_in(memory_format(args.grad), args.grad, *args.grad.shape[:2], args.height, args.width)


class Interpolate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *how: Any) -> Tensor:
        ctx.sizes, ctx.how = x.shape[2:], how[2:]
        return _op.below_autograd(x, *how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward_op(grad, *ctx.sizes, *ctx.how), None, None, None, None


_op = define(
    NAME,
    InterpolateArgs,
    1,
    implementation=_forward,
    fake=_forward_fake,
    composition=_composition,
    autograd=Interpolate,
    is_torchs=lambda args: True,
)
_backward_op = define(f"{NAME}_backward", InterpolateGradArgs, 1, implementation=_backward, fake=_backward_fake)
