"""What each op of fastunet.ops must give, forward and backward, in float64 and with bounds.

`expected` knows nothing of the ops' implementations but where they may round: the output of a convolution, and a
gradient on its way to a convolution, may be stored in the tensors' dtype; with `stores_steps` every step's result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .bounds import Expected, Operand, activation_grad, bilinear, join, pool_grad
from .convolutions import (
    composed_sums_expected,
    conv1x1_expected,
    conv1x1_logit_grad_expected,
    conv3x3_expected,
    conv3x3_input_grad_expected,
    conv3x3_weight_grad_expected,
    conv_transpose2x2_expected,
    conv_transpose2x2_input_grad_expected,
    conv_transpose2x2_weight_grad_expected,
    weight_grad_expected,
)
from .losses import segmentation_sums_expected, segmentation_sums_grad_expected

Results = dict[str, Expected]
# Roundings that the statistics of a norm have beside those of additions: partial results of tiles are merged.
_MERGING = 16


@dataclass(frozen=True)
class Call:
    """An op with what it is called with."""

    op: str
    inputs: Mapping[str, Tensor]  # by parameter name, in the op's order
    options: Mapping[str, Any]
    buffers: Mapping[str, Tensor]  # running statistics
    cotangents: Sequence[Tensor]  # the gradients of its outputs, none where the backward is not asked for
    allow_tf32: bool = False
    y: Tensor | None = None  # its own first output, by whose sign and windows the backward decides where given
    stores_steps: bool = False  # the implementation is a chain of ops, each of which rounds its result to the dtype
    composes: bool = False  # an upsampling is composed with the convolution after it by a weight of 16 bits

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.inputs.values())).dtype

    @property
    def slope(self) -> float | None:
        return self.options.get("negative_slope", 0.0) if self.options.get("relu", True) else None

    @property
    def stride(self) -> int:
        return self.options.get("stride", 1)

    @property
    def multiplies(self) -> bool:
        """Whether the activation does more than keep or drop a value."""
        return bool(self.slope)

    @property
    def rounds(self) -> dict[str, Any]:
        """Return the number format of its products, as `bilinear` takes it."""
        return {"dtype": self.dtype, "allow_tf32": self.allow_tf32}


def expected(call: Call) -> Results:
    """Return outputs, gradients ("grad x", ...) where there are cotangents, and the buffers the call changes."""
    return _FAMILIES[call.op](call)


# --- 3x3 convolutions ---


def _convolve_grads(call: Call, grad: Expected, x: Expected, weight: Tensor) -> tuple[Expected, Expected]:
    """Return gradients of input and weight."""
    size = x.value.shape[2:]
    of_input = conv3x3_input_grad_expected(grad, weight, stride=call.stride, size=size, **call.rounds)
    return of_input, conv3x3_weight_grad_expected(grad, x, stride=call.stride, **call.rounds)


def _joined(call: Call) -> Expected:
    names = [name for name in ("x", "skip", "up") if name in call.inputs]
    return join(*(Expected.exact(call.inputs[name]) for name in names))


def _input_grads(call: Call, grad: Expected) -> Results:
    """Return the joint gradient of the inputs, by input."""
    names = [name for name in ("x", "skip", "up") if name in call.inputs]
    sizes = [call.inputs[name].shape[1] for name in names]
    parts = zip(grad.value.split(sizes, 1), grad.tolerance.split(sizes, 1), strict=True)
    return {f"grad {name}": Expected(*part) for name, part in zip(names, parts, strict=True)}


def _activated(call: Call, before: Expected) -> Expected:
    """Activate a stored sum. Rounding after a linear function instead of before it is off by no more."""
    y = before.activate(call.slope)
    return y.stored(call.dtype) if call.stores_steps and call.multiplies else y


def _finish(call: Call, before: Expected) -> tuple[Expected, Results]:
    """Activation and, where the op pools, the maxima: y, and the outputs by name."""
    y = _activated(call, before)
    outputs = {"y": y}
    if call.op.endswith("_pool") or call.options.get("pool"):
        outputs["pooled"] = y.pool()
    return y, outputs


def _finish_grad(call: Call, y: Expected, before: Expected, *, stored: bool) -> Expected:
    """Return the gradient of the activation's input, from the cotangents; stored where the next kernel reads it."""
    if call.y is not None:
        y = before = Expected.exact(call.y)
    grad = Expected.exact(call.cotangents[0])
    is_computed = call.multiplies
    if len(call.cotangents) > 1:
        grad, is_computed = grad + pool_grad(call.cotangents[1], y), True
    grad = activation_grad(grad, before, call.slope)
    return grad.stored(call.dtype) if is_computed and (stored or call.stores_steps) else grad


def _bias_grad(call: Call, grad: Expected) -> Expected:
    return grad.sum((0, 2, 3)).stored(call.dtype)


def _conv3x3_bias_relu(call: Call) -> Results:
    x, weight, bias = _joined(call), call.inputs["weight"], call.inputs.get("bias")
    before = conv3x3_expected(x, weight, bias, stride=call.stride, **call.rounds)
    y, results = _finish(call, before)
    if call.cotangents:
        grad = _finish_grad(call, y, before, stored=True)
        grad_x, results["grad weight"] = _convolve_grads(call, grad, x, weight)
        results |= _input_grads(call, grad_x)
        if bias is not None:
            results["grad bias"] = _bias_grad(call, grad)
    return results


def _double_conv3x3_bias_relu(call: Call) -> Results:
    (weight1, bias1, weight2, bias2) = (call.inputs[n] for n in ("weight1", "bias1", "weight2", "bias2"))
    x = _joined(call)
    before1 = conv3x3_expected(x, weight1, bias1, **call.rounds)
    middle = _activated(call, before1)
    before2 = conv3x3_expected(middle, weight2, bias2, **call.rounds)
    y, results = _finish(call, before2)
    if call.cotangents:
        grad = _finish_grad(call, y, before2, stored=True)
        results["grad bias2"] = _bias_grad(call, grad)
        grad, results["grad weight2"] = _convolve_grads(call, grad, middle, weight2)
        grad = activation_grad(grad, before1, call.slope).stored(call.dtype)
        results["grad bias1"] = _bias_grad(call, grad)
        grad, results["grad weight1"] = _convolve_grads(call, grad, x, weight1)
        results |= _input_grads(call, grad)
    return results


# --- 3x3 convolutions with a norm ---


def _conv3x3_norm_relu(call: Call) -> Results:
    x, weight, eps = _joined(call), call.inputs["weight"], call.options["eps"]
    gamma, beta = (Expected.exact(call.inputs[name])[None, :, None, None] for name in ("gamma", "beta"))
    raw = conv3x3_expected(x, weight, stride=call.stride, **call.rounds)
    dims = (2, 3) if "instance" in call.op else (0, 2, 3)
    uses_running = bool(call.buffers) and not call.options["training"]
    count = math.prod(raw.value.shape[d] for d in dims)
    if uses_running:
        mean, variance = (Expected.exact(t)[None, :, None, None] for t in call.buffers.values())
        centred = raw - mean
    else:
        mean = raw.sum(dims, keepdim=True, merging=_MERGING).scaled(1 / count)
        centred = raw - mean
        variance = (centred * centred).sum(dims, keepdim=True, merging=_MERGING).scaled(1 / count)
    invstd = variance.inverse_root(eps)
    normal = centred * invstd
    before = (normal * gamma + beta).stored(call.dtype)
    y, results = _finish(call, before)
    if call.buffers and not uses_running:
        momentum = call.options["momentum"]
        for (name, old), new in zip(call.buffers.items(), (mean, variance.scaled(count / (count - 1))), strict=True):
            results[name] = Expected.exact(old).scaled(1 - momentum) + new[0, :, 0, 0].scaled(momentum)
    if call.cotangents:  # Ioffe and Szegedy 2015, section 3.
        grad = _finish_grad(call, y, before, stored=False)
        of_normal = grad * normal
        results["grad gamma"], results["grad beta"] = of_normal.sum((0, 2, 3)), grad.sum((0, 2, 3))
        if not uses_running:
            total, dot = (t.sum(dims, keepdim=True, merging=_MERGING) for t in (grad, of_normal))
            grad = grad - (total + normal * dot).scaled(1 / count)
        grad_raw = (grad * (gamma * invstd)).stored(call.dtype)
        grad_x, results["grad weight"] = _convolve_grads(call, grad_raw, x, weight)
        results |= _input_grads(call, grad_x)
    return results


# --- the other layers ---


def _max_pool2x2(call: Call) -> Results:
    x = Expected.exact(call.inputs["x"])
    results = {"y": x.pool()}
    if call.cotangents:
        results["grad x"] = pool_grad(call.cotangents[0], x)
    return results


def _conv_transpose2x2(call: Call) -> Results:
    x, weight = call.inputs["x"], call.inputs["weight"]
    results = {"y": conv_transpose2x2_expected(x, weight, call.inputs.get("bias"), **call.rounds)}
    if call.cotangents:
        grad = call.cotangents[0]
        results["grad x"] = conv_transpose2x2_input_grad_expected(grad, weight, **call.rounds)
        results["grad weight"] = conv_transpose2x2_weight_grad_expected(grad, x, **call.rounds)
        results["grad bias"] = _bias_grad(call, Expected.exact(grad))
    return results


def _conv_transpose2x2_concat_conv3x3_relu(call: Call) -> Results:
    """In two steps, of which the first is rounded, or by a composed weight, which is rounded instead. In float32 the
    roundings of composing are those of the steps' sums.
    """
    inputs, up_first = call.inputs, call.options.get("up_first", False)
    skip, low, weight, bias = (inputs[name] for name in ("skip", "low", "weight", "bias"))
    up_weight, up_bias = inputs.get("up_weight"), inputs.get("up_bias")
    if call.composes:
        sums = composed_sums_expected(skip, low, up_weight, up_bias, weight, up_first=up_first)
        return {"y": _activated(call, (sums + Expected.exact(bias[:, None, None])).stored(call.dtype))}
    if up_weight is None:
        up = Expected.exact(F.interpolate(low, scale_factor=2))
    else:
        up = conv_transpose2x2_expected(low, up_weight, up_bias, **call.rounds)
    sides = [size % 2 for size in skip.shape[2:]]
    padded = Expected(*(F.pad(t, [0, sides[1], 0, sides[0]]) for t in (up.value, up.tolerance)))
    images = [Expected.exact(skip), padded]
    joined = join(*(images[::-1] if up_first else images))
    before = conv3x3_expected(joined, weight, bias, **call.rounds)
    return {"y": _activated(call, before)}


def _conv1x1(call: Call) -> Results:
    x, weight = call.inputs["x"], call.inputs["weight"]
    activation = call.options.get("activation")
    y = _head(call, Expected.exact(x), weight, call.inputs.get("bias"), activation)
    results = {"y": y}
    if call.cotangents:
        grad = conv1x1_logit_grad_expected(call.cotangents[0], y, activation)
        grad = grad if activation is None else grad.stored(call.dtype)
        results["grad x"] = bilinear(F.conv_transpose2d, grad, weight, weight.shape[0], **call.rounds)
        results["grad weight"] = weight_grad_expected(grad, x, 1, **call.rounds)
        results["grad bias"] = _bias_grad(call, grad)
    return results


def _head(call: Call, x: Expected, weight: Tensor, bias: Tensor | None, activation: str | None) -> Expected:
    """Compute the head. The kernels activate the sums as they are; a chain of ops stores the logits first."""
    if activation is None or not call.stores_steps:
        return conv1x1_expected(x, weight, bias, activation=activation, **call.rounds)
    logits = conv1x1_expected(x, weight, bias, **call.rounds)
    return (logits.sigmoid() if activation == "sigmoid" else logits.softmax()).stored(call.dtype)


def _conv3x3_relu_conv1x1(call: Call) -> Results:
    inputs = call.inputs
    before = conv3x3_expected(inputs["x"], inputs["weight"], inputs["bias"], **call.rounds)
    middle = _activated(call, before)
    activation = "sigmoid" if call.options.get("sigmoid") else None
    return {"y": _head(call, middle, inputs["head_weight"], inputs["head_bias"], activation)}


# --- losses ---


def _sums(call: Call, grad: Operand | None = None) -> Expected:
    """Return the sums or, given their gradient, that of the logits."""
    options = {"softmax": call.options.get("activation") == "softmax", "squared": call.options.get("squared", False)}
    pixels = (call.inputs["logits"], call.inputs["target"], None)
    if grad is not None:
        return segmentation_sums_grad_expected(grad, *pixels, **options)
    return segmentation_sums_expected(*pixels, entropy=call.options.get("entropy", False), **options)


def _segmentation_sums(call: Call) -> Results:
    results = {"y": _sums(call)}
    if call.cotangents:
        results["grad logits"] = _sums(call, call.cotangents[0])
    return results


def _sigmoid_dice_loss(call: Call) -> Results:
    """Return the mean over images and channels of 1 - (2 overlap + smooth) / (predicted + truth + smooth)."""
    sums = _sums(call)
    smooth = Expected.exact(torch.full_like(sums.value[0], call.options["smooth"]))
    above = sums[0].scaled(2) + smooth
    below = sums[1] + sums[2] + smooth
    ratio = above / below
    share = 1 / ratio.value.numel()
    one = Expected.exact(torch.ones((), dtype=torch.float64, device=ratio.value.device))
    results = {"y": one - ratio.sum((0, 1)).scaled(share)}
    if call.cotangents:
        factor = Expected.exact(call.cotangents[0]).scaled(share)
        of_overlap = (factor / below).scaled(-2)
        of_sizes = factor * ratio / below
        grad = torch.stack([of_overlap.value, of_sizes.value, of_sizes.value])
        error = torch.stack([of_overlap.tolerance, of_sizes.tolerance, of_sizes.tolerance])
        results["grad logits"] = _sums(call, Expected(grad, error))
    return results


_FAMILIES: dict[str, Callable[[Call], Results]] = {
    **dict.fromkeys(("conv3x3_bias_relu", "conv3x3_bias_relu_pool", "concat_conv3x3_bias_relu"), _conv3x3_bias_relu),
    **dict.fromkeys(
        (
            f"{prefix}conv3x3_{norm}_norm_relu{suffix}"
            for norm in ("batch", "instance")
            for prefix, suffix in (("", ""), ("", "_pool"), ("concat_", ""))
        ),
        _conv3x3_norm_relu,
    ),
    "double_conv3x3_bias_relu": _double_conv3x3_bias_relu,
    "max_pool2x2": _max_pool2x2,
    "conv_transpose2x2": _conv_transpose2x2,
    "conv1x1": _conv1x1,
    "conv3x3_relu_conv1x1": _conv3x3_relu_conv1x1,
    "conv_transpose2x2_concat_conv3x3_relu": _conv_transpose2x2_concat_conv3x3_relu,
    "segmentation_sums": _segmentation_sums,
    "sigmoid_dice_loss": _sigmoid_dice_loss,
}
