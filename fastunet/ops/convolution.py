"""What ops with a convolution share: checks, shapes, gradients, and the convolution without our kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet import checks, dispatch
from fastunet.ops import winograd
from fastunet.ops.registration import empty_in, memory_format, none_like, strided_like, suggests_channels_last
from fastunet.prepared import prepared

CONV3X3 = "conv3x3_bias_relu"


def check_inputs(name: str, x: Tensor, up: Tensor | None, weight: Tensor, pool: bool) -> None:
    """The checks shared by every op that begins with a 3x3 convolution of x, or of x and up joined."""
    checks.check_activation(name, x=x)
    if up is not None:
        checks.check_same_images(name, x, up)
    checks.check_convolution(name, weight, x.shape[1] + (up.shape[1] if up is not None else 0), 3)
    checks.check_together(name, x, weight=weight)
    if pool:
        checks.check_pooled(name, *x.shape[2:])


def kernel_weight(weight: Tensor, x: Tensor, *, training: bool) -> Tensor:
    """weight as the kernels read it in vectors, channels_last like x; in inference the copy is kept."""
    if not suggests_channels_last(x) or weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    if training:
        return weight.contiguous(memory_format=torch.channels_last)

    def make() -> Tensor:
        packed = weight.detach().contiguous(memory_format=torch.channels_last)
        if packed.is_cuda:  # The next call may be on another stream.
            torch.cuda.current_stream(packed.device).synchronize()
        return packed

    return prepared("channels_last", [weight], make)


def convolve(
    x: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None = None, *, training: bool = False
) -> Tensor:
    """conv2d([x, up], weight, bias, padding=1) without our kernels, in x's dtype: a compiled graph may have left the
    casts of autocast to an implementation that does not run.
    """
    if dispatch.choose(CONV3X3, x, weight, training=training).implementation == "winograd":
        return winograd.convolve(*_by_input(x, up, weight), bias, winograd.side_of_tiles(x, weight))
    joined = x if up is None else torch.cat([x, up], dim=1)
    return F.conv2d(joined, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), padding=1)


def conv_backward(
    grad: Tensor, x: Tensor, up: Tensor | None, weight: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, up, weight and bias from that of conv2d([x, up], weight, bias), without our kernels; mask says
    which are wanted.
    """
    if dispatch.choose(CONV3X3, x, weight, training=True).implementation == "winograd":
        return _conv_backward_winograd(grad, x, up, weight, mask)
    wants_x, wants_up, wants_weight, wants_bias = mask
    if up is None:
        grad_x, grad_weight, grad_bias = convolution_grads(
            grad, x, weight, [wants_x, wants_weight, wants_bias], padding=1
        )
        return grad_x, none_like(x), grad_weight, grad_bias
    # Each input with its share of the weight: nothing is joined, and no gradient is copied out of a joint one.
    _, (share_x, share_up) = _by_input(x, up, weight)
    grad_x, grad_share_x, grad_bias = convolution_grads(
        grad, x, share_x, [wants_x, wants_weight, wants_bias], padding=1
    )
    grad_up, grad_share_up, _ = convolution_grads(grad, up, share_up, [wants_up, wants_weight, False], padding=1)
    if not wants_weight:
        return grad_x, grad_up, none_like(x), grad_bias
    return grad_x, grad_up, strided_like(torch.cat([grad_share_x, grad_share_up], dim=1), weight), grad_bias


def conv_backward_triton(
    grad: Tensor,
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    mask: list[bool],
    input_slope: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """conv_backward by our kernels; input_slope as in _forward."""
    from fastunet.kernels import conv3x3_grad as kernels

    tf32 = dispatch.tf32_allowed()
    split = x.shape[1]
    results = [none_like(x)] * 4
    packed = kernel_weight(weight, x, training=True) if mask[0] or mask[1] else weight
    if mask[0] and up is not None and mask[1]:
        grad_x, grad_up = kernels.conv3x3_two_input_grads(grad, packed, split, allow_tf32=tf32)
        results[0], results[1] = strided_like(grad_x, x), strided_like(grad_up, up)
    elif mask[0]:
        activated = {} if input_slope is None else {"x": x, "negative_slope": input_slope}
        grad_x = kernels.conv3x3_input_grad(grad, packed[:, :split], allow_tf32=tf32, **activated)
        results[0] = strided_like(grad_x, x)
    elif up is not None and mask[1]:
        results[1] = strided_like(kernels.conv3x3_input_grad(grad, packed[:, split:], allow_tf32=tf32), up)
    if mask[2] or mask[3]:
        parts = [kernels.conv3x3_weight_grad(grad, x, with_bias=mask[3], allow_tf32=tf32)]
        if up is not None and mask[2]:
            parts.append(kernels.conv3x3_weight_grad(grad, up, allow_tf32=tf32))
        if mask[2]:
            grad_weight = parts[0][0] if len(parts) == 1 else torch.cat([part[0] for part in parts], dim=1)
            results[2] = strided_like(grad_weight, weight)
        if parts[0][1] is not None:
            results[3] = parts[0][1]
    return results[0], results[1], results[2], results[3]


def _conv_backward_winograd(
    grad: Tensor, x: Tensor, up: Tensor | None, weight: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, shares = _by_input(x, up, weight)
    side = winograd.side_of_tiles(x, weight)
    grads, share_grads = winograd.gradients(grad, inputs, shares, side, mask[: len(inputs)], mask[2])
    results = [none_like(x)] * 4
    for i, (result, t) in enumerate(zip(grads, inputs, strict=True)):
        if result is not None:
            results[i] = strided_like(result, t)
    if mask[2]:
        results[2] = strided_like(torch.cat([g for g in share_grads if g is not None], dim=1), weight)
    if mask[3]:
        results[3] = grad.sum((0, 2, 3))
    return results[0], results[1], results[2], results[3]


def _by_input(x: Tensor, up: Tensor | None, weight: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs, and each one's share of the weight."""
    if up is None:
        return [x], [weight]
    return [x, up], [weight[:, : x.shape[1]], weight[:, x.shape[1] :]]


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
    if mask[1] and padding == 1 and dispatch.aten_is_slow(x, weight):
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


def conv_fake(x: Tensor, up: Tensor | None, weight: Tensor, pool: bool) -> tuple[Tensor, Tensor]:
    """Shapes and strides of (y, pooled)."""
    format = memory_format(x, up, weight)
    (n, _, h, w), channels = x.shape, weight.shape[0]
    y = empty_in(format, x, n, channels, h, w)
    return y, empty_in(format, x, n, channels, h // 2, w // 2) if pool else none_like(x)


def conv_backward_fake(
    x: Tensor, up: Tensor | None, weight: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and strides of the four gradients: those of what they are gradients of."""
    grad_x, grad_weight, grad_bias = convolution_grads_fake(x, weight, [mask[0], *mask[2:]])
    return grad_x, torch.empty_like(up) if mask[1] and up is not None else none_like(x), grad_weight, grad_bias
