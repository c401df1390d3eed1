"""The way back through activation, pooling and norm: sums over each group, then the gradient, in a pass each.

With g the gradient carried through pooling and activation, m the number of values of a group, and normal = (raw - mean)
* invstd (Ioffe and Szegedy 2015, section 3):

    grad beta = sum(g)    grad gamma = sum(g * normal)    grad raw = gamma * invstd * (g - (sum(g) + normal * sum(g *
    normal)) / m)

Where the statistics were given instead of taken from raw, the last is gamma * invstd * g. Without a norm, where raw is
the activation's output itself, it is g.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastunet.kernels import config_passes, gpu
from fastunet.kernels.layout import empty_packed, packed
from fastunet.kernels.norm import Affine, load_affine, normalise_pixel
from fastunet.kernels.reduction import sum_rows
from fastunet.kernels.tiles import activate_grad, multiple
from fastunet.kernels.windows import (
    pixel_at,
    pooled_at,
    run_on_windows,
    window_arguments,
    window_origin,
    winner_of,
)
from torch import Tensor


# fmt: off
@triton.jit
def _pixel(raw_ptr, image, h, w, c, mask, H, W, C, mean, invstd, gamma, beta, negative_slope, ACTIVATION: tl.constexpr):
    offsets, mask = pixel_at(image, h, w, c, mask, H, W, C)
    if mean is None:
        y = tl.load(raw_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        normal = y
    else:
        normal, y = normalise_pixel(raw_ptr, offsets, mask, mean, invstd, gamma, beta, negative_slope, ACTIVATION)
    return offsets, mask, normal, y


@triton.jit
def _grad(grad_y_ptr, offsets, mask, y, routed, negative_slope, ACTIVATION: tl.constexpr):
    """g of one pixel of each window: the direct gradient and the pool's, carried through the activation."""
    if grad_y_ptr is not None:
        routed += tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return activate_grad(routed, y, negative_slope, ACTIVATION)


@triton.jit
def _window(
    raw_ptr, grad_y_ptr, grad_pooled_ptr, mean, invstd, gamma, beta, image, h, w, c, mask, H, W, C, negative_slope,
    ACTIVATION: tl.constexpr,
):
    """Offsets, mask, normal and g [P, K] of each of the windows' four pixels, first row first; g is 0 where masked."""
    at0, mask0, normal0, y0 = _pixel(
        raw_ptr, image, h, w, c, mask, H, W, C, mean, invstd, gamma, beta, negative_slope, ACTIVATION)
    at1, mask1, normal1, y1 = _pixel(
        raw_ptr, image, h, w + 1, c, mask, H, W, C, mean, invstd, gamma, beta, negative_slope, ACTIVATION)
    at2, mask2, normal2, y2 = _pixel(
        raw_ptr, image, h + 1, w, c, mask, H, W, C, mean, invstd, gamma, beta, negative_slope, ACTIVATION)
    at3, mask3, normal3, y3 = _pixel(
        raw_ptr, image, h + 1, w + 1, c, mask, H, W, C, mean, invstd, gamma, beta, negative_slope, ACTIVATION)
    routed = tl.zeros(mask.shape, tl.float32)
    if grad_pooled_ptr is not None:
        # Only a whole window has its fourth pixel inside the image.
        routed = tl.load(grad_pooled_ptr + pooled_at(image, h, w, c, H, W, C), mask=mask3, other=0.0).to(tl.float32)
    winner = winner_of(y0, y1, y2, y3)
    g0 = _grad(grad_y_ptr, at0, mask0, y0, tl.where(winner == 0, routed, 0.0), negative_slope, ACTIVATION)
    g1 = _grad(grad_y_ptr, at1, mask1, y1, tl.where(winner == 1, routed, 0.0), negative_slope, ACTIVATION)
    g2 = _grad(grad_y_ptr, at2, mask2, y2, tl.where(winner == 2, routed, 0.0), negative_slope, ACTIVATION)
    g3 = _grad(grad_y_ptr, at3, mask3, y3, tl.where(winner == 3, routed, 0.0), negative_slope, ACTIVATION)
    return (at0, mask0, normal0, g0, at1, mask1, normal1, g1, at2, mask2, normal2, g2, at3, mask3, normal3, g3)


@triton.jit(do_not_specialize=["windows", "splits", "per_split", "H", "W"])
def norm_sums_kernel(
    raw_ptr, grad_y_ptr, grad_pooled_ptr, mean_ptr, invstd_ptr, gamma_ptr, beta_ptr, partial_ptr,
    windows, splits, per_split, H, W, C, negative_slope,
    PER_IMAGE: tl.constexpr, ACTIVATION: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """partial[s, group] = sum(g), sum(g * normal) [2, C] over part s of a group's `windows` windows.

    A program owns a part of a group and BLOCK_C channels.
    """
    C = multiple(C, UNIT)
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(0) // blocks_c % splits
    group = tl.program_id(0) // (blocks_c * splits)
    groups = tl.num_programs(0) // (blocks_c * splits)
    first = split * per_split
    last = tl.minimum(first + per_split, windows)
    sum_g = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_gn = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    mean, invstd, gamma, beta = load_affine(
        mean_ptr, invstd_ptr, gamma_ptr, beta_ptr, group.to(tl.int64) + tl.zeros((1,), tl.int64), c, C, PER_IMAGE
    )
    for window0 in range(first, last, BLOCK_P):
        window = window0 + tl.arange(0, BLOCK_P)
        image, h, w = window_origin(group.to(tl.int64) * windows + window, H, W)
        mask = (window < last)[:, None] & (c < C)[None, :]
        _, _, n0, g0, _, _, n1, g1, _, _, n2, g2, _, _, n3, g3 = _window(
            raw_ptr, grad_y_ptr, grad_pooled_ptr, mean, invstd, gamma, beta, image, h, w, c, mask, H, W, C,
            negative_slope, ACTIVATION,
        )
        sum_g += (g0 + g1) + (g2 + g3)
        sum_gn += (g0 * n0 + g1 * n1) + (g2 * n2 + g3 * n3)
    at = partial_ptr + (split * groups + group).to(tl.int64) * (2 * C) + c
    tl.store(at, tl.sum(sum_g, 0), mask=c < C)
    tl.store(at + C, tl.sum(sum_gn, 0), mask=c < C)


@triton.jit
def _raw_grad(offsets, mask, normal, g, out_ptr, sum_g, sum_gn, scale, per_value, GIVEN: tl.constexpr):
    """Store scale * (g - (sum_g + normal * sum_gn) / m), without the sums where the statistics were GIVEN."""
    if not GIVEN:
        g -= (sum_g + normal * sum_gn) * per_value
    if scale is not None:
        g *= scale
    tl.store(out_ptr + offsets, g.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["windows", "H", "W"])
def norm_grad_kernel(
    raw_ptr, grad_y_ptr, grad_pooled_ptr, mean_ptr, invstd_ptr, gamma_ptr, beta_ptr, sums_ptr, out_ptr,
    windows, H, W, C, negative_slope, per_value, GIVEN: tl.constexpr,
    PER_IMAGE: tl.constexpr, ACTIVATION: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """The gradient of raw. sums [groups, 2, C] are those of norm_sums_kernel; per_value is 1 / m.

    A gradient that is None counts as zero. A program owns BLOCK_P windows of 2x2 pixels and BLOCK_C channels. Pixels of
    windows that are not whole receive nothing from the pool.
    """
    C = multiple(C, UNIT)
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    window = (tl.program_id(0) // blocks_c).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    image, h, w = window_origin(window, H, W)
    mask = (window < windows)[:, None] & (c < C)[None, :]
    mean, invstd, gamma, beta = mean_ptr, invstd_ptr, gamma_ptr, beta_ptr
    if mean_ptr is not None:
        image = tl.where(window < windows, image, 0)  # Windows past the last image have no statistics.
        mean, invstd, gamma, beta = load_affine(mean_ptr, invstd_ptr, gamma_ptr, beta_ptr, image, c, C, PER_IMAGE)
    sum_g = mean
    sum_gn = mean
    if not GIVEN:
        at = c[None, :]
        if PER_IMAGE:
            at = image[:, None] * (2 * C) + at
        sum_g = tl.load(sums_ptr + at, mask=(c < C)[None, :], other=0.0)
        sum_gn = tl.load(sums_ptr + at + C, mask=(c < C)[None, :], other=0.0)
    at0, mask0, n0, g0, at1, mask1, n1, g1, at2, mask2, n2, g2, at3, mask3, n3, g3 = _window(
        raw_ptr, grad_y_ptr, grad_pooled_ptr, mean, invstd, gamma, beta, image, h, w, c, mask, H, W, C,
        negative_slope, ACTIVATION,
    )
    scale = None
    if mean_ptr is not None:
        scale = invstd * gamma
    _raw_grad(at0, mask0, n0, g0, out_ptr, sum_g, sum_gn, scale, per_value, GIVEN)
    _raw_grad(at1, mask1, n1, g1, out_ptr, sum_g, sum_gn, scale, per_value, GIVEN)
    _raw_grad(at2, mask2, n2, g2, out_ptr, sum_g, sum_gn, scale, per_value, GIVEN)
    _raw_grad(at3, mask3, n3, g3, out_ptr, sum_g, sum_gn, scale, per_value, GIVEN)
# fmt: on


def norm_grad(
    raw: Tensor,
    grad_y: Tensor | None,
    grad_pooled: Tensor | None,
    affine: Affine,
    negative_slope: float | None,
    *,
    statistics_given: bool,
    needs_raw: bool = True,
    needs_affine: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return gradients of raw [N, C, H, W], gamma and beta [C] from those of normalise's outputs, None for zero but not
    both.

    statistics_given: they were no function of raw, as in inference. What is not needed is None. The gradient of raw is
    channels_last and of its dtype; the others are float32.
    """
    (batch, channels, height, width), groups = raw.shape, affine.mean.shape[0]
    out = empty_packed(raw, channels, height, width)
    sums = torch.empty((groups, 2, channels), dtype=torch.float32, device=raw.device)
    chosen = config_passes.norm_grad_config(channels)
    grads = {"grad_y_ptr": packed(grad_y), "grad_pooled_ptr": packed(grad_pooled)}
    arguments = {"raw_ptr": packed(raw), **grads, **affine.arguments(), **window_arguments(raw.shape, negative_slope)}
    windows, blocks_c = arguments["windows"], gpu.cdiv(channels, chosen.block_c)
    if needs_affine or not statistics_given:
        per_group = windows // groups
        splits = config_passes.norm_grad_splits(per_group, channels, gpu.target(raw.device))
        per_split = gpu.cdiv(per_group, splits)
        splits = gpu.cdiv(per_group, per_split)
        partial = torch.empty((splits, sums.numel()), dtype=torch.float32, device=raw.device)
        parts = {"partial_ptr": partial, "windows": per_group, "splits": splits, "per_split": per_split}
        gpu.launch(norm_sums_kernel, groups * splits * blocks_c, arguments | parts, chosen).run(raw.device)
        sum_rows(partial, sums)
    if needs_raw:
        arguments |= {"sums_ptr": sums, "out_ptr": out, "GIVEN": statistics_given}
        arguments["per_value"] = groups / (batch * height * width)
        grid = gpu.cdiv(windows, chosen.block_p) * blocks_c
        gpu.launch(norm_grad_kernel, grid, arguments, chosen).run(raw.device)
    total = sums.sum(0) if groups > 1 else sums[0]
    return (
        out if needs_raw else None,
        total[1] if needs_affine else None,
        total[0] if needs_affine else None,
    )


def activation_grad(
    y: Tensor, grad_y: Tensor | None, grad_pooled: Tensor | None, negative_slope: float | None
) -> Tensor:
    """Return the gradient of what goes into an activation of output y [N, C, H, W], and a 2x2 pooling of that.

    grad_y [N, C, H, W] and grad_pooled [N, C, H // 2, W // 2] are the gradients of y and of its maxima, None for zero
    but not both. A window's gradient goes to its maximum, by torch's rule to the first of equals and to the last NaN;
    the activation's slope follows from y's sign. Returns a channels_last tensor of y's dtype.
    """
    out = empty_packed(y, *y.shape[1:])
    tensors = {"raw_ptr": packed(y), "grad_y_ptr": packed(grad_y), "grad_pooled_ptr": packed(grad_pooled)}
    without = dict.fromkeys(("mean_ptr", "invstd_ptr", "gamma_ptr", "beta_ptr", "sums_ptr"))
    options = {"out_ptr": out, "per_value": 0.0, "GIVEN": True, "PER_IMAGE": False}
    run_on_windows(norm_grad_kernel, y, {**tensors, **without, **options}, negative_slope)
    return out
