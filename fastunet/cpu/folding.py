"""Inference-time rewrites of weights: fewer ops that compute the same, to rounding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fold_batch_norm(
    weight: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals batch_norm(conv2d(x, weight), mean, variance, gamma, beta, eps).

    weight [Cout, Cin, kH, kW], the rest [Cout] or None. weight * s and beta - mean * s with s = gamma / sqrt(variance +
    eps).
    """
    scale = torch.rsqrt(variance + eps)
    scale = scale if gamma is None else scale * gamma
    shift = -mean * scale
    return weight * scale[:, None, None, None], shift if beta is None else shift + beta


def split_joined(weight: Tensor, skip: Tensor, up_first: bool) -> tuple[Tensor, Tensor]:
    """Return the shares of a weight [Cout, C1 + C2, 3, 3] that multiply skip and the upsampled image joined to it."""
    sizes = [skip.shape[1], weight.shape[1] - skip.shape[1]]
    if up_first:
        of_up, of_skip = weight.split(sizes[::-1], dim=1)
    else:
        of_skip, of_up = weight.split(sizes, dim=1)
    return of_skip, of_up


def compose_upsampling(up_weight: Tensor | None, weight: Tensor) -> Tensor:
    """The weight [Cl, Cout, 4, 4] by which conv_transpose2d(low, ., stride=2, padding=1) equals
    conv2d(conv_transpose2d(low, up_weight, stride=2), weight, padding=1), or that of low's pixels repeated, if None.

    up_weight [Cl, Cu, 2, 2], weight [Cout, Cu, 3, 3]. Output pixel 2i + t - 1 sees low pixel i through every a and p
    with a + 2 - p = t, the 2x2 tap a of the first and the 3x3 tap p of the second: one weight spread over the other.
    """
    spread = weight.flip(2, 3).transpose(0, 1)
    if up_weight is None:  # Each channel by ones: all four taps, in sums of their own.
        return F.avg_pool2d(F.pad(spread, [1, 1, 1, 1]), 2, stride=1, divisor_override=1)
    return F.conv_transpose2d(up_weight, spread)


def upsampled_bias(up_bias: Tensor, weight: Tensor) -> Tensor:
    """Return what an upsampling's bias adds to the convolution after it: conv2d(u, weight, padding=1) of an image u
    that is up_bias everywhere, but for a last row and column of zeros, such as pad it to an odd size.

    up_bias [Cu], weight [Cout, Cu, 3, 3]. The result [Cout, 5, 5] stands for one of any size: its second and third row
    and column repeat, since only the borders differ, where taps fall on zeros. Without padding the last is left out.
    """
    u = up_bias[None, :, None, None].expand(1, -1, 4, 4)
    return F.conv2d(F.pad(u, [0, 1, 0, 1]), weight, padding=1)[0]


def border_of(bias: Tensor) -> Tensor:
    """Return what `upsampled_bias` differs in from bias[:, 1, 1], which all inner pixels share: [5, 5, Cout]."""
    return (bias - bias[:, 1:2, 1:2]).permute(1, 2, 0).contiguous()


def add_border_(y: Tensor, border: Tensor) -> Tensor:
    """Add to y [N, Cout, H, W], in place, what `border_of` gives for its size: rows, then what is left of columns."""
    pixels = y.permute(0, 2, 3, 1)
    h, w = y.shape[2:]
    for to, of in _ends(h):
        rows = border[of]
        inner = rows[:, 1:2].expand(-1, w - 2 - w % 2, -1)
        pixels[:, to].add_(torch.cat([rows[:, :1], inner, rows[:, 3 : 4 + w % 2]], dim=1))
    between = pixels[:, 1 : h - 1 - h % 2]
    for to, of in _ends(w):
        between[:, :, to].add_(border[1, of])
    return y


def _ends(size: int) -> list[tuple[slice, slice]]:
    """Where a side of y has borders, and where the border has them: the first and the last, or, odd, the last two."""
    if size % 2 == 0:
        return [(slice(None, None, size - 1), slice(0, 4, 3))]
    return [(slice(0, 1), slice(0, 1)), (slice(size - 2, size), slice(3, 5))]


def move_bias_after_norm(
    bias: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor | None, Tensor]:
    """gamma and beta by which batch_norm(y, mean, variance, gamma, beta) equals batch_norm(y + bias, ...), all [Cout].

    beta + bias * gamma / sqrt(variance + eps), through which bias and gamma have their gradients.
    """
    scale = torch.rsqrt(variance.to(torch.promote_types(variance.dtype, torch.float32)) + eps)
    shift = bias * (scale if gamma is None else scale * gamma)
    moved = shift if beta is None else beta + shift
    like = bias if beta is None else beta
    return torch.ones_like(like) if gamma is None else gamma, moved.to(like.dtype)


def keep_idle_bias(bias: Tensor, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    """gamma and beta with nothing added but bias's gradient: a norm by its input's own statistics takes any constant
    away, so that a bias before it has a gradient of zeros, not none. What is not finite stays so.
    """
    if gamma is None or beta is None:
        return torch.ones_like(bias), bias * 0
    return gamma, beta + bias * 0
