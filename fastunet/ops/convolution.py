"""What ops with a convolution share: checks, and the gradients of ATen's convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet import checks, dispatch
from fastunet.cpu.weight_cache import prepared
from fastunet.ops.registration import strided_like, suggests_channels_last


def check_inputs(name: str, x: Tensor, up: Tensor | None, weight: Tensor) -> None:
    """Raise for what no op can take that begins with a 3x3 convolution of x, or of x and up concatenated."""
    # As almost always, and then there is nothing to explain.
    is_right = weight.shape[1:] == (*x.shape[1:2], 3, 3) and weight.dtype == x.dtype and weight.device == x.device
    if up is None and x.dim() == 4 and is_right and x.is_floating_point():
        return
    checks.check_activation(name, x=x)
    if up is not None:
        checks.check_same_images(name, x, up)
    checks.check_convolution(name, weight, x.shape[1] + (up.shape[1] if up is not None else 0), 3)
    checks.check_together(name, x, weight=weight)


def check_eps(name: str, eps: float, *, training: bool = False) -> None:
    """Raise ConfigError for an eps that torch's batch norm refuses: it keeps the divisor from zero."""
    if eps < 0 or (training and eps == 0):
        expected = "a positive number when training" if training else "a number >= 0"
        raise checks.ConfigError(f"{name}: eps: expected {expected}, got {eps}")


def check_pair(name: str, **pair: Tensor | None) -> None:
    """Raise ConfigError where one of two parameters is given and the other is not."""
    given = [key for key, t in pair.items() if t is not None]
    if len(given) == 1:
        raise checks.ConfigError(f"{name}: expected both {' and '.join(pair)}, or neither, got only {given[0]}")


def check_norm(name: str, x: Tensor, weight: Tensor, **parameters: Tensor | None) -> None:
    """Raise for per-channel parameters other than [Cout] on x's device, in x's dtype or, as mixed precision keeps them,
    float32.
    """
    expected, dtype, device = weight.shape[:1], x.dtype, x.device
    for key, t in parameters.items():
        if t is None or (t.shape == expected and t.device == device and t.dtype in (dtype, torch.float32)):
            continue
        checks.check_shape(name, key, t, expected)
        if t.dtype in (dtype, torch.float32):
            checks.check_device(name, x, **{key: t})
        else:
            checks.check_together(name, x, **{key: t})


def kernel_weight(weight: Tensor, x: Tensor, *, training: bool) -> Tensor:
    """Return weight as the kernels read it in vectors, channels_last like x; in inference the copy is kept."""
    if not suggests_channels_last(x) or weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    if training:
        return weight.contiguous(memory_format=torch.channels_last)

    return prepared("channels_last", [weight], lambda: weight.detach().contiguous(memory_format=torch.channels_last))


def convolution_grads(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    output_mask: list[bool],
    *,
    stride: int = 1,
    padding: int = 0,
    transposed: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return gradients of x, weight and bias, those that output_mask asks for, each with the strides of its tensor."""
    if output_mask[1] and padding == 1 and dispatch.aten_is_slow(x, weight, stride):
        others = [output_mask[0], False, output_mask[2]]
        grad_x, _, grad_bias = convolution_grads(grad, x, weight, others, stride=stride, padding=padding)
        return grad_x, strided_like(_weight_grad_by_matmul(grad, x, stride), weight), grad_bias
    bias_sizes = [weight.shape[1 if transposed else 0]] if output_mask[2] else None
    geometry = ([stride] * 2, [padding] * 2, [1, 1], transposed, [0, 0], 1)
    grads = torch.ops.aten.convolution_backward(grad, x, weight, bias_sizes, *geometry, output_mask)
    grad_x, grad_weight, grad_bias = grads
    return (
        strided_like(grad_x, x) if output_mask[0] else None,
        strided_like(grad_weight, weight) if output_mask[1] else None,
        grad_bias if output_mask[2] else None,
    )


def _weight_grad_by_matmul(grad: Tensor, x: Tensor, stride: int) -> Tensor:
    """Of conv2d(x, weight, stride=stride, padding=1) with a 3x3 kernel: grad^T [Cout, N H W] times the windows of x
    [N H W, 9 Cin].
    """
    windows = F.pad(x, [1, 1, 1, 1]).unfold(2, 3, stride).unfold(3, 3, stride).permute(0, 2, 3, 4, 5, 1)
    pixels = grad.shape[0] * grad.shape[2] * grad.shape[3]
    rows = grad.permute(1, 0, 2, 3).reshape(-1, pixels)
    return (rows @ windows.reshape(pixels, -1)).view(-1, 3, 3, x.shape[1]).permute(0, 3, 1, 2)
