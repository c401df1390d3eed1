"""conv3x3_batch_norm_relu, its pool form and its concat form: one registered op, fastunet::conv3x3_batch_norm_relu."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastunet import checks, dispatch
from fastunet.ops import onednn, recompute
from fastunet.ops.convolution import check_inputs, conv_backward, conv_backward_fake, conv_fake, convolve, kernel_weight
from fastunet.ops.epilogue import activate_, arguments_of, epilogue_grad, slope_of
from fastunet.ops.norm import backward_triton, forward_triton, in_format_of, runs_on_triton
from fastunet.ops.registration import below_autograd, define, define_autocast, invoke, memory_format, none_like
from fastunet.reference import functional as reference

NAME = "conv3x3_batch_norm_relu"
aten = torch.ops.aten


def conv3x3_batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    negative_slope: float = 0.0,
) -> Tensor:
    """relu(batch_norm(conv2d(x, weight, padding=1), running_mean, running_var, gamma, beta, training, momentum, eps)).

    x [N, Cin, H, W], weight [Cout, Cin, 3, 3], the other tensors [Cout] or None, of x's dtype or float32. training=True
    takes the statistics of this batch (Ioffe & Szegedy 2015) and moves the running ones in place by momentum, with the
    unbiased variance, as torch does; training=False takes the running ones. The rest as conv3x3_bias_relu. Raises
    ValueError, as torch does, where training has one value per channel.
    """
    norm = (gamma, beta, running_mean, running_var, training, momentum, eps)
    y, _ = _call(NAME, x, None, weight, norm, relu, negative_slope, pool=False)
    return y


def conv3x3_batch_norm_relu_pool(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    negative_slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(y, F.max_pool2d(y, 2)) of y = conv3x3_batch_norm_relu(x, ...); H and W >= 2."""
    norm = (gamma, beta, running_mean, running_var, training, momentum, eps)
    return _call("conv3x3_batch_norm_relu_pool", x, None, weight, norm, relu, negative_slope, pool=True)


def concat_conv3x3_batch_norm_relu(
    skip: Tensor,
    up: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    negative_slope: float = 0.0,
) -> Tensor:
    """conv3x3_batch_norm_relu(torch.cat([skip, up], 1), ...): skip [N, C1, H, W], up [N, C2, H, W], weight
    [Cout, C1 + C2, 3, 3].
    """
    norm = (gamma, beta, running_mean, running_var, training, momentum, eps)
    y, _ = _call("concat_conv3x3_batch_norm_relu", skip, up, weight, norm, relu, negative_slope, pool=False)
    return y


def _call(
    name: str,
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    norm: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool, float, float],
    relu: bool,
    negative_slope: float,
    pool: bool,
) -> tuple[Tensor, Tensor]:
    gamma, beta, running_mean, running_var, training, momentum, eps = norm
    check_inputs(name, x, up, weight, pool)
    check_norm(name, x, weight, gamma=gamma, beta=beta, running_mean=running_mean, running_var=running_var)
    check_pair(name, gamma=gamma, beta=beta)
    check_pair(name, running_mean=running_mean, running_var=running_var)
    check_eps(name, eps, training=training)
    if training:
        if x.shape[0] * x.shape[2] * x.shape[3] == 1:
            raise checks.ShapeError(
                f"{name}: expected more than 1 value per channel when training, got input {list(x.shape)}"
            )
    elif running_mean is None:
        raise checks.ConfigError(f"{name}: expected running_mean and running_var when not training, got None")
    slope = slope_of(relu, negative_slope)
    options = (training, momentum, eps, slope, pool, False)
    y, pooled, raw, mean, invstd = invoke(_op, x, up, weight, gamma, beta, running_mean, running_var, *options)
    recompute.remember(y, raw, mean, invstd, gamma, beta, slope)
    return y, pooled


def check_eps(name: str, eps: float, *, training: bool = False) -> None:
    """Raise ConfigError for an eps that torch's batch norm refuses: it keeps the divisor from zero."""
    if eps < 0 or (training and eps == 0):
        expected = "a positive number when training" if training else "a number >= 0"
        raise checks.ConfigError(f"{name}: eps: expected {expected}, got {eps}")


def check_pair(name: str, **pair: Tensor | None) -> None:
    """Two parameters are given together or not at all."""
    given = [key for key, t in pair.items() if t is not None]
    if len(given) == 1:
        raise checks.ConfigError(f"{name}: expected both {' and '.join(pair)}, or neither, got only {given[0]}")


def check_norm(name: str, x: Tensor, weight: Tensor, **parameters: Tensor | None) -> None:
    """Per-channel parameters [Cout] on x's device, in x's dtype or, as mixed precision keeps them, float32."""
    expected = weight.shape[:1]
    for key, t in parameters.items():
        if t is None:
            continue
        checks.check_shape(name, key, t, expected)
        if t.dtype in (x.dtype, torch.float32):
            checks.check_device(name, x, **{key: t})
        else:
            checks.check_together(name, x, **{key: t})


# --- forward ---


def _forward(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    slope: float | None,
    pool: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, pooled, raw, mean, invstd): raw is the convolution's output and mean and invstd its statistics,
    empty unless keep, the last two also in eval.
    """
    if runs_on_triton(NAME, x, weight, training=training or keep):
        packed = kernel_weight(weight, x, training=training or keep)
        given = (x, up, packed, gamma, beta, running_mean, running_var, training, momentum, eps, slope, pool, keep)
        return _forward_triton(*given)
    format = memory_format(x, up, weight)
    if dispatch.choose(NAME, x, weight, training=training or keep).implementation == "onednn":
        norm = onednn.norm_of(running_mean, running_var, gamma, eps)
        y = onednn.conv3x3(x, up, weight, beta, norm, slope).contiguous(memory_format=format)
        pooled = F.max_pool2d(y, 2) if pool else none_like(x)
        return y, pooled, none_like(x), *_no_statistics(gamma, x)
    raw = convolve(x, up, weight, training=training or keep).contiguous(memory_format=format)
    mean, invstd = _no_statistics(gamma, raw)
    if keep and training:
        found = aten.native_batch_norm(raw, gamma, beta, running_mean, running_var, training, momentum, eps)
        y, mean, invstd = found[0], found[1].to(mean.dtype), found[2].to(mean.dtype)
    else:  # On a GPU this is cuDNN's, which gives no statistics away.
        y = F.batch_norm(raw, running_mean, running_var, gamma, beta, training, momentum, eps)
    y = activate_(y.contiguous(memory_format=format), slope)
    pooled = F.max_pool2d(y, 2).contiguous(memory_format=format) if pool else none_like(x)
    return y, pooled, raw if keep else none_like(x), mean, invstd


def _no_statistics(gamma: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Stand for mean and invstd of a batch where no backward needs them."""
    dtype = statistics_dtype(gamma, like)
    return like.new_empty(0, dtype=dtype), like.new_empty(0, dtype=dtype)


def _forward_triton(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    slope: float | None,
    pool: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As _forward."""
    from fastunet.kernels.conv3x3 import Normalisation, conv3x3
    from fastunet.kernels.norm import Affine, normalise

    running = None if running_mean is None or running_var is None else (running_mean, running_var)
    if training:
        options: dict[str, Any] = {"groups": 1, "eps": eps, "running": running, "momentum": momentum}
        y, pooled, raw, mean, invstd = forward_triton(x, up, weight, gamma, beta, slope, pool, **options)
        kept = (raw, mean[0], invstd[0]) if keep else (None, *_no_statistics(gamma, x))
        return *in_format_of((x, up, weight), y, pooled, kept[0]), kept[1], kept[2]
    assert running is not None, "checked before"
    none = x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    tf32 = dispatch.tf32_allowed()
    if not keep:
        norm = Normalisation(*running, gamma, eps)
        y, pooled = conv3x3(x, weight, beta, up=up, norm=norm, negative_slope=slope, pool=pool, allow_tf32=tf32)
        return *in_format_of((x, up, weight), y, pooled, None), *none
    raw, _ = conv3x3(x, weight, up=up, allow_tf32=tf32)
    y, pooled = normalise(raw, Affine(*_given_statistics(*running, eps), gamma, beta), slope, pool=pool)
    return *in_format_of((x, up, weight), y, pooled, raw), *none


def _given_statistics(running_mean: Tensor, running_var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """mean and invstd [1, Cout] from running statistics."""
    return running_mean.float()[None], (running_var.float()[None] + eps).rsqrt()


def statistics_dtype(gamma: Tensor | None, raw: Tensor) -> torch.dtype:
    """Statistics are kept in float32, or float64 with float64 parameters, whatever the activations are."""
    return torch.promote_types((raw if gamma is None else gamma).dtype, torch.float32)


def _forward_fake(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    slope: float | None,
    pool: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, pooled = conv_fake(x, up, weight, pool)
    channels, dtype = weight.shape[0] if training and keep else 0, statistics_dtype(gamma, x)
    raw = torch.empty_like(y) if keep else none_like(x)
    return y, pooled, raw, x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype)


def _composition(
    x: Tensor, up: Tensor | None, weight: Tensor, *parameters_and_options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *parameters, training, momentum, eps, slope, pool, _ = parameters_and_options
    joined = x if up is None else torch.cat([x, up], dim=1)
    options = {"training": training, "momentum": momentum, "eps": eps, **arguments_of(slope)}
    y = reference.conv3x3_batch_norm_relu(joined, weight, *parameters, **options)
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
    running_mean: Tensor | None,
    running_var: Tensor | None,
    raw: Tensor,
    mean: Tensor,
    invstd: Tensor,
    y: Tensor | None,
    training: bool,
    eps: float,
    slope: float | None,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, up, weight, gamma, beta."""
    if runs_on_triton(NAME, x, weight, training=True):
        statistics = (mean[None], invstd[None])
        if not training:
            assert running_mean is not None
            assert running_var is not None
            statistics = _given_statistics(running_mean, running_var, eps)
        return backward_triton(
            *(grad_y, grad_pooled, x, up, weight, gamma, beta, raw, statistics, slope, mask),
            statistics_given=not training,
        )
    if y is None and (slope is not None or grad_pooled is not None):  # Our kernels ran forward and did not keep it.
        given = (mean, invstd.square().reciprocal() - eps) if training else (running_mean, running_var)
        parameters = [None if t is None else t.to(raw.dtype) for t in (gamma, beta, *given)]
        y = activate_(aten.native_batch_norm(raw, *parameters, False, 0.0, eps)[0], slope)
    grad = epilogue_grad(grad_y, grad_pooled, y, slope)
    if x.device.type == "cpu":
        # ATen's CPU kernel wants the statistics in the parameters' dtype; CUDA's in float32.
        parameter = gamma if gamma is not None else running_mean
        stored = raw.dtype if parameter is None else parameter.dtype
        mean, invstd = mean.to(stored), invstd.to(stored)
    through_conv = any(mask[:3])
    grad_raw, grad_gamma, grad_beta = aten.native_batch_norm_backward(
        grad, raw, gamma, running_mean, running_var, mean, invstd, training, eps, [through_conv, mask[3], mask[4]]
    )
    grads = [none_like(x)] * 3
    if through_conv:
        *grads, _ = conv_backward(grad_raw, x, up, weight, [*mask[:3], False])
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
    running_mean: Tensor | None,
    running_var: Tensor | None,
    raw: Tensor,
    mean: Tensor,
    invstd: Tensor,
    y: Tensor | None,
    training: bool,
    eps: float,
    slope: float | None,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_up, grad_weight, _ = conv_backward_fake(x, up, weight, [*mask[:3], False])
    return grad_x, grad_up, grad_weight, *norm_grads_fake(x, gamma, mask)


def norm_grads_fake(x: Tensor, gamma: Tensor | None, mask: list[bool]) -> tuple[Tensor, Tensor]:
    """Shapes of the gradients of gamma and beta, which come in pairs and alike."""
    return (
        torch.empty_like(gamma) if mask[3] and gamma is not None else none_like(x),
        torch.empty_like(gamma) if mask[4] and gamma is not None else none_like(x),
    )


# --- registration ---


class Conv3x3BatchNormRelu(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        x, up, weight, gamma, beta, running_mean, running_var, training, _, eps, slope, pool, _ = args
        y, pooled, raw, mean, invstd = below_autograd(_op, *args[:-1], True)
        # Our kernels find y again from raw, in registers.
        on_triton = runs_on_triton(NAME, x, weight, training=True)
        kept = y if (pool or slope is not None) and not on_triton else None
        # Those that training moves may move again before its backward, which does not read them.
        running = (None, None) if training else (running_mean, running_var)
        recompute.save(ctx, x, up, weight, gamma, beta, *running, raw, mean, invstd, kept)
        ctx.is_recomputable = on_triton and training
        ctx.training, ctx.eps, ctx.slope, ctx.pool = training, eps, slope, pool
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(raw, mean, invstd, *(() if pool else (pooled,)))
        return y, pooled, raw, mean, invstd

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_pooled: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_y is None and grad_pooled is None:
            return (None,) * 13
        mask = list(ctx.needs_input_grad[:5])
        *saved, kept = recompute.saved(ctx, reads_values=mask[2])
        grads = _backward_op(
            grad_y, grad_pooled if ctx.pool else None, *saved, kept, ctx.training, ctx.eps, ctx.slope, mask
        )
        return *(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)), *(None,) * 8


_op = define(
    f"{NAME}(Tensor x, Tensor? up, Tensor weight, Tensor? gamma, Tensor? beta, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, bool training, float momentum, float eps, float? slope, bool pool, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementation=_forward,
    fake=_forward_fake,
    composition=_composition,
    autograd=Conv3x3BatchNormRelu,
    weight=lambda *args: (args[2], args[7] or args[-1]),
    is_torchs=True,
)
_backward_op = define(
    f"{NAME}_backward(Tensor? grad_y, Tensor? grad_pooled, Tensor x, Tensor? up, Tensor weight, Tensor? gamma, "
    "Tensor? beta, Tensor? running_mean, Tensor? running_var, Tensor raw, Tensor mean, Tensor invstd, Tensor? y, "
    "bool training, float eps, float? slope, bool[] mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementation=_backward,
    fake=_backward_fake,
)
define_autocast(_op, cast=(0, 1), parameters=(2,))
