"""conv3x3_relu_conv1x1: a U-Net's last convolution and its head in one kernel, for inference."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fastunet import checks, dispatch
from fastunet.cpu import onednn
from fastunet.cpu.onednn import activate_
from fastunet.ops.conv3x3_aten import convolve
from fastunet.ops.convolution import check_eps, check_inputs, check_norm, kernel_weight
from fastunet.ops.epilogue import arguments_of, slope_of
from fastunet.ops.registration import define, define_autocast, empty_in, memory_format
from fastunet.reference import functional as reference

NAME = "conv3x3_relu_conv1x1"


class ConvHeadArgs(NamedTuple):
    """conv2d(y, head_weight, head_bias) of y = activation(norm(conv2d(x, weight, padding=1)) + bias)."""

    x: Tensor  # [N, Cin, H, W]
    weight: Tensor  # [Cout, Cin, 3, 3]
    bias: Tensor | None  # [Cout]
    mean: Tensor | None  # [Cout], with the next two the norm, if any
    variance: Tensor | None
    gamma: Tensor | None
    eps: float
    slope: float | None
    head_weight: Tensor  # [K, Cout, 1, 1]
    head_bias: Tensor | None  # [K]
    sigmoid: bool

    def choice(self, *, training: bool = False) -> dispatch.Choice:
        return dispatch.choose(NAME, self.x, self.weight, training=training)


def conv3x3_relu_conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor, Tensor | None, float] | None = None,
    sigmoid: bool = False,
    relu: bool = True,
    negative_slope: float = 0.0,
) -> Tensor:
    """Compute conv2d(y, head_weight, head_bias) of y = relu(conv2d(x, weight, bias, padding=1)), which is not written.

    x [N, Cin, H, W], weight [Cout, Cin, 3, 3], bias [Cout] or None, head_weight [K, Cout, 1, 1], head_bias [K] or None;
    the result is [N, K, H, W], logits or, with sigmoid, probabilities. norm = (running_mean, running_var, gamma, eps)
    puts a batch norm by these statistics before the bias, which is then its beta; all [Cout], in x's dtype or float32.
    For inference: the result has no gradient, and asking for one raises. The rest as conv3x3_bias_relu.
    """
    mean, variance, gamma, eps = norm if norm is not None else (None, None, None, 0.0)
    check_inputs(NAME, x, None, weight)
    check_eps(NAME, eps)
    check_norm(NAME, x, weight, bias=bias, running_mean=mean, running_var=variance, gamma=gamma)
    classes = checks.check_convolution(NAME, head_weight, weight.shape[0], 1)
    checks.check_shape(NAME, "head_bias", head_bias, (classes,))
    checks.check_together(NAME, x, head_weight=head_weight, head_bias=head_bias)
    slope = slope_of(relu, negative_slope)
    args = ConvHeadArgs(x, weight, bias, mean, variance, gamma, eps, slope, head_weight, head_bias, sigmoid)
    return _op.invoke(args)


def _forward(args: ConvHeadArgs, choice: dispatch.Choice) -> Tensor:
    x, weight, bias, mean, variance, gamma, eps, slope, head_weight, head_bias, sigmoid = args
    format = memory_format(x, weight)
    if choice.implementation == "triton":
        return _forward_triton(args).contiguous(memory_format=format)
    if choice.implementation == "onednn":
        y = onednn.conv3x3(x, None, weight, bias, onednn.norm_of(mean, variance, gamma, eps), slope)
    else:
        y = convolve(x, None, weight, bias if mean is None else None, "aten")
        if mean is not None:
            y = F.batch_norm(y, mean, variance, gamma, bias, False, 0.0, eps)
        y = activate_(y, slope)
    z = F.conv2d(y, head_weight, head_bias)
    return (z.sigmoid_() if sigmoid else z).contiguous(memory_format=format)


def _forward_triton(args: ConvHeadArgs) -> Tensor:
    from fastunet.kernels.conv1x1 import conv1x1
    from fastunet.kernels.conv3x3.pointer import Head, Normalisation, conv3x3, conv3x3_head

    x, _, bias, mean, variance, gamma, eps, slope, head_weight, head_bias, sigmoid = args
    weight = kernel_weight(args.weight, x, training=False)
    norm = None if mean is None or variance is None else Normalisation(mean, variance, gamma, eps)
    tf32 = dispatch.tf32_allowed()
    head = Head(head_weight, head_bias, sigmoid)
    fused = conv3x3_head(x, weight, bias, head, norm=norm, negative_slope=slope, allow_tf32=tf32)
    if fused is not None:
        return fused
    y, _ = conv3x3(x, weight, bias, norm=norm, negative_slope=slope, allow_tf32=tf32)
    return conv1x1(y, head_weight, head_bias, activation="sigmoid" if sigmoid else None, allow_tf32=tf32)


def _forward_fake(args: ConvHeadArgs) -> Tensor:
    n, _, h, w = args.x.shape
    return empty_in(memory_format(args.x, args.weight), args.x, n, args.head_weight.shape[0], h, w)


def _composition(args: ConvHeadArgs) -> Tensor:
    x, weight, bias, mean, variance, gamma, eps, slope, head_weight, head_bias, sigmoid = args
    norm = None if mean is None or variance is None else (mean, variance, gamma, eps)
    options = {"norm": norm, "sigmoid": sigmoid, **arguments_of(slope)}
    return reference.conv3x3_relu_conv1x1(x, weight, bias, head_weight, head_bias, **options)


_op = define(NAME, ConvHeadArgs, 1, implementation=_forward, fake=_forward_fake, composition=_composition)
define_autocast(_op, cast=("x", "head_weight", "head_bias"), parameters=lambda args: ("weight",))
