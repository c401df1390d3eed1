"""The gradient of a convolution by ATen, for every op that holds one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    if mask[1] and padding == 1 and _prefers_matmul(x, weight):
        grad_x, _, grad_bias = convolution_grads(grad, x, weight, [mask[0], False, mask[2]], padding=padding)
        return grad_x, strided_like(_weight_grad_by_matmul(grad, x), weight), grad_bias
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


# Up to so many pixels in a batch, and from so many weights, oneDNN's weight gradient in bfloat16 takes up to eight
# times as long as the matrix product it stands for.
_FEW_PIXELS, _MANY_WEIGHTS = 512, 1 << 20


def _prefers_matmul(x: Tensor, weight: Tensor) -> bool:
    is_few = x.shape[0] * x.shape[2] * x.shape[3] <= _FEW_PIXELS
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and is_few and weight.numel() >= _MANY_WEIGHTS


def _weight_grad_by_matmul(grad: Tensor, x: Tensor) -> Tensor:
    """Of conv2d(x, weight, padding=1) with a 3x3 kernel: grad^T [Cout, N H W] times the windows of x [N H W, 9 Cin]."""
    windows = F.pad(x, [1, 1, 1, 1]).unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 4, 5, 1)
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    rows = grad.permute(1, 0, 2, 3).reshape(-1, pixels)
    return (rows @ windows.reshape(pixels, -1)).view(-1, 3, 3, x.shape[1]).permute(0, 3, 1, 2)


def convolution_grads_fake(
    x: Tensor, weight: Tensor, mask: list[bool], *, transposed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and strides of convolution_grads."""
    return (
        torch.empty_like(x) if mask[0] else none_like(x),
        torch.empty_like(weight) if mask[1] else none_like(x),
        weight.new_empty(weight.shape[1 if transposed else 0]) if mask[2] else none_like(x),
    )
