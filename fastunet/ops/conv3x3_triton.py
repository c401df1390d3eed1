"""conv3x3 by our kernels. Importing this imports triton."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastunet import dispatch
from fastunet.kernels.conv3x3 import grad as conv3x3_grad
from fastunet.kernels.conv3x3 import pointer as kernels
from fastunet.kernels.norm import Affine, finish_statistics, normalise
from fastunet.kernels.norm_grad import activation_grad, norm_grad
from fastunet.ops.convolution import kernel_weight
from fastunet.ops.registration import memory_format, strided_like

if TYPE_CHECKING:
    from fastunet.ops.conv3x3 import ConvArgs, ConvGradArgs


def forward(args: ConvArgs) -> tuple[Tensor | None, ...]:
    """Return (y, pooled, raw, mean, invstd), the last three None unless a backward needs them."""
    x, up = args.x, args.up
    weight = kernel_weight(args.weight, x, training=args.needs_backward or args.training)
    raw = mean = invstd = None
    tf32 = dispatch.tf32_allowed()
    is_pass = args.norm == "instance" or args.training or (args.norm == "batch" and args.needs_backward)
    if not is_pass:
        norm = None
        if args.running_mean is not None and args.running_var is not None:
            norm = kernels.Normalisation(args.running_mean, args.running_var, args.gamma, args.eps)
        options = {"norm": norm, "negative_slope": args.slope, "pool": args.pool, "allow_tf32": tf32}
        y, pooled = kernels.conv3x3(x, weight, args.bias, up=up, stride=args.stride, **options)
    else:
        raw, statistics = _convolved(args, weight)
        y, pooled = normalise(raw, Affine(*statistics, args.gamma, args.bias), args.slope, pool=args.pool)
        if args.norm == "instance":
            mean, invstd = statistics
        elif args.training:
            mean, invstd = statistics[0][0], statistics[1][0]
    format = memory_format(x, up, args.weight)
    y, pooled, raw = (None if t is None else t.contiguous(memory_format=format) for t in (y, pooled, raw))
    return (y, pooled, raw, mean, invstd) if args.needs_backward else (y, pooled, None, None, None)


def _convolved(args: ConvArgs, weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the convolution's output, and mean and invstd to normalise it by, float32 [groups, Cout]; running ones
    move.
    """
    options: dict[str, Any] = {"up": args.up, "stride": args.stride, "allow_tf32": dispatch.tf32_allowed()}
    if args.norm == "batch" and not args.training:
        raw, _ = kernels.conv3x3(args.x, weight, **options)
        return raw, _running_statistics(args)
    raw, sums = kernels.conv3x3_with_statistics(args.x, weight, **options)
    if args.norm == "instance":
        return raw, finish_statistics(sums, args.x.shape[0], eps=args.eps)
    running = None if args.running_mean is None or args.running_var is None else (args.running_mean, args.running_var)
    return raw, finish_statistics(sums, 1, eps=args.eps, running=running, momentum=args.momentum)


def _running_statistics(args: ConvArgs | ConvGradArgs) -> tuple[Tensor, Tensor]:
    """Return mean and invstd [1, Cout] from running statistics."""
    assert args.running_mean is not None
    assert args.running_var is not None
    return args.running_mean.float()[None], (args.running_var.float()[None] + args.eps).rsqrt()


def backward(args: ConvGradArgs) -> tuple[Tensor | None, ...]:
    """Return gradients of x, up, weight, bias and gamma."""
    if args.norm != "none":
        return _norm_backward(args)
    if args.slope is None and args.grad_pooled is None:
        assert args.grad_y is not None, "a backward runs only when one of its outputs has a gradient"
        grad = args.grad_y
    else:
        assert args.y is not None
        grad = activation_grad(args.y, args.grad_y, args.grad_pooled, args.slope)
    return *_conv_backward(grad, args, args.output_mask[:4]), None


def _norm_backward(args: ConvGradArgs) -> tuple[Tensor | None, ...]:
    *needs_inputs, needs_bias, needs_gamma = args.output_mask
    raw, mean, invstd = args.raw, args.mean, args.invstd
    assert raw is not None
    statistics_given = args.norm == "batch" and not args.training
    if statistics_given:
        mean, invstd = _running_statistics(args)
    assert mean is not None
    assert invstd is not None
    affine = Affine(mean.view(-1, raw.shape[1]), invstd.view(-1, raw.shape[1]), args.gamma, args.bias)
    options = {"needs_raw": any(needs_inputs), "needs_affine": needs_bias or needs_gamma}
    grad_raw, grad_gamma, grad_beta = norm_grad(
        *(raw, args.grad_y, args.grad_pooled, affine, args.slope), statistics_given=statistics_given, **options
    )
    grads = (None,) * 3 if grad_raw is None else _conv_backward(grad_raw, args, [*needs_inputs, False])[:3]
    of_affine = (
        None if grad is None or parameter is None or not is_needed else grad.to(parameter.dtype)
        for grad, parameter, is_needed in (
            (grad_beta, args.bias, needs_bias),
            (grad_gamma, args.gamma, needs_gamma),
        )
    )
    return *grads, *of_affine


def _conv_backward(grad: Tensor, args: ConvGradArgs, output_mask: list[bool]) -> tuple[Tensor | None, ...]:
    """Return gradients of x, up, weight and bias from that of the convolution's output; output_mask says which."""
    x, up, weight = args.x, args.up, args.weight
    tf32 = dispatch.tf32_allowed()
    split = x.shape[1]
    grad_x = grad_up = grad_weight = grad_bias = None
    packed = kernel_weight(weight, x, training=True) if output_mask[0] or output_mask[1] else weight
    options: dict[str, Any] = {"stride": args.stride, "allow_tf32": tf32}
    assert args.stride == 1 or args.input_slope is None, "two convolutions in one call have stride 1"
    input_grads = partial(conv3x3_grad.conv3x3_input_grads, size=x.shape[2:], **options)
    if output_mask[0] and up is not None and output_mask[1]:
        grad_x, grad_up = input_grads(grad, packed, [split, up.shape[1]])
    elif output_mask[0]:
        of_x, activated = packed[:, :split], {}
        if args.input_slope is not None:
            activated = {"x": x, "negative_slope": args.input_slope}
        (grad_x,) = input_grads(grad, of_x, [split], **activated)
    elif up is not None and output_mask[1]:
        of_up = packed[:, split:]
        (grad_up,) = input_grads(grad, of_up, [up.shape[1]])
    if output_mask[2] or output_mask[3]:
        grad_weight, grad_bias = conv3x3_grad.conv3x3_weight_grad(grad, x, with_bias=output_mask[3], **options)
        if up is not None and output_mask[2]:
            of_up, _ = conv3x3_grad.conv3x3_weight_grad(grad, up, **options)
            grad_weight = torch.cat([grad_weight, of_up], dim=1)
    return (
        None if grad_x is None else strided_like(grad_x, x),
        None if grad_up is None or up is None else strided_like(grad_up, up),
        strided_like(grad_weight, weight) if output_mask[2] and grad_weight is not None else None,
        grad_bias,
    )
