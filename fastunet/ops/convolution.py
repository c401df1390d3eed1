"""The gradient of a convolution by ATen, for every op that holds one."""

from __future__ import annotations

import torch
from torch import Tensor

from fastunet.ops.registration import none_like, strided_like


def convolution_grads(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: list[bool],
    *,
    stride: int = 1,
    padding: int = 0,
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, those that mask asks for, with the strides of what they are gradients of."""
    out_channels = weight.shape[1 if transposed else 0]
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        [out_channels] if mask[2] else None,
        [stride, stride],
        [padding, padding],
        [1, 1],
        transposed,
        [0, 0],
        1,
        mask,
    )
    return (
        strided_like(grad_x, x) if mask[0] else none_like(x),
        strided_like(grad_weight, weight) if mask[1] else none_like(x),
        grad_bias if mask[2] else none_like(x),
    )


def convolution_grads_fake(
    x: Tensor, weight: Tensor, mask: list[bool], *, transposed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and strides of convolution_grads."""
    return (
        torch.empty_like(x) if mask[0] else none_like(x),
        torch.empty_like(weight) if mask[1] else none_like(x),
        weight.new_empty(weight.shape[1 if transposed else 0]) if mask[2] else none_like(x),
    )
