"""conv3x3_bias_relu, its pool form and its concat form: one registered op, fastunet::conv3x3_bias_relu."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastunet import checks, dispatch
from fastunet.ops import onednn
from fastunet.ops.convolution import (
    check_inputs,
    conv_backward,
    conv_backward_fake,
    conv_backward_triton,
    conv_fake,
    convolve,
    kernel_weight,
)
from fastunet.ops.epilogue import activate_, arguments_of, epilogue_grad, slope_of
from fastunet.ops.registration import (
    below_autograd,
    define,
    define_autocast,
    invoke,
    memory_format,
    none_like,
    strided_like,
)
from fastunet.reference import functional as reference

NAME = "conv3x3_bias_relu"


def conv3x3_bias_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = True, negative_slope: float = 0.0
) -> Tensor:
    """relu(conv2d(x, weight, bias, padding=1)) in one pass.

    x [N, Cin, H, W], weight [Cout, Cin, 3, 3], bias [Cout] or None, all of one floating dtype and device; the result is
    [N, Cout, H, W] in that dtype, channels_last if x or weight is. relu=False leaves the activation out;
    negative_slope > 0 makes it LeakyReLU. Equal to `F.relu(F.conv2d(x, weight, bias, padding=1))`, NaN included.
    Raises ShapeError, DtypeError, DeviceError or ConfigError before any work.

    On the CPU, float32 of 128 channels and more runs by Winograd's algorithm where that is faster. Its rounding errors
    go by the largest values of a tile of 6x6 pixels, and a NaN or infinity makes all results of its tile NaN.
    """
    y, _ = _call(NAME, x, None, weight, bias, relu, negative_slope, pool=False)
    return y


def conv3x3_bias_relu_pool(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = True, negative_slope: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(y, F.max_pool2d(y, 2)) of y = conv3x3_bias_relu(x, ...): the skip and the next level's input, [N, Cout, H //
    2, W // 2].

    As conv3x3_bias_relu; H and W >= 2.
    """
    return _call("conv3x3_bias_relu_pool", x, None, weight, bias, relu, negative_slope, pool=True)


def concat_conv3x3_bias_relu(
    skip: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = True,
    negative_slope: float = 0.0,
) -> Tensor:
    """conv3x3_bias_relu(torch.cat([skip, up], 1), weight, bias); the kernels never write the concatenation.

    skip [N, C1, H, W], up [N, C2, H, W], weight [Cout, C1 + C2, 3, 3]; otherwise as conv3x3_bias_relu.
    """
    y, _ = _call("concat_conv3x3_bias_relu", skip, up, weight, bias, relu, negative_slope, pool=False)
    return y


def double_conv3x3_bias_relu(
    x: Tensor,
    up: Tensor | None,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    *,
    relu: bool = True,
    negative_slope: float = 0.0,
    pool: bool = False,
) -> Any:
    """conv3x3_bias_relu twice, first of x, or of [x, up] where up is given: y, or (y, pooled) with pool.

    As two calls; but in backward the first one's activation is undone where the second one's input gradient is
    computed, which saves a pass over memory.
    """
    name = "double_conv3x3_bias_relu"
    is_traced = torch.compiler.is_compiling()
    if not is_traced and dispatch.choose(NAME, x, weights[1], training=True).implementation != "triton":
        middle, _ = _call(name, x, up, weights[0], biases[0], relu, negative_slope, False)
        results = _call(name, middle, None, weights[1], biases[1], relu, negative_slope, pool)
        return results if pool else results[0]
    slope = slope_of(relu, negative_slope)
    _check(name, x, up, weights[0], biases[0], False)
    middle, _ = _op(x, up, weights[0], biases[0], slope, False, None, True, False)
    _check(name, middle, None, weights[1], biases[1], pool)
    results = _op(middle, None, weights[1], biases[1], slope, pool, slope, False, False)
    return results if pool else results[0]


def _call(
    name: str,
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool,
    negative_slope: float,
    pool: bool,
) -> tuple[Tensor, Tensor]:
    _check(name, x, up, weight, bias, pool)
    slope = slope_of(relu, negative_slope)
    return invoke(_op, x, up, weight, bias, slope, pool, None, False, False)


def _check(name: str, x: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None, pool: bool) -> None:
    check_inputs(name, x, up, weight, pool)
    checks.check_shape(name, "bias", bias, weight.shape[:1])
    checks.check_together(name, x, bias=bias)


# --- forward ---


def _forward(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    slope: float | None,
    pool: bool,
    input_slope: float | None,
    grad_is_ready: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """(y, pooled). The last three arguments concern the backward alone.

    input_slope: x is the output of an activation of this slope, which leaves its backward to this op.
    grad_is_ready: y's gradient comes from such an op, already carried through this one's activation.
    keep: there will be a backward.
    """
    implementation = dispatch.choose(NAME, x, weight, training=keep).implementation
    if implementation == "triton":
        y, pooled = _forward_triton(x, up, kernel_weight(weight, x, training=keep), bias, slope, pool)
    else:
        if implementation == "onednn":
            y = onednn.conv3x3(x, up, weight, bias, None, slope)
        else:
            y = activate_(convolve(x, up, weight, bias, training=keep), slope)
        pooled = F.max_pool2d(y, 2) if pool else None
    format = memory_format(x, up, weight)
    y = y.contiguous(memory_format=format)
    return y, none_like(x) if pooled is None else pooled.contiguous(memory_format=format)


def _forward_triton(
    x: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None, slope: float | None, pool: bool
) -> tuple[Tensor, Tensor | None]:
    from fastunet.kernels.conv3x3 import conv3x3

    return conv3x3(x, weight, bias, up=up, negative_slope=slope, pool=pool, allow_tf32=dispatch.tf32_allowed())


def _forward_fake(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    slope: float | None,
    pool: bool,
    input_slope: float | None,
    grad_is_ready: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return conv_fake(x, up, weight, pool)


def _composition(
    x: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None, slope: float | None, pool: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    """The last arguments are between two ops: here each takes its own activation back in its gradient."""
    joined = x if up is None else torch.cat([x, up], dim=1)
    y = reference.conv3x3_bias_relu(joined, weight, bias, **arguments_of(slope))
    return y, reference.max_pool2x2(y) if pool else none_like(x)


# --- backward ---


def _backward(
    grad_y: Tensor | None,
    grad_pooled: Tensor | None,
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    y: Tensor | None,
    slope: float | None,
    input_slope: float | None,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if dispatch.choose(NAME, x, weight, training=True).implementation == "triton":
        return _backward_triton(grad_y, grad_pooled, x, up, weight, y, slope, input_slope, mask)
    grad = epilogue_grad(grad_y, grad_pooled, y, slope)
    grads = conv_backward(grad, x, up, weight, mask)
    if input_slope is not None and mask[0]:
        return strided_like(epilogue_grad(grads[0], None, x, input_slope), x), *grads[1:]
    return grads


def _backward_triton(
    grad_y: Tensor | None,
    grad_pooled: Tensor | None,
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    y: Tensor | None,
    slope: float | None,
    input_slope: float | None,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastunet.kernels.activation_grad import activation_grad

    if slope is None and grad_pooled is None:
        assert grad_y is not None, "a backward runs only when one of its outputs has a gradient"
        grad = grad_y
    else:
        assert y is not None
        grad = activation_grad(y, grad_y, grad_pooled, slope)
    return conv_backward_triton(grad, x, up, weight, mask, input_slope)


def _backward_fake(
    grad_y: Tensor | None,
    grad_pooled: Tensor | None,
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    y: Tensor | None,
    slope: float | None,
    input_slope: float | None,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return conv_backward_fake(x, up, weight, mask)


# --- registration ---


class Conv3x3BiasRelu(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        x, up, weight, _, slope, pool, input_slope, grad_is_ready, _ = args
        y, pooled = below_autograd(_op, *args[:-1], True)
        ctx.slope = None if grad_is_ready else slope
        ctx.save_for_backward(x, up, weight, y if pool or ctx.slope is not None else None)
        ctx.pool, ctx.input_slope = pool, input_slope
        ctx.set_materialize_grads(False)
        if not pool:
            ctx.mark_non_differentiable(pooled)
        return y, pooled

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_pooled: Tensor | None) -> tuple[Tensor | None, ...]:
        mask = list(ctx.needs_input_grad[:4])
        if grad_y is None and grad_pooled is None:
            return (None,) * 9
        *saved, y = ctx.saved_tensors
        grads = _backward_op(grad_y, grad_pooled if ctx.pool else None, *saved, y, ctx.slope, ctx.input_slope, mask)
        return *(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)), *(None,) * 5


_op = define(
    f"{NAME}(Tensor x, Tensor? up, Tensor weight, Tensor? bias, float? slope, bool pool, float? input_slope, "
    "bool grad_is_ready, bool keep) -> (Tensor, Tensor)",
    implementation=_forward,
    fake=_forward_fake,
    composition=_composition,
    autograd=Conv3x3BiasRelu,
    weight=lambda *args: (args[2], args[-1]),
    is_torchs=True,
)
_backward_op = define(
    f"{NAME}_backward(Tensor? grad_y, Tensor? grad_pooled, Tensor x, Tensor? up, Tensor weight, Tensor? y, "
    "float? slope, float? input_slope, bool[] mask) -> (Tensor, Tensor, Tensor, Tensor)",
    implementation=_backward,
    fake=_backward_fake,
)
define_autocast(_op, cast=(0, 1), parameters=(2, 3))
