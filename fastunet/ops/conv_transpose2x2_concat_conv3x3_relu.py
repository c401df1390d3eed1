"""conv_transpose2x2_concat_conv3x3_relu: a U-Net's step up, from the level below to its first convolution, for
inference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet import checks, dispatch, folding
from fastunet.ops import onednn
from fastunet.ops.conv3x3_batch_norm_relu import check_eps, check_norm
from fastunet.ops.epilogue import arguments_of, slope_of
from fastunet.ops.registration import define, define_autocast, empty_in, invoke, memory_format
from fastunet.prepared import prepared
from fastunet.reference import functional as reference

NAME = "conv_transpose2x2_concat_conv3x3_relu"


def conv_transpose2x2_concat_conv3x3_relu(
    skip: Tensor,
    low: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor, Tensor | None, float] | None = None,
    relu: bool = True,
    negative_slope: float = 0.0,
) -> Tensor:
    """relu(conv2d(cat([skip, up]), weight, bias, padding=1)) of up = conv_transpose2d(low, up_weight, up_bias,
    stride=2), padded with zeros below and right where skip is one larger.

    skip [N, C1, H, W], low [N, Cl, H // 2, W // 2], up_weight [Cl, C2, 2, 2], up_bias [C2] or None, weight [Cout, C1 +
    C2, 3, 3], bias [Cout] or None; norm as in conv3x3_relu_conv1x1. The result is [N, Cout, H, W]. On the CPU in
    float32, and by a kernel in 16 bits on sm_90 and above, up is never computed: the two weights compose to one of 4x4
    (exactly, but for one rounding to the dtype, where otherwise up has one). For inference: the result has no gradient,
    and asking for one raises.
    """
    mean, variance, gamma, eps = norm if norm is not None else (None, None, None, 0.0)
    checks.check_activation(NAME, skip=skip, low=low)
    if min(skip.shape[2:]) < 2:
        raise checks.ShapeError(f"{NAME}: skip: expected at least 2x2 pixels, got {list(skip.shape)}")
    checks.check_shape(NAME, "low", low, (skip.shape[0], low.shape[1], skip.shape[2] // 2, skip.shape[3] // 2))
    up_channels = checks.check_convolution(NAME, up_weight, low.shape[1], 2, transposed=True)
    checks.check_shape(NAME, "up_bias", up_bias, (up_channels,))
    checks.check_convolution(NAME, weight, skip.shape[1] + up_channels, 3)
    checks.check_together(NAME, skip, low=low, up_weight=up_weight, up_bias=up_bias, weight=weight)
    check_eps(NAME, eps)
    check_norm(NAME, skip, weight, bias=bias, running_mean=mean, running_var=variance, gamma=gamma)
    slope = slope_of(relu, negative_slope)
    return invoke(_op, skip, low, up_weight, up_bias, weight, bias, mean, variance, gamma, eps, slope)


def _forward(
    skip: Tensor,
    low: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    gamma: Tensor | None,
    eps: float,
    slope: float | None,
) -> Tensor:
    format = memory_format(skip, low, weight)
    implementation = dispatch.choose(NAME, skip, weight).implementation
    if implementation == "onednn":
        norm = onednn.norm_of(mean, variance, gamma, eps)
        y = onednn.conv_transpose2x2_concat_conv3x3(skip, low, up_weight, up_bias, weight, bias, norm, slope)
        return y.contiguous(memory_format=format)
    if implementation == "triton" and low.shape[1] % 16 == 0:  # Of low's channels dispatch knows nothing.
        y = _by_kernel(skip, low, up_weight, up_bias, weight, bias, (mean, variance, gamma, eps), slope)
        return y.contiguous(memory_format=format)
    up_weight, up_bias = _parameters("conv_transpose2x2", low, up_weight, up_bias)
    up = torch.ops.fastunet.conv_transpose2x2(low, up_weight, up_bias, False)
    up = F.pad(up, [0, skip.shape[3] - up.shape[3], 0, skip.shape[2] - up.shape[2]])
    if mean is None:
        weight, bias = _parameters("conv3x3_bias_relu", skip, weight, bias)
        y, _ = torch.ops.fastunet.conv3x3_bias_relu(skip, up, weight, bias, slope, False, None, False, False)
    else:
        weight, _ = _parameters("conv3x3_batch_norm_relu", skip, weight, None)
        given = (gamma, bias, mean, variance, False, 0.0, eps, slope, False, False)
        y, *_ = torch.ops.fastunet.conv3x3_batch_norm_relu(skip, up, weight, *given)
    return y.contiguous(memory_format=format)


def _parameters(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As autocast gives them to an op on x: in x's dtype, but where the op prepares them once."""
    if dispatch.choose(op, x, weight).prepares:
        return weight, bias
    return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


def _by_kernel(
    skip: Tensor,
    low: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None, Tensor | None, float],
    slope: float | None,
) -> Tensor:
    from fastunet.kernels import conv_transpose2x2_concat_conv3x3 as kernels

    def make() -> kernels.Composed:
        # In float64, so that they are rounded but once, on a GPU as well, where float32 might be TF32.
        of_skip, of_up = weight.detach().split([skip.shape[1], weight.shape[1] - skip.shape[1]], dim=1)
        of_up = of_up.double()
        composed = folding.compose_upsampling(up_weight.detach().double(), of_up)
        border = None if up_bias is None else folding.upsampled_bias(up_bias.detach().double(), of_up)
        weights = kernels.arranged(of_skip, composed, border, skip.dtype)
        if skip.is_cuda:  # The next call may be on another stream.
            torch.cuda.current_stream(skip.device).synchronize()
        return weights

    weights = prepared((NAME, skip.dtype), [weight, up_weight, up_bias], make)
    return _launched(skip, low, tuple(weights), bias, norm, slope)


def _launched(
    skip: Tensor,
    low: Tensor,
    weights: tuple[Tensor, Tensor, Tensor | None],
    bias: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None, Tensor | None, float],
    slope: float | None,
) -> Tensor:
    from fastunet.kernels import conv_transpose2x2_concat_conv3x3 as kernels
    from fastunet.kernels.epilogue import Normalisation

    mean, variance, gamma, eps = norm
    given = None if mean is None or variance is None else Normalisation(mean, variance, gamma, eps)
    composed = kernels.Composed(*weights)
    return kernels.conv_transpose2x2_concat_conv3x3(skip, low, composed, bias, norm=given, negative_slope=slope)


def _forward_fake(
    skip: Tensor,
    low: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    gamma: Tensor | None,
    eps: float,
    slope: float | None,
) -> Tensor:
    n, _, h, w = skip.shape
    return empty_in(memory_format(skip, low, weight), skip, n, weight.shape[0], h, w)


def _composition(
    skip: Tensor,
    low: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    gamma: Tensor | None,
    eps: float,
    slope: float | None,
) -> Tensor:
    norm = None if mean is None or variance is None else (mean, variance, gamma, eps)
    weights = (up_weight, up_bias, weight, bias)
    return reference.conv_transpose2x2_concat_conv3x3_relu(skip, low, *weights, norm=norm, **arguments_of(slope))


_op = define(
    f"{NAME}(Tensor skip, Tensor low, Tensor up_weight, Tensor? up_bias, Tensor weight, Tensor? bias, Tensor? mean, "
    "Tensor? variance, Tensor? gamma, float eps, float? slope) -> Tensor",
    implementation=_forward,
    fake=_forward_fake,
    composition=_composition,
    weight=lambda *args: (args[4], False),
)
define_autocast(_op, cast=(0, 1))  # Of what runs, the op alone knows in which dtype it takes parameters.
