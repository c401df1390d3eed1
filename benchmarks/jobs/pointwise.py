"""The other kernels: norms, pooling, transposed convolution, head, sums, losses."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from fastunet.kernels import config_passes, config_pixels, gpu

from . import Family, Job, per_channel

# --- the norms: merging statistics, normalising, and the way back ---

_NORM_OPS = ("merge_statistics", "finish_statistics", "normalise", "norm_sums", "norm_grad")


def _norm_jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """shape: channels, and whether statistics are per image."""
    if allow_tf32 or dtype == torch.float16:
        return
    make = functools.partial(Job, dtype=dtype, allow_tf32=False, capability=target.capability)
    for op in _NORM_OPS[:2]:
        yield from (make(op, shape=(channels, False)) for channels in (16, 32))
    for channels in (*config_passes.norm_grad_configs().values(), 100):
        for op in _NORM_OPS[2:]:
            yield from (make(op, shape=(channels, per_image)) for per_image in (False, True))


def _run_norm(job: Job) -> int:
    from fastunet.kernels import norm, norm_grad  # Late, as below: triton is for the compiling process alone.
    from fastunet.kernels.epilogue import Statistics

    channels, per_image = job.shape
    groups = 2 if per_image else 1
    mean, parameter = per_channel(groups, channels), job.tensor(channels)
    if job.op in _NORM_OPS[:2]:
        statistics = Statistics(per_channel(4096), per_channel(2, 4096, channels))
        norm.finish_statistics(statistics, groups, eps=1e-5, running=(parameter, parameter), momentum=0.1)
        return _NORM_OPS.index(job.op)
    affine = norm.Affine(mean, mean, parameter, parameter)
    raw, pooled = job.pixels(channels, 64, 64), job.pixels(channels, 32, 32)
    if job.op == "normalise":
        norm.normalise(raw, affine, 0.0, pool=True)
        return 0
    norm_grad.norm_grad(raw, raw, pooled, affine, 0.0, statistics_given=False)
    return 0 if job.op == "norm_sums" else 2


# --- max_pool2x2, whose gradient is one of the convolutions' family, and sums of partial sums ---


def _pool_jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """Every config in bf16, and with channels that load no vectors; of the other dtypes, and on sm_86, one."""
    if allow_tf32:
        return
    several = (*config_passes.pointwise_configs().values(), 100)
    for channels in several if dtype == torch.bfloat16 and target.capability != 86 else (64,):
        yield Job("max_pool", dtype, False, target.capability, channels)


def _run_pool(job: Job) -> int:
    from fastunet.kernels.max_pool2x2 import max_pool2x2

    max_pool2x2(job.pixels(job.shape, 64, 64))
    return 0


def _sum_jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """For each dtype of the sums: with one output and with two."""
    if not allow_tf32:
        yield from (Job("sum_rows", dtype, False, target.capability, outputs) for outputs in (1, 2))


def _run_sum(job: Job) -> int:
    from fastunet.kernels.reduction import sum_rows

    sizes = (4096,) if job.shape == 1 else (4032, 64)
    sum_rows(per_channel(16, 4096), *(job.tensor(size) for size in sizes))
    return 0


# --- conv_transpose2x2 ---

_TRANSPOSE_OPS = ("transpose", "transpose_contiguous", "transpose_grad", "transpose_weights")


def _transpose_jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """Every config; of fp16, which compiles like bf16, and sm_86, like sm_89, the one for 64 channels on both sides.

    shape: input and output channels.
    """
    make = functools.partial(Job, dtype=dtype, allow_tf32=allow_tf32, capability=target.capability)
    forward = config_pixels.pixel_product_configs(dtype, target, allow_tf32=allow_tf32).values()
    weights = config_pixels.pixel_weight_grad_configs(dtype, target, allow_tf32=allow_tf32).values()
    if dtype == torch.float16 or target.capability == 86:
        forward = weights = [(64, 64)]
    for c_in, c_out in forward:
        yield make("transpose_grad", shape=(c_out, c_in))
        if config_pixels.subpixel_tile_config(c_in, c_out, dtype, target) is None:  # Else descriptors are used.
            yield make("transpose", shape=(c_in, c_out))
            if (c_in, c_out) == max(forward):
                yield make("transpose_contiguous", shape=(c_in, c_out))
    for channels in config_pixels.subpixel_tile_configs(dtype, target).values():
        yield make("transpose", shape=channels)
    for channels in weights:
        yield make("transpose_weights", shape=channels)


def _run_transpose(job: Job) -> int:
    from fastunet.kernels import conv_transpose2x2 as kernels

    c_in, c_out = job.shape
    x, y = job.pixels(c_in, 32, 32), job.pixels(c_out, 64, 64)
    layout = torch.contiguous_format if job.op == "transpose_contiguous" else torch.channels_last
    weight, bias = job.tensor(c_in, c_out, 2, 2, layout=layout), job.tensor(c_out)
    if job.op == "transpose_grad":
        kernels.conv_transpose2x2_input_grad(y, weight, allow_tf32=job.allow_tf32)
    elif job.op == "transpose_weights":
        kernels.conv_transpose2x2_weight_grad(y, x, with_bias=True, allow_tf32=job.allow_tf32)
    else:
        kernels.conv_transpose2x2(x, weight, bias, allow_tf32=job.allow_tf32)
    return 0


# --- conv1x1 ---

_HEAD_OPS = ("conv1x1", "conv1x1_grad", "conv1x1_weights")


def _head_jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """Every config with softmax, which asks most of it; the other activations with two output channels.

    fp16, which compiles like bf16, and sm_86, which compiles like sm_89, with those and softmax alone. shape: input and
    output channels, activation.
    """
    make = functools.partial(Job, dtype=dtype, allow_tf32=allow_tf32, capability=target.capability)
    few = dtype == torch.float16 or target.capability == 86
    for activation in ("softmax",) if few else (None, "sigmoid", "softmax"):
        yield from (make(op, shape=(64, 2, activation)) for op in _HEAD_OPS)
    if few:
        return
    for channels in config_pixels.head_configs(dtype, target, allow_tf32=allow_tf32, softmax=True).values():
        yield make("conv1x1", shape=(*channels, "softmax"))
    yield make("conv1x1_weights", shape=(17, 17, "softmax"))


def _run_head(job: Job) -> int:
    from fastunet.kernels import conv1x1 as kernels

    c_in, c_out, activation = job.shape
    x, y = job.pixels(c_in, 64, 64), job.pixels(c_out, 64, 64)
    weight, bias = job.tensor(c_out, c_in, 1, 1), job.tensor(c_out)
    output, options = None if activation is None else y, {"activation": activation, "allow_tf32": job.allow_tf32}
    if job.op == "conv1x1_grad":
        kernels.conv1x1_input_grad(y, weight, output, **options)
    elif job.op == "conv1x1":
        kernels.conv1x1(x, weight, bias, **options)
    else:
        kernels.conv1x1_weight_grad(y, x, output, with_bias=True, **options)
    return 0


# --- the sums of the segmentation losses, and their gradient ---

_LOSS_OPS = ("loss_sums", "loss_sums_grad")


class LossShape(NamedTuple):
    """What a launch depends on. indices: the target is of class indices; target: the dtype of either kind."""

    channels: int
    softmax: bool
    indices: bool
    masked: bool
    squared: bool
    entropy: bool
    target: torch.dtype


def _loss_jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """In bfloat16 every config, each with one of the variants in turn; float32 and float16 with few channels."""
    if allow_tf32:
        return
    # Three is no power of two.
    channel_counts = (*config_passes.pixel_configs().values(), 3) if dtype == torch.bfloat16 else (3,)
    for number, channels in enumerate(channel_counts):
        for op in _LOSS_OPS:
            yield Job(op, dtype, False, target.capability, _variant(number, channels))


def _variant(number: int, channels: int) -> LossShape:
    """The bits of number: activation, kind of target, mask. One channel has neither a softmax nor indices."""
    softmax, indices, masked = ((number >> bit) % 2 == 0 for bit in range(3))
    indices = indices and channels > 1
    kinds = (torch.int64, torch.uint8) if indices else (torch.float32, torch.uint8)
    squared, entropy = number % 3 == 1, number % 5 != 4
    return LossShape(channels, softmax and channels > 1, indices, masked, squared, entropy, kinds[number % 2])


def _run_loss(job: Job) -> int:
    """Logits of few channels contiguous, others channels_last."""
    from fastunet.kernels import segmentation_loss

    shape: LossShape = job.shape
    layout = torch.contiguous_format if shape.channels < 16 else torch.channels_last
    logits = job.tensor(2, shape.channels, 64, 64, layout=layout)
    sizes = (2, 1 if shape.indices else shape.channels, 64, 64)
    target = torch.empty(sizes, dtype=shape.target, device="meta")
    mask = torch.empty((2, 1, 64, 64), dtype=torch.uint8, device="meta") if shape.masked else None
    rows = 3 if not shape.entropy else 4 if shape.softmax else 5
    sums, options = per_channel(rows, 2, shape.channels), {"softmax": shape.softmax, "squared": shape.squared}
    if job.op == "loss_sums":
        segmentation_loss.segmentation_sums(logits, target, mask, entropy=shape.entropy, **options)
    else:
        segmentation_loss.segmentation_sums_grad(sums, logits, target, mask, **options)
    return 0


FAMILIES = (
    Family(_NORM_OPS, _norm_jobs, _run_norm),
    Family(("max_pool",), _pool_jobs, _run_pool),
    Family(_TRANSPOSE_OPS, _transpose_jobs, _run_transpose),
    Family(_HEAD_OPS, _head_jobs, _run_head),
    Family(("sum_rows",), _sum_jobs, _run_sum),
    Family(_LOSS_OPS, _loss_jobs, _run_loss),
)
