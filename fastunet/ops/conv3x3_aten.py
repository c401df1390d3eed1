"""conv3x3 without our kernels: ATen's convolutions and norms, Winograd's algorithm and oneDNN's prepared weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.cpu import onednn, winograd
from fastunet.cpu.onednn import activate_
from fastunet.cpu.pooling import max_pool2x2
from fastunet.ops.convolution import convolution_grads
from fastunet.ops.epilogue import epilogue_grad
from fastunet.ops.registration import memory_format, strided_like

if TYPE_CHECKING:
    from fastunet.ops.conv3x3 import ConvArgs, ConvGradArgs

aten = torch.ops.aten
# Values of an image from which a call for each costs less than it gains.
_LARGE = 1 << 14


def forward(args: ConvArgs, implementation: str) -> tuple[Tensor | None, ...]:
    """(y, pooled, raw, mean, invstd), the last three None unless a backward needs them."""
    x, up, weight, bias = args[:4]
    how = implementation, args.stride
    format = memory_format(x, up, weight)
    raw = mean = invstd = None
    if implementation == "onednn" and args.norm != "instance":
        norm = onednn.norm_of(args.running_mean, args.running_var, args.gamma, args.eps)
        y = onednn.conv3x3(x, up, weight, bias, norm, args.slope, args.stride)
    elif args.norm == "none":
        y = activate_(convolve(x, up, weight, bias, *how), args.slope)
    else:
        raw = convolve(x, up, weight, None, *how).contiguous(memory_format=format)
        y, mean, invstd = (_batch_norm if args.norm == "batch" else _instance_norm)(raw, args)
        y = activate_(y.contiguous(memory_format=format), args.slope)
    y = y.contiguous(memory_format=format)
    pooled = max_pool2x2(y).contiguous(memory_format=format) if args.pool else None
    return (y, pooled, raw, mean, invstd) if args.needs_backward else (y, pooled, None, None, None)


def _batch_norm(raw: Tensor, args: ConvArgs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    parameters = (args.gamma, args.bias, args.running_mean, args.running_var)
    if args.needs_backward and args.training:
        y, mean, invstd = aten.native_batch_norm(raw, *parameters, True, args.momentum, args.eps)
        dtype = statistics_dtype(args.gamma, raw)
        return y, mean.to(dtype), invstd.to(dtype)
    # On a GPU this is cuDNN's, which gives no statistics away.
    gamma, beta, mean, variance = parameters
    return F.batch_norm(raw, mean, variance, gamma, beta, args.training, args.momentum, args.eps), None, None


def _instance_norm(raw: Tensor, args: ConvArgs | ConvGradArgs) -> tuple[Tensor, Tensor, Tensor]:
    """A group norm whose groups are single channels; unlike torch's instance norm it leaves channels_last as it is."""
    n, channels, h, w = raw.shape
    values = _in_dtype_of(raw, args.gamma)
    y, mean, invstd = aten.native_group_norm(values, args.gamma, args.bias, n, channels, h * w, channels, args.eps)
    dtype = statistics_dtype(args.gamma, raw)
    return y.to(raw.dtype), mean.to(dtype), invstd.to(dtype)


def _in_dtype_of(t: Tensor, parameter: Tensor | None) -> Tensor:
    """Half-precision activations under float32 parameters are normalised in float32: CUDA's kernel takes no mixture."""
    return t if parameter is None else t.to(parameter.dtype)


def statistics_dtype(gamma: Tensor | None, raw: Tensor) -> torch.dtype:
    """Statistics are kept in float32, or float64 with float64 parameters, whatever the activations are."""
    return torch.promote_types((raw if gamma is None else gamma).dtype, torch.float32)


def convolve(
    x: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None, implementation: str, stride: int = 1
) -> Tensor:
    """conv2d([x, up], weight, bias, stride=stride, padding=1), by "onednn", "winograd" (of stride 1) or ATen, in x's
    dtype: a compiled graph may have left the casts of autocast to an implementation that does not run.
    """
    if implementation == "onednn":
        return onednn.conv3x3(x, up, weight, bias, None, None, stride)
    if implementation == "winograd":
        return winograd.convolve(*_by_input(x, up, weight), bias, winograd.side_of_tiles(x, weight))
    concatenated = x if up is None else torch.cat([x, up], dim=1)
    return F.conv2d(concatenated, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), stride, padding=1)


# --- backward ---


def backward(args: ConvGradArgs, implementation: str) -> tuple[Tensor | None, ...]:
    """Gradients of x, up, weight, bias and gamma."""
    y = args.y
    if args.norm != "none" and y is None and (args.slope is not None or args.grad_pooled is not None):
        y = activate_(_normalised(args), args.slope)  # Our kernels ran forward and did not keep it.
    grad = epilogue_grad(args.grad_y, args.grad_pooled, y, args.slope)
    *needs_inputs, needs_bias, needs_gamma = args.output_mask
    if args.norm == "none":
        grad_x, *grads = _conv_backward(grad, args, [*needs_inputs, needs_bias], implementation)
        if args.input_slope is not None and grad_x is not None:
            grad_x = strided_like(epilogue_grad(grad_x, None, args.x, args.input_slope), args.x)
        return grad_x, *grads, None
    of_norm = _batch_norm_backward if args.norm == "batch" else _instance_norm_backward
    grad_raw, grad_gamma, grad_beta = of_norm(grad, args)
    grads = [None] * 3
    if any(needs_inputs):
        *grads, _ = _conv_backward(grad_raw, args, [*needs_inputs, False], implementation)
    return *grads, grad_beta if needs_bias else None, grad_gamma if needs_gamma else None


def _normalised(args: ConvGradArgs) -> Tensor:
    """norm(raw) + bias."""
    assert args.raw is not None
    if args.norm == "instance":
        return _instance_norm(args.raw, args)[0]
    running = (None, None) if args.training else (args.running_mean, args.running_var)
    return F.batch_norm(args.raw, *running, args.gamma, args.bias, args.training, 0.0, args.eps)


def _batch_norm_backward(grad: Tensor, args: ConvGradArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of raw, gamma and beta."""
    raw, mean, invstd = args.raw, args.mean, args.invstd
    assert raw is not None
    if args.x.device.type == "cpu":
        # ATen's CPU kernel wants the statistics in the parameters' dtype; CUDA's in float32.
        parameter = args.gamma if args.gamma is not None else args.running_mean
        stored = raw.dtype if parameter is None else parameter.dtype
        mean, invstd = (None if t is None else t.to(stored) for t in (mean, invstd))
    *needs_inputs, needs_bias, needs_gamma = args.output_mask
    running = (args.running_mean, args.running_var)
    options = (args.training, args.eps, [any(needs_inputs), needs_gamma, needs_bias])
    return aten.native_batch_norm_backward(grad, raw, args.gamma, *running, mean, invstd, *options)


def _instance_norm_backward(grad: Tensor, args: ConvGradArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of raw, gamma and beta."""
    raw, mean, invstd, gamma = args.raw, args.mean, args.invstd, args.gamma
    assert raw is not None
    assert mean is not None
    assert invstd is not None
    values = _in_dtype_of(raw, gamma)
    format = memory_format(raw)
    grad = _in_dtype_of(grad, gamma).contiguous(memory_format=format)
    n, channels, h, w = raw.shape
    statistics = (mean.to(values.dtype), invstd.to(values.dtype))
    if raw.device.type == "cpu" and format == torch.channels_last and n and raw[0].numel() >= _LARGE:
        # The batch norm of each image alone: that of groups takes up to five times as long.
        images = zip(grad.split(1), values.split(1), *(t.view(n, channels) for t in statistics), strict=True)
        found = [
            aten.native_batch_norm_backward(g, v, gamma, None, None, m, s, True, args.eps, [True] * 3)
            for g, v, m, s in images
        ]
        grads, of_gamma, of_beta = zip(*found, strict=True)
        grad_raw = grads[0] if n == 1 else torch.cat(grads)  # Of one it would be a copy.
        return grad_raw.to(raw.dtype), torch.stack(of_gamma).sum(0), torch.stack(of_beta).sum(0)
    # All three are asked for always: ATen's CPU kernel for channels_last crashes on some of the partial masks.
    options = (n, channels, h * w, channels, [True, gamma is not None, gamma is not None])
    grad_raw, *of_affine = aten.native_group_norm_backward(grad, values, *statistics, gamma, *options)
    return grad_raw.to(raw.dtype), *of_affine


def _conv_backward(
    grad: Tensor, args: ConvGradArgs, output_mask: list[bool], implementation: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, up, weight and bias from that of conv2d([x, up], weight, bias); output_mask says which."""
    *needs_inputs, needs_weight, needs_bias = output_mask
    # Each input with its share of the weight: nothing is joined, and no gradient is copied out of a joint one.
    inputs, shares = _by_input(args.x, args.up, args.weight)
    if implementation == "winograd":
        side, needs_inputs = winograd.side_of_tiles(args.x, args.weight), needs_inputs[: len(inputs)]
        found, of_shares = winograd.gradients(grad, inputs, shares, side, needs_inputs, needs_weight)
        grads = [None if g is None else strided_like(g, t) for g, t in zip(found, inputs, strict=True)]
        grad_bias = grad.sum((0, 2, 3)) if needs_bias else None
    else:
        parts = [
            convolution_grads(
                *(grad, t, share, [needed, needs_weight, needs_bias and t is args.x]), stride=args.stride, padding=1
            )
            for t, share, needed in zip(inputs, shares, needs_inputs, strict=False)
        ]
        grads, of_shares, grad_bias = [part[0] for part in parts], [part[1] for part in parts], parts[0][2]
    weights = [g for g in of_shares if g is not None]
    grad_weight = None
    if weights:
        grad_weight = strided_like(weights[0] if len(weights) == 1 else torch.cat(weights, dim=1), args.weight)
    return grads[0], None if args.up is None else grads[1], grad_weight, grad_bias


def _by_input(x: Tensor, up: Tensor | None, weight: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs, and each one's share of the weight."""
    if up is None:
        return [x], [weight]
    return [x, up], [weight[:, : x.shape[1]], weight[:, x.shape[1] :]]
