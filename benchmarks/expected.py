"""What each op of fastunet.ops must give, forward and backward, in float64 and with bounds.

`expected` knows nothing of the ops' implementations but where they may round: the output of a convolution, and a
gradient on its way to a convolution, may be stored in the tensors' dtype; with `stores_steps` every step's result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from fastunet.testing import composed_sums_expected, segmentation_sums_expected, segmentation_sums_grad_expected

from .bounds import Bounded, activation_grad, bilinear, join, pool_grad

Results = dict[str, Bounded]


@dataclass(frozen=True)
class Call:
    """An op with what it is called with.

    inputs: tensors by parameter name, in the op's order. buffers: running statistics. cotangents: the gradients of its
    outputs, none where the backward is not asked for. y: the op's own first output, by whose values the backward
    decides where given (its sign, the winners of its windows). stores_steps: the implementation is a chain of ops, each
    of which rounds its result to the dtype. composes: an upsampling is composed with the convolution after it by a
    weight of 16 bits.
    """

    op: str
    inputs: Mapping[str, Tensor]
    options: Mapping[str, Any]
    buffers: Mapping[str, Tensor]
    cotangents: Sequence[Tensor]
    allow_tf32: bool = False
    y: Tensor | None = None
    stores_steps: bool = False
    composes: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.inputs.values())).dtype

    @property
    def slope(self) -> float | None:
        return self.options.get("negative_slope", 0.0) if self.options.get("relu", True) else None

    @property
    def multiplies(self) -> bool:
        """Whether the activation does more than keep or drop a value."""
        return bool(self.slope)

    def product(
        self, function: Callable[..., Tensor], a: Bounded, b: Bounded, terms: int, bias: Tensor | None = None
    ) -> Bounded:
        """`bilinear` in this call's number format."""
        return bilinear(function, a, b, terms, self.dtype, bias=bias, allow_tf32=self.allow_tf32)


def expected(call: Call) -> Results:
    """The outputs, the gradients ("grad x", ...) where there are cotangents, and the buffers the call changes."""
    return _FAMILIES[call.op](call)


# --- 3x3 convolutions ---


def _convolve(call: Call, x: Bounded, weight: Tensor, bias: Tensor | None = None) -> Bounded:
    def product(a: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(a, b, padding=1)

    return call.product(product, x, Bounded.exact(weight), weight[0].numel(), bias)


def _convolve_grads(call: Call, grad: Bounded, x: Bounded, weight: Tensor) -> tuple[Bounded, Bounded]:
    """Gradients of input and weight."""

    def of_input(a: Tensor, b: Tensor) -> Tensor:
        return F.conv_transpose2d(a, b, padding=1)

    def of_weight(a: Tensor, b: Tensor) -> Tensor:
        return conv2d_weight(b, weight.shape, a, padding=1)

    pixels = grad.value[:, 0].numel()
    return (
        call.product(of_input, grad, Bounded.exact(weight), 9 * weight.shape[0]),
        call.product(of_weight, grad, x, pixels),
    )


def _joined(call: Call) -> Bounded:
    names = [name for name in ("x", "skip", "up") if name in call.inputs]
    return join(*(Bounded.exact(call.inputs[name]) for name in names))


def _input_grads(call: Call, grad: Bounded) -> Results:
    """The joint gradient of the inputs, by input."""
    names = [name for name in ("x", "skip", "up") if name in call.inputs]
    sizes = [call.inputs[name].shape[1] for name in names]
    parts = zip(grad.value.split(sizes, 1), grad.error.split(sizes, 1), strict=True)
    return {f"grad {name}": Bounded(*part) for name, part in zip(names, parts, strict=True)}


def _activated(call: Call, before: Bounded) -> Bounded:
    """The activation of a stored sum. Rounding after a linear function instead of before it is off by no more."""
    y = before.activate(call.slope)
    return y.stored(call.dtype) if call.stores_steps and call.multiplies else y


def _finish(call: Call, before: Bounded) -> tuple[Bounded, Results]:
    """Activation and, where the op pools, the maxima: y, and the outputs by name."""
    y = _activated(call, before)
    outputs = {"y": y}
    if call.op.endswith("_pool") or call.options.get("pool"):
        outputs["pooled"] = y.pool()
    return y, outputs


def _finish_grad(call: Call, y: Bounded, before: Bounded, *, stored: bool) -> Bounded:
    """The gradient of what went into the activation, from the cotangents; stored where the next kernel reads it."""
    if call.y is not None:
        y = before = Bounded.exact(call.y)
    grad = Bounded.exact(call.cotangents[0])
    is_computed = call.multiplies
    if len(call.cotangents) > 1:
        grad, is_computed = grad + pool_grad(call.cotangents[1], y), True
    grad = activation_grad(grad, before, call.slope)
    return grad.stored(call.dtype) if is_computed and (stored or call.stores_steps) else grad


def _bias_grad(call: Call, grad: Bounded) -> Bounded:
    return grad.sum((0, 2, 3)).stored(call.dtype)


def _conv3x3_bias_relu(call: Call) -> Results:
    x, weight, bias = _joined(call), call.inputs["weight"], call.inputs.get("bias")
    before = _convolve(call, x, weight, bias)
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
    before1 = _convolve(call, x, weight1, bias1)
    middle = _activated(call, before1)
    before2 = _convolve(call, middle, weight2, bias2)
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


@dataclass(frozen=True)
class _Normal:
    """(raw - mean) * invstd, its parts, and the number of values each statistic is of (0: it was given)."""

    value: Bounded
    mean: Bounded
    variance: Bounded
    invstd: Bounded
    dims: tuple[int, ...]
    count: int


def _normalise(call: Call, raw: Bounded) -> _Normal:
    eps = call.options["eps"]
    dims = (2, 3) if "instance" in call.op else (0, 2, 3)
    count = 0
    if call.buffers and not call.options["training"]:
        mean, variance = (Bounded.exact(t)[None, :, None, None] for t in call.buffers.values())
        centred = raw - mean
    else:
        count = raw.value.numel() // (raw.value.shape[1] * (raw.value.shape[0] if dims == (2, 3) else 1))
        mean = raw.sum(dims, keepdim=True).scaled(1 / count)
        centred = raw - mean
        variance = (centred * centred).sum(dims, keepdim=True).scaled(1 / count)
    invstd = variance.inverse_root(eps)
    return _Normal(centred * invstd, mean, variance, invstd, dims, count)


def _moved_buffers(call: Call, normal: _Normal) -> Results:
    """The running statistics afterwards, the variance unbiased."""
    momentum = call.options["momentum"]
    new = (normal.mean, normal.variance.scaled(normal.count / (normal.count - 1)))
    return {
        name: Bounded.exact(old).scaled(1 - momentum) + batch[0, :, 0, 0].scaled(momentum)
        for (name, old), batch in zip(call.buffers.items(), new, strict=True)
    }


def _norm_grad(call: Call, grad: Bounded, normal: _Normal, gamma: Bounded) -> tuple[Bounded, Bounded, Bounded]:
    """Gradients of the convolution's output, gamma and beta (Ioffe and Szegedy 2015, section 3)."""
    of_normal = grad * normal.value
    scale = gamma * normal.invstd
    inner = grad
    if normal.count:
        total, dot = (t.sum(normal.dims, keepdim=True) for t in (grad, of_normal))
        inner = grad - (total + normal.value * dot).scaled(1 / normal.count)
    return (inner * scale).stored(call.dtype), of_normal.sum((0, 2, 3)), grad.sum((0, 2, 3))


def _conv3x3_norm_relu(call: Call) -> Results:
    x, weight = _joined(call), call.inputs["weight"]
    normal = _normalise(call, _convolve(call, x, weight))
    gamma, beta = (Bounded.exact(call.inputs[name])[None, :, None, None] for name in ("gamma", "beta"))
    before = (normal.value * gamma + beta).stored(call.dtype)
    y, results = _finish(call, before)
    if call.buffers and call.options["training"]:
        results |= _moved_buffers(call, normal)
    if call.cotangents:
        grad = _finish_grad(call, y, before, stored=False)
        grad_raw, results["grad gamma"], results["grad beta"] = _norm_grad(call, grad, normal, gamma)
        grad_x, results["grad weight"] = _convolve_grads(call, grad_raw, x, weight)
        results |= _input_grads(call, grad_x)
    return results


# --- the other layers ---


def _max_pool2x2(call: Call) -> Results:
    x = Bounded.exact(call.inputs["x"])
    results = {"y": x.pool()}
    if call.cotangents:
        results["grad x"] = pool_grad(call.cotangents[0], x)
    return results


def _conv_transpose2x2(call: Call) -> Results:
    x, weight, bias = (call.inputs.get(name) for name in ("x", "weight", "bias"))
    assert x is not None
    assert weight is not None
    exact = Bounded.exact(x), Bounded.exact(weight)
    results = {"y": _upsampled(call, x, weight, bias)}
    if call.cotangents:
        grad = Bounded.exact(call.cotangents[0])
        terms = weight[0].numel()
        results["grad x"] = call.product(lambda a, b: F.conv2d(a, b, stride=2), grad, exact[1], terms)
        results["grad weight"] = call.product(_upsampling_weight_grad, grad, exact[0], x[:, 0].numel())
        results["grad bias"] = _bias_grad(call, grad)
    return results


def _upsampled(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Bounded:
    exact = Bounded.exact(x), Bounded.exact(weight)
    return call.product(lambda a, b: F.conv_transpose2d(a, b, stride=2), *exact, weight.shape[0], bias)


def _conv_transpose2x2_concat_conv3x3_relu(call: Call) -> Results:
    """In two steps, of which the first is rounded, or by a composed weight, which is rounded instead. In float32 the
    roundings of composing are those of the steps' sums.
    """
    inputs = call.inputs
    if call.composes:
        *sources, bias = inputs.values()
        sums = Bounded(*composed_sums_expected(*sources))
        return {"y": _activated(call, (sums + Bounded.exact(bias[:, None, None])).stored(call.dtype))}
    up = _upsampled(call, inputs["low"], inputs["up_weight"], inputs.get("up_bias"))
    sides = [size % 2 for size in inputs["skip"].shape[2:]]
    padded = Bounded(*(F.pad(t, [0, sides[1], 0, sides[0]]) for t in (up.value, up.error)))
    before = _convolve(call, join(Bounded.exact(inputs["skip"]), padded), inputs["weight"], inputs["bias"])
    return {"y": _activated(call, before)}


def _upsampling_weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    windows = grad.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return torch.einsum("nihw,nohawb->ioab", x, windows)


def _head(call: Call, x: Bounded, weight: Tensor, bias: Tensor | None) -> Bounded:
    return call.product(F.conv2d, x, Bounded.exact(weight), weight.shape[1], bias)


def _conv1x1(call: Call) -> Results:
    x, weight = Bounded.exact(call.inputs["x"]), call.inputs["weight"]
    activation = call.options.get("activation")
    y = _head(call, x, weight, call.inputs.get("bias"))
    if activation is not None:
        y = (y.sigmoid() if activation == "sigmoid" else y.softmax()).stored(call.dtype)
    results = {"y": y}
    if call.cotangents:
        grad = Bounded.exact(call.cotangents[0])
        if activation == "sigmoid":
            grad = (grad * y * (Bounded.exact(torch.ones_like(y.value)) - y)).stored(call.dtype)
        elif activation == "softmax":
            grad = (y * (grad - (grad * y).sum((1,), keepdim=True))).stored(call.dtype)
        of_input = call.product(F.conv_transpose2d, grad, Bounded.exact(weight), weight.shape[0])
        results["grad x"] = of_input
        results["grad weight"] = call.product(
            lambda a, b: torch.einsum("nohw,nihw->oi", a, b)[:, :, None, None], grad, x, grad.value[:, 0].numel()
        )
        results["grad bias"] = _bias_grad(call, grad)
    return results


def _conv3x3_relu_conv1x1(call: Call) -> Results:
    inputs = call.inputs
    before = _convolve(call, Bounded.exact(inputs["x"]), inputs["weight"], inputs["bias"])
    middle = _activated(call, before)
    y = _head(call, middle, inputs["head_weight"], inputs["head_bias"])
    return {"y": y.sigmoid().stored(call.dtype) if call.options.get("sigmoid") else y}


# --- losses ---


def _sums_options(call: Call) -> dict[str, bool]:
    return {
        "softmax": call.options.get("activation") == "softmax",
        "squared": call.options.get("squared", False),
    }


def _sums(call: Call) -> Bounded:
    logits, target = call.inputs["logits"], call.inputs["target"]
    entropy = call.options.get("entropy", False)
    return Bounded(*segmentation_sums_expected(logits, target, None, entropy=entropy, **_sums_options(call)))


def _sums_grad(call: Call, grad: Bounded) -> Bounded:
    """The gradient of the logits; linear in that of the sums, whose error goes row by row."""
    logits, target = call.inputs["logits"], call.inputs["target"]
    options = _sums_options(call)
    result = Bounded(*segmentation_sums_grad_expected(grad.value, logits, target, None, **options))
    carried = torch.zeros_like(result.value)
    for row in range(len(grad.error)):
        alone = torch.zeros_like(grad.error)
        alone[row] = grad.error[row]
        carried += segmentation_sums_grad_expected(alone, logits, target, None, **options).value.abs()
    return Bounded(result.value, result.error + 2 * carried)


def _segmentation_sums(call: Call) -> Results:
    results = {"y": _sums(call)}
    if call.cotangents:
        results["grad logits"] = _sums_grad(call, Bounded.exact(call.cotangents[0]))
    return results


def _sigmoid_dice_loss(call: Call) -> Results:
    """The mean over images and channels of 1 - (2 overlap + smooth) / (predicted + truth + smooth)."""
    sums = _sums(call)
    smooth = Bounded.exact(torch.full_like(sums.value[0], call.options["smooth"]))
    above = sums[0].scaled(2) + smooth
    below = sums[1] + sums[2] + smooth
    ratio = above / below
    share = 1 / ratio.value.numel()
    one = Bounded.exact(torch.ones((), dtype=torch.float64, device=ratio.value.device))
    results = {"y": one - ratio.sum((0, 1)).scaled(share)}
    if call.cotangents:
        factor = Bounded.exact(call.cotangents[0]).scaled(share)
        of_overlap = (factor / below).scaled(-2)
        of_sizes = factor * ratio / below
        grad = torch.stack([of_overlap.value, of_sizes.value, of_sizes.value])
        error = torch.stack([of_overlap.error, of_sizes.error, of_sizes.error])
        results["grad logits"] = _sums_grad(call, Bounded(grad, error))
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
