"""conv_transpose2x2_concat_conv3x3_relu: fused upsample + conv of a U-Net's decoder, for inference."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet import checks, dispatch
from fastunet.cpu import folding, onednn
from fastunet.cpu.weight_cache import prepared
from fastunet.ops.conv3x3 import ConvArgs
from fastunet.ops.conv_transpose2x2 import UpArgs
from fastunet.ops.convolution import check_eps, check_norm
from fastunet.ops.epilogue import arguments_of, slope_of
from fastunet.ops.registration import define, define_autocast, empty_in, memory_format
from fastunet.reference import functional as reference

NAME = "conv_transpose2x2_concat_conv3x3_relu"


class FusedUpArgs(NamedTuple):
    """activation(norm(conv2d(cat([skip, up]), weight, padding=1)) + bias) of up = conv_transpose2d(low, up_weight,
    up_bias, stride=2), or without up_weight low's pixels repeated, padded to skip's size.
    """

    skip: Tensor  # [N, C1, H, W]
    low: Tensor  # [N, Cl, H // 2, W // 2]
    up_weight: Tensor | None  # [Cl, C2, 2, 2]
    up_bias: Tensor | None  # [C2]
    weight: Tensor  # [Cout, C1 + C2, 3, 3]
    bias: Tensor | None  # [Cout]
    mean: Tensor | None  # [Cout], with the next two the norm, if any
    variance: Tensor | None
    gamma: Tensor | None
    eps: float
    slope: float | None
    up_first: bool  # cat([up, skip]) instead

    def choice(self, *, training: bool = False) -> dispatch.Choice:
        return dispatch.choose(NAME, self.skip, self.weight, training=training)


def conv_transpose2x2_concat_conv3x3_relu(
    skip: Tensor,
    low: Tensor,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor, Tensor | None, float] | None = None,
    relu: bool = True,
    negative_slope: float = 0.0,
    up_first: bool = False,
) -> Tensor:
    """Compute relu(conv2d(cat([skip, up]), weight, bias, padding=1)) of up = conv_transpose2d(low, up_weight, up_bias,
    stride=2), padded with zeros below and right where skip is one larger.

    skip [N, C1, H, W], low [N, Cl, H // 2, W // 2], up_weight [Cl, C2, 2, 2], up_bias [C2] or None, weight [Cout, C1 +
    C2, 3, 3], bias [Cout] or None; norm as in conv3x3_relu_conv1x1. With up_weight None (and up_bias), up is
    interpolate(low, scale_factor=2, mode="nearest"), and C2 = Cl. up_first: of cat([up, skip]), by which weight's
    channels are in that order. The result is [N, Cout, H, W]. On the CPU in
    float32, and by a kernel in 16 bits on sm_90 and above, up is never computed: the two weights are composed to one of
    4x4, exactly but for its rounding to the dtype, where otherwise up is rounded. For inference: the result has no
    gradient, and asking for one raises.
    """
    mean, variance, gamma, eps = norm if norm is not None else (None, None, None, 0.0)
    checks.check_activation(NAME, skip=skip, low=low)
    if min(skip.shape[2:]) < 2:
        raise checks.ShapeError(f"{NAME}: skip: expected at least 2x2 pixels, got {list(skip.shape)}")
    checks.check_shape(NAME, "low", low, (skip.shape[0], low.shape[1], skip.shape[2] // 2, skip.shape[3] // 2))
    up_channels = low.shape[1]
    if up_weight is not None:
        up_channels = checks.check_convolution(NAME, up_weight, low.shape[1], 2, transposed=True)
    elif up_bias is not None:
        raise checks.ConfigError(f"{NAME}: up_bias: expected None without up_weight, got {list(up_bias.shape)}")
    checks.check_shape(NAME, "up_bias", up_bias, (up_channels,))
    checks.check_convolution(NAME, weight, skip.shape[1] + up_channels, 3)
    checks.check_together(NAME, skip, low=low, up_weight=up_weight, up_bias=up_bias, weight=weight)
    check_eps(NAME, eps)
    check_norm(NAME, skip, weight, bias=bias, running_mean=mean, running_var=variance, gamma=gamma)
    slope = slope_of(relu, negative_slope)
    by = (mean, variance, gamma, eps, slope, up_first)
    return _op.invoke(FusedUpArgs(skip, low, up_weight, up_bias, weight, bias, *by))


def _forward(args: FusedUpArgs, choice: dispatch.Choice) -> Tensor:
    skip, low, up_weight, up_bias, weight, bias, mean, variance, gamma, eps, slope, up_first = args
    if choice.implementation == "onednn":
        norm = onednn.norm_of(mean, variance, gamma, eps)
        weights = (up_weight, up_bias, weight, bias)
        y = onednn.conv_transpose2x2_concat_conv3x3(skip, low, *weights, norm, slope, up_first)
    elif choice.implementation == "triton" and low.shape[1] % 16 == 0:  # Of low's channels dispatch knows nothing.
        y = _by_kernel(args)
    else:
        y = _in_two_steps(args)
    return y.contiguous(memory_format=memory_format(skip, low, weight))


def _in_two_steps(args: FusedUpArgs) -> Tensor:
    """Upsample by the op for it, then convolve by the op for that."""
    skip, low, up_weight, up_bias, weight, bias, mean, variance, gamma, eps, slope, up_first = args
    if up_weight is None:
        up = F.interpolate(low, scale_factor=2, mode="nearest")
    else:
        up = torch.ops.fastunet.conv_transpose2x2(*_cast(UpArgs(low, up_weight, up_bias), "weight", "bias"))
    up = F.pad(up, [0, skip.shape[3] - up.shape[3], 0, skip.shape[2] - up.shape[2]])
    norm = {"norm": "none"} if mean is None else {"norm": "batch", "gamma": gamma, "eps": eps}
    images = (up, skip) if up_first else (skip, up)
    conv = ConvArgs(*images, weight, bias, running_mean=mean, running_var=variance, slope=slope, **norm)
    conv = _cast(conv, "weight", "bias") if mean is None else _cast(conv, "weight")
    return torch.ops.fastunet.conv3x3(*conv)[0]


def _cast(args: Any, *names: str) -> Any:
    """Return parameters as autocast gives them to an op: in its image's dtype, but where the op prepares them once."""
    if args.choice().prepares:
        return args
    cast = {name: getattr(args, name) for name in names}
    return args._replace(**{name: None if t is None else t.to(args.x.dtype) for name, t in cast.items()})


def _by_kernel(args: FusedUpArgs) -> Tensor:
    from fastunet.kernels import conv_transpose2x2_concat_conv3x3 as kernels
    from fastunet.kernels.epilogue import Normalisation

    skip, low, up_weight, up_bias, weight, bias, mean, variance, gamma, eps, slope, up_first = args

    def make() -> kernels.Composed:
        # In float64, so that they are rounded but once, on a GPU as well, where float32 might be TF32.
        of_skip, of_up = folding.split_joined(weight.detach(), skip, up_first)
        of_up = of_up.double()
        composed = folding.compose_upsampling(None if up_weight is None else up_weight.detach().double(), of_up)
        border = None if up_bias is None else folding.upsampled_bias(up_bias.detach().double(), of_up)
        return kernels.arranged(of_skip, composed, border, skip.dtype)

    weights = prepared((NAME, skip.dtype, up_first), [weight, up_weight, up_bias], make)
    norm = None if mean is None or variance is None else Normalisation(mean, variance, gamma, eps)
    return kernels.conv_transpose2x2_concat_conv3x3(skip, low, weights, bias, norm=norm, negative_slope=slope)


def _forward_fake(args: FusedUpArgs) -> Tensor:
    n, _, h, w = args.skip.shape
    return empty_in(memory_format(args.skip, args.low, args.weight), args.skip, n, args.weight.shape[0], h, w)


def _composition(args: FusedUpArgs) -> Tensor:
    skip, low, up_weight, up_bias, weight, bias, mean, variance, gamma, eps, slope, up_first = args
    norm = None if mean is None or variance is None else (mean, variance, gamma, eps)
    options: dict[str, Any] = {"norm": norm, "up_first": up_first, **arguments_of(slope)}
    return reference.conv_transpose2x2_concat_conv3x3_relu(skip, low, up_weight, up_bias, weight, bias, **options)


_op = define(NAME, FusedUpArgs, 1, implementation=_forward, fake=_forward_fake, composition=_composition)
define_autocast(_op, cast=("skip", "low"))  # Of what runs, the op alone knows in which dtype it takes parameters.
