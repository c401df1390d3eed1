"""The sums over pixels that segmentation losses are made of, and their gradient: one pass over the logits each.

Logits, target and mask are addressed by strides of image, channel and pixel, so contiguous and channels_last tensors
are read as they are; others, whose pixels have no single stride, are copied first. A program holds all channels of its
pixels, which is what a softmax needs. The sums are float32, first by thread, then by program, then over the programs of
an image in a fixed order: no atomics, so the same inputs give the same bits on every run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from fastunet.kernels import config_passes, gpu
from fastunet.kernels.reduction import sum_rows
from fastunet.kernels.tiles import nan_max
from torch import Tensor


# fmt: off
@triton.jit
def _load_logits(ptr, image, p, c, inside, stride_n, stride_c, stride_p):
    """float32 [P, C] of pixels p and channels c, both int64; zero outside."""
    offsets = image * stride_n + p[:, None] * stride_p + c[None, :] * stride_c
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_mask(ptr, image, p, pixels, stride_n, stride_p):
    """float32 [P, 1]; without a mask, one. Zero past the last pixel where there is a mask."""
    if ptr is None:
        return tl.full((p.shape[0], 1), 1.0, tl.float32)
    else:
        return tl.load(ptr + image * stride_n + p * stride_p, mask=p < pixels, other=0).to(tl.float32)[:, None]


@triton.jit
def _load_target(ptr, m, image, p, c, inside, pixels, C, stride_n, stride_c, stride_p, INDEX: tl.constexpr):
    """float32 [P, C]: the values, or with INDEX the one-hot form of class indices; zero outside.

    An index that is no class is NaN in every channel, unless the mask m [P, 1] is zero there.
    """
    if INDEX:
        label = tl.load(ptr + image * stride_n + p * stride_p, mask=p < pixels, other=0).to(tl.int64)[:, None]
        t = tl.where(inside & (label == c[None, :]), 1.0, 0.0)
        return tl.where(((label < 0) | (label >= C)) & (m != 0.0), float("nan"), t)
    else:
        offsets = image * stride_n + p[:, None] * stride_p + c[None, :] * stride_c
        return tl.load(ptr + offsets, mask=inside, other=0).to(tl.float32)


@triton.jit
def _sigmoid(x):
    """sigmoid(x), 1 - sigmoid(x) and log(1 + exp(-|x|)), each good to a few of its own last places."""
    e = tl.exp(-tl.abs(x))
    rounded = 1.0 + e
    s = 1.0 / rounded
    # log of the rounded sum, plus what rounding lost, e - (rounded - 1), times the derivative.
    log_sum = tl.log(rounded) + (e - (rounded - 1.0)) * s
    return tl.where(x >= 0, s, e * s), tl.where(x >= 0, e * s, s), log_sum


@triton.jit
def _softmax(x, c, C):
    """Softmax over the channels [P, C], and minus its logarithm. Channels past the last have p = 0."""
    top = tl.reduce(tl.where(c[None, :] < C, x, float("-inf")), 1, nan_max)[:, None]
    z = x - top
    e = tl.where(c[None, :] < C, tl.exp(z), 0.0)
    total = tl.sum(e, 1)[:, None]
    return e / total, tl.log(total) - z


@triton.jit(do_not_specialize=["images", "blocks", "blocks_per_split", "splits"])
def segmentation_sums_kernel(
    logits_ptr, target_ptr, mask_ptr, partial_ptr, images, pixels, C, blocks, blocks_per_split, splits,
    logits_n, logits_c, logits_p, target_n, target_c, target_p, mask_n, mask_p,
    SOFTMAX: tl.constexpr, SQUARED: tl.constexpr, ENTROPY: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """partial[s, r, n, c] = sum over the pixels of split s of row r's term, with p = activation(logits), t, m:

    m^2 p t;  m p or m^2 p^2;  m t or m^2 t^2;  with ENTROPY m t (-log p), and for sigmoid m (1 - t) (-log(1 - p)).
    One program owns one split of one image, and all its channels.
    """
    split = tl.program_id(0) % splits
    image = (tl.program_id(0) // splits).to(tl.int64)
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    overlap = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    predicted = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    truth = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    positive = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    negative = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    first = split * blocks_per_split
    p = first.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    for _ in range(first, tl.minimum(first + blocks_per_split, blocks)):
        inside = (p < pixels)[:, None] & (c < C)[None, :]
        x = _load_logits(logits_ptr, image, p, c, inside, logits_n, logits_c, logits_p)
        m = _load_mask(mask_ptr, image, p, pixels, mask_n, mask_p)
        t = _load_target(
            target_ptr, m, image, p, c, inside, pixels, C, target_n, target_c, target_p, INDEX
        )
        if SOFTMAX:
            prob, minus_log = _softmax(x, c, C)
        else:
            prob, _, log_sum = _sigmoid(x)
            minus_log = tl.where(x >= 0, 0.0, -x) + log_sum
        pm = prob * m
        tm = t * m
        overlap += tl.where(inside, pm * tm, 0.0)
        predicted += tl.where(inside, pm * pm if SQUARED else pm, 0.0)
        truth += tl.where(inside, tm * tm if SQUARED else tm, 0.0)
        if ENTROPY:
            # A class without probability costs nothing where it is not the label: zero times infinity is NaN.
            counted = inside & (t != 0.0) if INDEX else inside
            positive += tl.where(counted, tm * minus_log, 0.0)
            if not SOFTMAX:
                minus_log_rest = tl.where(x <= 0, 0.0, x) + log_sum
                negative += tl.where(inside, (1.0 - t) * minus_log_rest * m, 0.0)
        p += BLOCK_P

    # partial is [splits, rows, images, C].
    rows = 3 + (1 if ENTROPY else 0) + (1 if ENTROPY and not SOFTMAX else 0)
    out = partial_ptr + (split.to(tl.int64) * rows * images + image) * C + c
    row = images.to(tl.int64) * C
    tl.store(out, tl.sum(overlap, 0), mask=c < C)
    tl.store(out + row, tl.sum(predicted, 0), mask=c < C)
    tl.store(out + 2 * row, tl.sum(truth, 0), mask=c < C)
    if ENTROPY:
        tl.store(out + 3 * row, tl.sum(positive, 0), mask=c < C)
        if not SOFTMAX:
            tl.store(out + 4 * row, tl.sum(negative, 0), mask=c < C)


@triton.jit(do_not_specialize=["images", "blocks"])
def segmentation_sums_grad_kernel(
    grad_ptr, logits_ptr, target_ptr, mask_ptr, out_ptr, images, pixels, C, blocks,
    logits_n, logits_c, logits_p, target_n, target_c, target_p, mask_n, mask_p, out_n, out_c, out_p,
    SOFTMAX: tl.constexpr, SQUARED: tl.constexpr, ENTROPY: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """out = the gradient of the logits, from grad [rows, images, C], that of the sums.

    With dp = m^2 t grad0 + (m or 2 m^2 p) grad1 and w = m t grad3:
    sigmoid  dp p (1 - p) - w (1 - p) + m (1 - t) p grad4;   softmax  p (dp - sum(dp p)) + p sum(w) - w.
    One program owns BLOCK_P pixels of one image, and all their channels.
    """
    image = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    inside = (p < pixels)[:, None] & (c < C)[None, :]
    x = _load_logits(logits_ptr, image, p, c, inside, logits_n, logits_c, logits_p)
    m = _load_mask(mask_ptr, image, p, pixels, mask_n, mask_p)
    t = _load_target(target_ptr, m, image, p, c, inside, pixels, C, target_n, target_c, target_p, INDEX)
    grad_ptr += image * C + c
    row = images.to(tl.int64) * C
    of_overlap = tl.load(grad_ptr, mask=c < C, other=0.0)[None, :]
    of_predicted = tl.load(grad_ptr + row, mask=c < C, other=0.0)[None, :]

    if SOFTMAX:
        prob, _ = _softmax(x, c, C)
    else:
        prob, rest, _ = _sigmoid(x)
    dp = of_overlap * (t * m) + of_predicted * (2.0 * (prob * m) if SQUARED else 1.0)
    if SOFTMAX:
        g = prob * (dp - tl.sum(dp * prob, 1)[:, None])
    else:
        g = dp * (prob * rest)
    if ENTROPY:
        w = tl.load(grad_ptr + 3 * row, mask=c < C, other=0.0)[None, :] * t
        if SOFTMAX:
            g += prob * tl.sum(w, 1)[:, None] - w
        else:
            of_negative = tl.load(grad_ptr + 4 * row, mask=c < C, other=0.0)[None, :]
            g += of_negative * (1.0 - t) * prob - w * rest
    offsets = image * out_n + p[:, None] * out_p + c[None, :] * out_c
    tl.store(out_ptr + offsets, (g * m).to(out_ptr.dtype.element_ty), mask=inside)
# fmt: on


def _arguments(
    logits: Tensor, target: Tensor, mask: Tensor | None, *, softmax: bool, squared: bool, entropy: bool
) -> dict[str, Any]:
    """Return what both kernels take."""
    images, channels, height, width = logits.shape
    return {
        "images": images,
        "pixels": height * width,
        "C": channels,
        **_tensor("logits", logits),
        **_tensor("target", target),
        **({"mask_ptr": None, "mask_n": 0, "mask_p": 0} if mask is None else _tensor("mask", mask)),
        "SOFTMAX": softmax,
        "SQUARED": squared,
        "ENTROPY": entropy,
        "INDEX": target.shape != logits.shape,
    }


def _pixel_stride(t: Tensor) -> int | None:
    """Return the step from each pixel of an image to the next, row after row; None if it is not always the same."""
    (height, width), (down, right) = t.shape[2:], t.stride()[2:]
    if width == 1:
        return down
    return right if height == 1 or down == width * right else None


def _tensor(name: str, t: Tensor) -> dict[str, Any]:
    """Return a tensor and its strides of image, channel and pixel, as the kernels' parameters.

    It is a contiguous copy where its pixels have no single stride; truth values are bytes.
    """
    stride = _pixel_stride(t)
    if stride is None:
        t, stride = t.contiguous(), 1
    t = t.view(torch.uint8) if t.dtype == torch.bool else t
    return {f"{name}_ptr": t, f"{name}_n": t.stride(0), f"{name}_c": t.stride(1), f"{name}_p": stride}


def segmentation_sums(
    logits: Tensor, target: Tensor, mask: Tensor | None, *, softmax: bool, squared: bool, entropy: bool
) -> Tensor:
    """Return the sums [rows, N, C], float32, of segmentation_sums_kernel: 3 rows, with entropy 5, for softmax 4.

    logits [N, C, H, W]; target of the same shape, or class indices [N, 1, H, W] where C > 1; mask [N, 1, H, W] or
    None. Any dtypes and strides.
    """
    rows = 3 if not entropy else 4 if softmax else 5
    sums = torch.empty((rows, *logits.shape[:2]), dtype=torch.float32, device=logits.device)
    if logits.numel() == 0:
        return sums.zero_()
    chosen = replace(config_passes.pixel_config(logits.shape[1]), num_stages=2)
    pixels = logits.shape[2] * logits.shape[3]
    blocks = gpu.cdiv(pixels, chosen.block_p)
    per_split = gpu.cdiv(blocks, config_passes.pixel_splits(pixels, chosen))
    splits = gpu.cdiv(blocks, per_split)
    partial = torch.empty((splits, sums.numel()), dtype=torch.float32, device=logits.device)
    arguments = {
        **_arguments(logits, target, mask, softmax=softmax, squared=squared, entropy=entropy),
        "partial_ptr": partial,
        "blocks": blocks,
        "blocks_per_split": per_split,
        "splits": splits,
    }
    gpu.launch(segmentation_sums_kernel, logits.shape[0] * splits, arguments, chosen).run(logits.device)
    sum_rows(partial, sums)
    return sums


def segmentation_sums_grad(
    grad: Tensor, logits: Tensor, target: Tensor, mask: Tensor | None, *, softmax: bool, squared: bool
) -> Tensor:
    """Return the gradient of segmentation_sums' logits from that of its sums, grad [rows, N, C].

    Returns a tensor of the logits' shape and dtype, channels_last where their channels lie side by side.
    """
    side_by_side = logits.shape[1] > 1 and logits.stride(1) == 1
    format = torch.channels_last if side_by_side else torch.contiguous_format
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device, memory_format=format)
    if logits.numel() == 0:
        return out
    chosen = config_passes.pixel_config(logits.shape[1])
    blocks = gpu.cdiv(logits.shape[2] * logits.shape[3], chosen.block_p)
    arguments = {
        **_arguments(logits, target, mask, softmax=softmax, squared=squared, entropy=len(grad) > 3),
        "grad_ptr": grad.contiguous(),
        "blocks": blocks,
        **_tensor("out", out),
    }
    gpu.launch(segmentation_sums_grad_kernel, logits.shape[0] * blocks, arguments, chosen).run(logits.device)
    return out
