"""Batch and instance norm around a convolution: statistics, normalisation with what follows it, and the way back.

The convolution leaves number, mean and M2 of each of its tiles. They are merged in a fixed order, by Chan's formula
(Chan, Golub and LeVeque 1983), which keeps a small variance beside a large mean. Statistics come in groups of images:
one of all images for batch norm, one of each for instance norm.

Forward, one pass over the convolution's output `raw` gives y = activation((raw - mean) * invstd * gamma + beta) and its
2x2 maxima. Backward, two passes over raw and the gradients: sums, then the gradient. Both recompute y instead of
reading it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from fastunet.kernels import config_passes, gpu
from fastunet.kernels.epilogue import Statistics
from fastunet.kernels.layout import dense, empty_packed, packed
from fastunet.kernels.tiles import activate, multiple, nan_max
from fastunet.kernels.windows import pixel_at, pooled_at, run_on_windows, window_origin
from torch import Tensor


# fmt: off
@triton.jit
def _merge(count_ptr, partial_ptr, rows, first, last, c, C, BLOCK_R: tl.constexpr):
    """Number, mean and M2 [K] of the channels c, over the partial statistics first to last, BLOCK_R at a time."""
    n = tl.zeros((c.shape[0],), tl.float32)
    mean = tl.zeros((c.shape[0],), tl.float32)
    m2 = tl.zeros((c.shape[0],), tl.float32)
    for r0 in range(first, last, BLOCK_R):
        r = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)
        at = partial_ptr + r[:, None] * C + c[None, :]
        mask = (r < last)[:, None] & (c < C)[None, :]
        counts = tl.load(count_ptr + r, mask=r < last, other=0.0)[:, None]
        means = tl.load(at, mask=mask, other=0.0)
        m2s = tl.load(at + rows.to(tl.int64) * C, mask=mask, other=0.0)
        # The block's own mean first, about one of its means: a sum of large means would round off their differences.
        pivot = tl.load(partial_ptr + tl.cast(r0, tl.int64) * C + c, mask=c < C, other=0.0)
        block_n = tl.sum(counts, 0)
        block_mean = pivot + tl.sum(counts * (means - pivot[None, :]), 0) / block_n
        # Rows past the last count nothing, but might lie so far from the mean that its square is infinite.
        deviation = tl.where(mask, means - block_mean[None, :], 0.0)
        block_m2 = tl.sum(m2s + counts * deviation * deviation, 0)
        # Then this block with the ones before it.
        together = n + block_n
        step = block_mean - mean
        m2 += block_m2 + step * (n * block_n / together) * step  # At first n is 0, and step the mean itself.
        mean += step * (block_n / together)
        n = together
    return n, mean, m2


@triton.jit(do_not_specialize=["rows", "per_group", "per_split", "splits"])
def merge_statistics_kernel(
    count_ptr, partial_ptr, out_count_ptr, out_partial_ptr, rows, per_group, per_split, splits, C,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """`splits` statistics for each group, of `per_split` rows each; the last of a group may have fewer."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    out = tl.program_id(0) // blocks_c
    first = out // splits * per_group + out % splits * per_split
    last = tl.minimum(first + per_split, (out // splits + 1) * per_group)
    n, mean, m2 = _merge(count_ptr, partial_ptr, rows, first, last, c, C, BLOCK_R)
    outs = tl.num_programs(0) // blocks_c
    at = out_partial_ptr + out.to(tl.int64) * C + c
    tl.store(at, mean, mask=c < C)
    tl.store(at + outs.to(tl.int64) * C, m2, mask=c < C)
    tl.store(out_count_ptr + out, tl.sum(n, 0) / BLOCK_C)  # The same in every channel.


@triton.jit(do_not_specialize=["rows", "per_group"])
def finish_statistics_kernel(
    count_ptr, partial_ptr, mean_ptr, invstd_ptr, running_mean_ptr, running_var_ptr, rows, per_group, C, eps, momentum,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """mean and invstd [groups, C] from `per_group` rows each; running statistics, if any, move by momentum.

    The running variance takes the unbiased one, as torch does.
    """
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(0) // blocks_c
    n, mean, m2 = _merge(
        count_ptr, partial_ptr, rows, group * per_group, (group + 1) * per_group, c, C, BLOCK_R
    )
    at = group.to(tl.int64) * C + c
    tl.store(mean_ptr + at, mean, mask=c < C)
    tl.store(invstd_ptr + at, 1.0 / tl.sqrt(m2 / n + eps), mask=c < C)
    if running_mean_ptr is not None:
        _move(running_mean_ptr + c, mean, momentum, c < C)
        _move(running_var_ptr + c, m2 / (n - 1.0), momentum, c < C)


@triton.jit
def _move(pointers, value, momentum, mask):
    old = tl.load(pointers, mask=mask).to(tl.float32)
    tl.store(pointers, (old + momentum * (value - old)).to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def load_affine(mean_ptr, invstd_ptr, gamma_ptr, beta_ptr, image, c, C, PER_IMAGE: tl.constexpr):
    """mean, invstd, gamma and beta of channels c as [1, K]; the first two [P, K], of each window's image, PER_IMAGE."""
    at = c[None, :]
    mask = at < C
    if PER_IMAGE:
        at = image[:, None] * C + at
    mean = tl.load(mean_ptr + at, mask=mask, other=0.0)
    invstd = tl.load(invstd_ptr + at, mask=mask, other=0.0)
    gamma = 1.0
    beta = 0.0
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        beta = tl.load(beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    return mean, invstd, gamma, beta


@triton.jit
def normalise_pixel(raw_ptr, offsets, mask, mean, invstd, gamma, beta, negative_slope, ACTIVATION: tl.constexpr):
    """(raw - mean) * invstd of one pixel of each window, and y as it is stored, both float32."""
    normal = (tl.load(raw_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - mean) * invstd
    # Not raw * scale + shift: that would cancel where the mean is far larger than the deviation.
    y = activate(normal * gamma + beta, negative_slope, ACTIVATION)
    return normal, y.to(raw_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _store_pixel(
    y_ptr, raw_ptr, image, h, w, c, mask, H, W, C, mean, invstd, gamma, beta, negative_slope, ACTIVATION: tl.constexpr
):
    offsets, mask = pixel_at(image, h, w, c, mask, H, W, C)
    _, y = normalise_pixel(raw_ptr, offsets, mask, mean, invstd, gamma, beta, negative_slope, ACTIVATION)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    return y, mask


@triton.jit(do_not_specialize=["windows", "H", "W"])
def normalise_kernel(
    raw_ptr, mean_ptr, invstd_ptr, gamma_ptr, beta_ptr, y_ptr, pooled_ptr, windows, H, W, C, negative_slope,
    PER_IMAGE: tl.constexpr, ACTIVATION: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """y = activation((raw - mean) * invstd * gamma + beta) and the maxima of its 2x2 windows, packed NHWC."""
    C = multiple(C, UNIT)
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    window = (tl.program_id(0) // blocks_c).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    image, h, w = window_origin(window, H, W)
    mask = (window < windows)[:, None] & (c < C)[None, :]
    if PER_IMAGE:  # Windows past the last image have no statistics.
        image = tl.where(window < windows, image, 0)
    mean, invstd, gamma, beta = load_affine(mean_ptr, invstd_ptr, gamma_ptr, beta_ptr, image, c, C, PER_IMAGE)
    y0, _ = _store_pixel(
        y_ptr, raw_ptr, image, h, w, c, mask, H, W, C, mean, invstd, gamma, beta, negative_slope, ACTIVATION)
    y1, _ = _store_pixel(
        y_ptr, raw_ptr, image, h, w + 1, c, mask, H, W, C, mean, invstd, gamma, beta, negative_slope, ACTIVATION)
    y2, _ = _store_pixel(
        y_ptr, raw_ptr, image, h + 1, w, c, mask, H, W, C, mean, invstd, gamma, beta, negative_slope, ACTIVATION)
    y3, whole = _store_pixel(
        y_ptr, raw_ptr, image, h + 1, w + 1, c, mask, H, W, C, mean, invstd, gamma, beta, negative_slope, ACTIVATION)
    if pooled_ptr is not None:
        pooled = nan_max(nan_max(y0, y1), nan_max(y2, y3)).to(pooled_ptr.dtype.element_ty)
        tl.store(pooled_ptr + pooled_at(image, h, w, c, H, W, C), pooled, mask=whole)
# fmt: on


def finish_statistics(
    statistics: Statistics,
    groups: int,
    *,
    eps: float,
    running: tuple[Tensor, Tensor] | None = None,
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / sqrt(variance + eps), float32 [groups, C], of a convolution's output by groups of its images.

    groups: 1 for batch norm, the number of images for instance norm. running: mean and variance [C], which move in
    place towards the batch's mean and unbiased variance by momentum (one group only).
    """
    device, (_, rows, channels) = statistics.count.device, statistics.partial.shape
    chosen = config_passes.statistics_config(channels)

    def run(kernel: Any, parts: int, statistics: Statistics, **own: Any) -> None:
        rows = len(statistics.count)
        read = {"count_ptr": statistics.count, "partial_ptr": statistics.partial, "C": channels}
        sizes = {"rows": rows, "per_group": rows // groups, "BLOCK_R": chosen.block_p}
        programs = parts * gpu.cdiv(channels, chosen.block_c)
        gpu.launch(kernel, programs, {**read, **sizes, **own}, chosen).run(device)

    per_split = config_passes.statistics_per_split(rows // groups)
    splits = gpu.cdiv(rows // groups, per_split)
    if splits > 1:
        merged = Statistics.empty(groups * splits, channels, device)
        outs = {"out_count_ptr": merged.count, "out_partial_ptr": merged.partial}
        run(merge_statistics_kernel, groups * splits, statistics, **outs, per_split=per_split, splits=splits)
        statistics = merged
    mean, invstd = (torch.empty((groups, channels), dtype=torch.float32, device=device) for _ in range(2))
    running_mean, running_var = running or (None, None)
    moving = {"running_mean_ptr": running_mean, "running_var_ptr": running_var, "momentum": momentum}
    run(finish_statistics_kernel, groups, statistics, mean_ptr=mean, invstd_ptr=invstd, eps=eps, **moving)
    return mean, invstd


@dataclass(frozen=True)
class Affine:
    """mean and invstd, float32 [groups, C], groups 1 or the number of images; gamma and beta [C], or both None."""

    mean: Tensor
    invstd: Tensor
    gamma: Tensor | None
    beta: Tensor | None

    def arguments(self) -> dict[str, Tensor | bool | None]:
        """Return the kernels' arguments."""
        return {
            "mean_ptr": self.mean,
            "invstd_ptr": self.invstd,
            "gamma_ptr": dense(self.gamma),
            "beta_ptr": dense(self.beta),
            "PER_IMAGE": self.mean.shape[0] > 1,
        }


def normalise(
    raw: Tensor, affine: Affine, negative_slope: float | None, *, pool: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return activation((raw - mean) * invstd * gamma + beta), [N, C, H, W], and with pool its 2x2 maxima;
    channels_last.

    raw [N, C, H, W]; negative_slope as in conv3x3.
    """
    channels, height, width = raw.shape[1:]
    y = empty_packed(raw, channels, height, width)
    pooled = empty_packed(raw, channels, height // 2, width // 2) if pool else None
    tensors = {"raw_ptr": packed(raw), **affine.arguments(), "y_ptr": y, "pooled_ptr": pooled}
    run_on_windows(normalise_kernel, raw, tensors, negative_slope)
    return y, pooled
