"""conv3x3_instance_norm_relu, its pool form and its concat form: one registered op,
fastunet::conv3x3_instance_norm_relu.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastunet import checks, dispatch
from fastunet.ops import onednn, recompute
from fastunet.ops.conv3x3_batch_norm_relu import check_norm, check_pair, norm_grads_fake, statistics_dtype
from fastunet.ops.convolution import check_inputs, conv_backward, conv_backward_fake, conv_fake, convolve, kernel_weight
from fastunet.ops.epilogue import activate_, arguments_of, epilogue_grad, slope_of
from fastunet.ops.norm import backward_triton, forward_triton, in_format_of, runs_on_triton
from fastunet.ops.registration import below_autograd, define, define_autocast, invoke, memory_format, none_like
from fastunet.reference import functional as reference

NAME = "conv3x3_instance_norm_relu"
aten = torch.ops.aten


def conv3x3_instance_norm_relu(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    eps: float = 1e-5,
    relu: bool = True,
    negative_slope: float = 0.0,
) -> Tensor:
    """relu(instance_norm(conv2d(x, weight, padding=1), weight=gamma, bias=beta, eps=eps)).

    Each image and channel is normalised by its own mean and biased variance (Ulyanov et al. 2016), in training and
    inference alike; a channels_last input stays so, which torch's instance norm does not do. gamma and beta [Cout],
    both or neither, in x's dtype or float32; the rest as conv3x3_bias_relu.
    Raises ValueError, as torch does, on images of one pixel.
    """
    y, _ = _call(NAME, x, None, weight, gamma, beta, eps, relu, negative_slope, pool=False)
    return y


def conv3x3_instance_norm_relu_pool(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    eps: float = 1e-5,
    relu: bool = True,
    negative_slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(y, F.max_pool2d(y, 2)) of y = conv3x3_instance_norm_relu(x, ...); H and W >= 2."""
    name = "conv3x3_instance_norm_relu_pool"
    return _call(name, x, None, weight, gamma, beta, eps, relu, negative_slope, pool=True)


def concat_conv3x3_instance_norm_relu(
    skip: Tensor,
    up: Tensor,
    weight: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    eps: float = 1e-5,
    relu: bool = True,
    negative_slope: float = 0.0,
) -> Tensor:
    """conv3x3_instance_norm_relu(torch.cat([skip, up], 1), ...): skip [N, C1, H, W], up [N, C2, H, W]."""
    name = "concat_conv3x3_instance_norm_relu"
    y, _ = _call(name, skip, up, weight, gamma, beta, eps, relu, negative_slope, pool=False)
    return y


def _call(
    name: str,
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    relu: bool,
    negative_slope: float,
    pool: bool,
) -> tuple[Tensor, Tensor]:
    check_inputs(name, x, up, weight, pool)
    check_norm(name, x, weight, gamma=gamma, beta=beta)
    check_pair(name, gamma=gamma, beta=beta)
    if x.shape[2] * x.shape[3] == 1:
        raise checks.ShapeError(f"{name}: expected more than 1 pixel per image, got input {list(x.shape)}")
    slope = slope_of(relu, negative_slope)
    y, pooled, raw, mean, invstd = invoke(_op, x, up, weight, gamma, beta, eps, slope, pool, False)
    recompute.remember(y, raw, mean, invstd, gamma, beta, slope)
    return y, pooled


# --- forward ---


def _forward(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    slope: float | None,
    pool: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, pooled, raw, mean, invstd): raw is the convolution's output (empty unless keep), mean and invstd [N, Cout]
    its statistics.
    """
    if runs_on_triton(NAME, x, weight, training=keep):
        packed = kernel_weight(weight, x, training=keep)
        return _forward_triton(x, up, packed, gamma, beta, eps, slope, pool, keep)
    format = memory_format(x, up, weight)
    if dispatch.choose(NAME, x, weight, training=keep).implementation == "onednn":
        raw = onednn.conv3x3(x, up, weight, None, None, None)
    else:
        raw = convolve(x, up, weight, training=keep)
    raw = raw.contiguous(memory_format=format)
    n, channels, h, w = raw.shape
    # A group norm whose groups are single channels; unlike torch's instance norm it leaves channels_last as it is.
    y, mean, invstd = aten.native_group_norm(_in_dtype_of(raw, gamma), gamma, beta, n, channels, h * w, channels, eps)
    y = activate_(y.to(raw.dtype).contiguous(memory_format=format), slope)
    pooled = F.max_pool2d(y, 2).contiguous(memory_format=format) if pool else none_like(x)
    dtype = statistics_dtype(gamma, raw)
    return y, pooled, raw if keep else none_like(x), mean.to(dtype), invstd.to(dtype)


def _forward_triton(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    slope: float | None,
    pool: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As _forward."""
    y, pooled, raw, mean, invstd = forward_triton(x, up, weight, gamma, beta, slope, pool, groups=x.shape[0], eps=eps)
    return *in_format_of((x, up, weight), y, pooled, raw if keep else None), mean, invstd


def _in_dtype_of(t: Tensor, parameter: Tensor | None) -> Tensor:
    """Half-precision activations under float32 parameters are normalised in float32: CUDA's kernel takes no mixture."""
    return t if parameter is None else t.to(parameter.dtype)


def _forward_fake(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    slope: float | None,
    pool: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, pooled = conv_fake(x, up, weight, pool)
    statistics = [x.new_empty(x.shape[0], weight.shape[0], dtype=statistics_dtype(gamma, x)) for _ in range(2)]
    return y, pooled, torch.empty_like(y) if keep else none_like(x), statistics[0], statistics[1]


def _composition(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    slope: float | None,
    pool: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    joined = x if up is None else torch.cat([x, up], dim=1)
    y = reference.conv3x3_instance_norm_relu(joined, weight, gamma, beta, eps=eps, **arguments_of(slope))
    none = none_like(x)
    return y, reference.max_pool2x2(y) if pool else none, none, none, none


# --- backward ---


def _backward(
    grad_y: Tensor | None,
    grad_pooled: Tensor | None,
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    raw: Tensor,
    mean: Tensor,
    invstd: Tensor,
    y: Tensor | None,
    slope: float | None,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, up, weight, gamma, beta."""
    if runs_on_triton(NAME, x, weight, training=True):
        return backward_triton(
            *(grad_y, grad_pooled, x, up, weight, gamma, beta, raw, (mean, invstd), slope, mask), statistics_given=False
        )
    if y is None and (slope is not None or grad_pooled is not None):  # Our kernels ran forward and did not keep it.
        normal = (raw - mean[:, :, None, None]) * invstd[:, :, None, None]
        if gamma is not None and beta is not None:
            normal = normal * gamma[:, None, None] + beta[:, None, None]
        y = activate_(normal.to(raw.dtype).contiguous(memory_format=memory_format(raw)), slope)
    grad = _in_dtype_of(epilogue_grad(grad_y, grad_pooled, y, slope), gamma)
    values = _in_dtype_of(raw, gamma)
    n, channels, h, w = raw.shape
    # All three are asked for always: ATen's CPU kernel for channels_last crashes on some of the partial masks.
    affine = gamma is not None
    grad_raw, grad_gamma, grad_beta = aten.native_group_norm_backward(
        grad.contiguous(memory_format=memory_format(raw)),
        values,
        mean.to(values.dtype),
        invstd.to(values.dtype),
        gamma,
        n,
        channels,
        h * w,
        channels,
        [True, affine, affine],
    )
    grads = [none_like(x)] * 3
    if any(mask[:3]):
        *grads, _ = conv_backward(grad_raw.to(raw.dtype), x, up, weight, [*mask[:3], False])
    return (
        grads[0],
        grads[1],
        grads[2],
        grad_gamma if mask[3] else none_like(x),
        grad_beta if mask[4] else none_like(x),
    )


def _backward_fake(
    grad_y: Tensor | None,
    grad_pooled: Tensor | None,
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    raw: Tensor,
    mean: Tensor,
    invstd: Tensor,
    y: Tensor | None,
    slope: float | None,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_up, grad_weight, _ = conv_backward_fake(x, up, weight, [*mask[:3], False])
    return grad_x, grad_up, grad_weight, *norm_grads_fake(x, gamma, mask)


# --- registration ---


class Conv3x3InstanceNormRelu(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        x, up, weight, gamma, beta, _, slope, pool, _ = args
        y, pooled, raw, mean, invstd = below_autograd(_op, *args[:-1], True)
        # Our kernels find y again from raw, in registers.
        ctx.is_recomputable = runs_on_triton(NAME, x, weight, training=True)
        kept = y if (pool or slope is not None) and not ctx.is_recomputable else None
        recompute.save(ctx, x, up, weight, gamma, beta, raw, mean, invstd, kept)
        ctx.slope, ctx.pool = slope, pool
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(raw, mean, invstd, *(() if pool else (pooled,)))
        return y, pooled, raw, mean, invstd

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_pooled: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_y is None and grad_pooled is None:
            return (None,) * 9
        mask = list(ctx.needs_input_grad[:5])
        saved = recompute.saved(ctx, reads_values=mask[2])
        grads = _backward_op(grad_y, grad_pooled if ctx.pool else None, *saved, ctx.slope, mask)
        return *(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)), *(None,) * 4


_op = define(
    f"{NAME}(Tensor x, Tensor? up, Tensor weight, Tensor? gamma, Tensor? beta, float eps, float? slope, bool pool, "
    "bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementation=_forward,
    fake=_forward_fake,
    composition=_composition,
    autograd=Conv3x3InstanceNormRelu,
    weight=lambda *args: (args[2], args[-1]),
)
_backward_op = define(
    f"{NAME}_backward(Tensor? grad_y, Tensor? grad_pooled, Tensor x, Tensor? up, Tensor weight, Tensor? gamma, "
    "Tensor? beta, Tensor raw, Tensor mean, Tensor invstd, Tensor? y, float? slope, bool[] mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementation=_backward,
    fake=_backward_fake,
)
define_autocast(_op, cast=(0, 1), parameters=(2,))
