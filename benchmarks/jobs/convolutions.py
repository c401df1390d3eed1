"""The 3x3 convolutions: forward, both gradients, split-K, Hopper's halo variant, e4m3, composed with an upsampling."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from fastunet.kernels import config_passes, config_pixels, gpu
from fastunet.kernels.conv3x3 import config, config_grad, config_hopper, config_search
from fastunet.kernels.conv3x3.config import ConvShape
from torch import Tensor

from . import Family, Job, per_channel


def _sides(job: Job) -> tuple[int, int]:
    return job.shape.height, job.shape.width


def _weight(job: Job, c_out: int, c_in: int, layout: torch.memory_format = torch.channels_last) -> Tensor:
    return job.tensor(c_out, c_in, 3, 3, layout=layout)


def _norm(each: Tensor) -> Any:
    """A norm whose statistics and scale are each such a tensor."""
    from fastunet.kernels.epilogue import Normalisation  # Late, as below: triton is for the compiling process alone.

    return Normalisation(each, each, each, 1e-5)


def _head(job: Job, channels: int) -> Any:
    """A head of two classes."""
    from fastunet.kernels.epilogue import Head

    return Head(job.tensor(2, channels, 1, 1), job.tensor(2), sigmoid=True)


# --- conv3x3 ---

_PLAIN = (
    *("forward", "pool", "two_inputs", "contiguous_weight", "leaky", "norm", "head", "statistics"),
    *("input_grad", "masked_input_grad", "two_input_grads", "weight_grad", "bias_grad", "activation_grad", "unpool"),
    *("split", "finish_split"),
)


def _plain_jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """bf16 and both kinds of float32 in full; fp16, which compiles alike, where both sides have 64 channels."""
    found = _all_plain_jobs(target, dtype, allow_tf32)
    return (job for job in found if dtype != torch.float16 or job.shape.c1 == job.shape.c_out == 64)


def _all_plain_jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    make = functools.partial(Job, dtype=dtype, allow_tf32=allow_tf32, capability=target.capability)
    shapes = config.conv_configs(dtype, target, allow_tf32=allow_tf32)
    for (chosen, aligned), shape in shapes.items():
        for op in ("forward", "pool", "input_grad", "statistics"):
            yield make(op, shape=shape)
        if chosen.variant != config.FOLDED:
            yield make("two_inputs", shape=replace(shape, c2=shape.c1))
            yield make("two_input_grads", shape=replace(shape, c_out2=shape.c_out))
            if chosen.variant == config.POINTER and aligned:
                yield make("contiguous_weight", shape=shape)
        if shape.c_out <= chosen.block_n:
            yield make("head", shape=shape)
    for shape in config_grad.weight_grad_configs(dtype, target, allow_tf32=allow_tf32).values():
        yield make("bias_grad", shape=shape)
    widest = max(
        (shape for (_, aligned), shape in shapes.items() if aligned), key=lambda shape: (shape.c1, shape.c_out)
    )
    for deep in dict.fromkeys(_deep(shape) for shape in shapes.values()):
        chosen = config.derived_conv_config(deep, dtype, target, allow_tf32)
        if config.splittings(chosen, deep, target):
            yield make("split", shape=deep)
    for op in ("leaky", "norm", "masked_input_grad", "weight_grad"):
        yield make(op, shape=widest)
    yield make("finish_split", shape=_deep(widest))
    if not allow_tf32:
        yield make("activation_grad", shape=widest)
        for channels in (*config_passes.pointwise_configs().values(), 3, 100):  # The last two load no vectors.
            yield make("unpool", shape=replace(widest, c_out=channels))


def _deep(shape: ConvShape) -> ConvShape:
    """Two inputs of many channels, as where sums are split: with blocks for which `shape` stands."""
    return replace(shape, c1=16 * shape.c1, c2=16 * shape.c1, height=8, width=8)


def _run_plain(job: Job) -> int:
    if job.op in ("activation_grad", "unpool", "weight_grad", "bias_grad") or "input_grad" in job.op:
        return _run_gradient(job)
    from fastunet.kernels.conv3x3 import pointer, split_k
    from fastunet.kernels.epilogue import Epilogue

    shape, sides, options = job.shape, _sides(job), {"allow_tf32": job.allow_tf32}
    x, up = job.pixels(shape.c1, *sides), job.pixels(shape.c2, *sides) if shape.c2 else None
    layout = torch.contiguous_format if job.op == "contiguous_weight" else torch.channels_last
    weight = _weight(job, shape.c_out, shape.c1 + shape.c2, layout)
    bias = job.tensor(shape.c_out)
    norm = _norm(bias) if job.op in ("norm", "head", "split", "finish_split") else None
    if job.op in ("split", "finish_split"):
        chosen = config.derived_conv_config(shape, job.dtype, job.target, job.allow_tf32)
        pooled = job.pixels(shape.c_out, sides[0] // 2, sides[1] // 2)
        epilogue = Epilogue(job.pixels(shape.c_out, *sides), bias, norm, 0.0, pooled)
        for launch in split_k.launches(x, up, weight, replace(chosen, splits=2), epilogue, **options):
            launch.run(x.device)
        return 0 if job.op == "split" else 1
    if job.op == "statistics":
        pointer.conv3x3_with_statistics(x, weight, up=up, **options)
    elif job.op == "head":
        pointer.conv3x3_head(x, weight, bias, _head(job, shape.c_out), up=up, norm=norm, negative_slope=0.0, **options)
    else:
        slope = 0.1 if job.op == "leaky" else 0.0
        pointer.conv3x3(x, weight, bias, up=up, norm=norm, negative_slope=slope, pool=job.op == "pool", **options)
    return 0


def _run_gradient(job: Job) -> int:
    from fastunet.kernels.activation_grad import activation_grad
    from fastunet.kernels.conv3x3 import grad

    shape, sides, options = job.shape, _sides(job), {"allow_tf32": job.allow_tf32}
    x, y = job.pixels(shape.c1, *sides), job.pixels(shape.c_out, *sides)
    # The gradient has the shape's input channels, what comes of it the output's.
    weight = _weight(job, shape.c1, shape.c_out + shape.c_out2)
    if job.op in ("activation_grad", "unpool"):
        pooled = job.pixels(shape.c_out, sides[0] // 2, sides[1] // 2) if job.op == "unpool" else None
        activation_grad(y, y, pooled, 0.0)
    elif job.op in ("weight_grad", "bias_grad"):
        grad.conv3x3_weight_grad(y, x, with_bias=job.op == "bias_grad", **options)
    elif job.op == "two_input_grads":
        grad.conv3x3_two_input_grads(x, weight, shape.c_out, **options)
    else:
        masked = {"x": y, "negative_slope": 0.0} if job.op == "masked_input_grad" else {}
        grad.conv3x3_input_grad(x, weight, **masked, **options)
    return 0


# --- the halo variant, for Hopper ---

HALO_OPS = ("halo", "halo_pool", "halo_norm", "halo_leaky", "halo_head")
_HALO_SHAPES = (ConvShape(64, 0, 64, 512, 512), ConvShape(64, 64, 64, 512, 512), ConvShape(128, 0, 128, 256, 256))


@dataclass(frozen=True)
class HaloShape:
    """A convolution and its blocks."""

    conv: ConvShape
    chosen: config.ConvConfig


def _halo_jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """All blocks that a search may try, in bf16; fp16, which compiles alike, with the first of them."""
    if allow_tf32:
        return
    in_full = dtype == torch.bfloat16
    for shape in _HALO_SHAPES:
        if not config_hopper.fits_halo(shape, dtype, target):
            continue
        found = config_search.feasible_conv_configs(shape, dtype, target, allow_tf32=False)
        first, *others = [chosen for chosen in found if chosen.variant == config.HALO]
        for chosen in (first, *others) if in_full else (first,):
            # What wants most registers for all; the rest with the blocks that a search begins with.
            for op in HALO_OPS if chosen == first and in_full else ("halo_norm",):
                if op != "halo_head" or shape.c_out <= chosen.block_n:
                    yield Job(op, dtype, allow_tf32, target.capability, HaloShape(shape, chosen))


def _run_halo(job: Job) -> int:
    from fastunet.kernels.conv3x3 import hopper
    from fastunet.kernels.epilogue import Epilogue

    shape, chosen = job.shape.conv, job.shape.chosen
    sides = shape.height, shape.width
    x, up = job.pixels(shape.c1, *sides), job.pixels(shape.c2, *sides) if shape.c2 else None
    weight, bias = _weight(job, shape.c_out, shape.c1 + shape.c2), per_channel(shape.c_out)
    if job.op == "halo_head":
        chosen = config.with_head(chosen)
        head = {"head": _head(job, shape.c_out), "probabilities": job.pixels(2, *sides)}
        epilogue = Epilogue(None, bias, None, 0.0, **head)
    else:
        pooled = job.pixels(shape.c_out, sides[0] // 2, sides[1] // 2) if job.op in ("halo_pool", "halo_norm") else None
        norm = _norm(bias) if job.op == "halo_norm" else None
        slope = 0.1 if job.op == "halo_leaky" else 0.0
        epilogue = Epilogue(job.pixels(shape.c_out, *sides), bias, norm, slope, pooled)
    hopper.conv3x3_launch(x, up, weight, chosen, epilogue).run(x.device)
    return 0


# --- e4m3 values on sm_90 and above, and what makes them: a pass, or other kernels' epilogues ---

_E4M3_OPS = ("fp8", "fp8_pool", "fp8_two_inputs", "fp8_chain", "fp8_quantise", "fp8_first", "fp8_transpose")
_E4M3_SHAPES = tuple(
    ConvShape(c_in, 0, c_out, side, side)
    for c_in, c_out in ((32, 64), (64, 64), (128, 128), (64, 128))
    for side in (512, 64, 8)
)


def _e4m3_jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """With every block there is, for results in bf16; those in fp16 compile alike."""
    if dtype != torch.bfloat16 or not config.has_fp8(target):
        return
    make = functools.partial(Job, dtype=dtype, allow_tf32=allow_tf32, capability=target.capability)
    for shape in {config.fp8_config(shape, target): shape for shape in _E4M3_SHAPES}.values():
        yield from (make(op, shape=shape) for op in _E4M3_OPS[:4])
    yield make("fp8_quantise", shape=_E4M3_SHAPES[0])
    yield make("fp8_first", shape=ConvShape(3, 0, 64, 512, 512, aligned=False))
    for channels in config_pixels.subpixel_tile_configs(dtype, target).values():
        if config_pixels.writes_e4m3(*channels, dtype, target):
            yield make("fp8_transpose", shape=channels)


def _run_e4m3(job: Job) -> int:
    from fastunet.kernels import conv_transpose2x2
    from fastunet.kernels.conv3x3 import fp8, pointer
    from fastunet.kernels.epilogue import E4M3

    scale = per_channel(1)
    if job.op == "fp8_transpose":
        c_in, c_out = job.shape
        weight = job.tensor(c_in, c_out, 2, 2, layout=torch.channels_last)
        conv_transpose2x2.conv_transpose2x2(job.pixels(c_in, 32, 32), weight, job.tensor(c_out), y_scale=scale)
        return 0
    shape, sides = job.shape, _sides(job)
    x, bias = job.pixels(shape.c1, *sides), per_channel(shape.c_out)
    quantised = torch.empty_like(x, dtype=E4M3)
    if job.op == "fp8_quantise":
        fp8.quantised(x, scale)
        return 0
    if job.op == "fp8_first":
        pointer.conv3x3(x, _weight(job, shape.c_out, shape.c1), bias, y_scale=scale)
        return 0
    up = torch.empty_like(quantised) if job.op == "fp8_two_inputs" else None
    weight = _weight(job, shape.c_out, shape.c1 * (1 if up is None else 2)).to(E4M3)
    options = {"dtype": job.dtype, "pool": job.op in ("fp8_pool", "fp8_chain")}
    if job.op == "fp8_chain":
        options |= {"y_scale": scale, "pooled_scale": scale}
    fp8.conv3x3_fp8(quantised, up, weight, scale, bias, _norm(bias), 0.0, **options)
    return 0


# --- an upsampling composed with the convolution after it ---

_COMPOSED_OPS = ("composed", "composed_bias", "composed_odd")
_COMPOSED_SHAPES = tuple(
    ConvShape(c1, 2 * c1, c_out, side, side)
    for c1, c_out in ((16, 64), (32, 64), (64, 64), (128, 128), (64, 128), (64, 192), (48, 96), (32, 40))
    for side in (256, 64, 32, 8)
)


def _composed_jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """With every block there is: without norm or bias, and with both norm and the upsampling's bias, of a skip of even
    sides and of odd ones.
    """
    fitting = [s for s in _COMPOSED_SHAPES if config.fits_descriptors(dtype, target, (s.c1, s.c2), (s.c_out,))]
    for shape in {config.composed_config(shape, dtype, target): shape for shape in fitting}.values():
        yield from (Job(op, dtype, allow_tf32, target.capability, shape) for op in _COMPOSED_OPS)


def _run_composed(job: Job) -> int:
    from fastunet.kernels import conv_transpose2x2_concat_conv3x3 as kernels

    shape, sides, with_bias = job.shape, _sides(job), job.op != "composed"
    doubled = tuple(2 * side + (job.op == "composed_odd") for side in sides)
    of_skip, of_low = job.tensor(shape.c_out, 9 * shape.c1), job.tensor(4 * shape.c_out, 4 * shape.c2)
    weights = kernels.Composed(of_skip, of_low, per_channel(4, 3, 3, shape.c_out) if with_bias else None)
    bias = per_channel(shape.c_out) if with_bias else None
    images = job.pixels(shape.c1, *doubled), job.pixels(shape.c2, *sides)
    norm = None if bias is None else _norm(bias)
    kernels.conv_transpose2x2_concat_conv3x3(*images, weights, bias, norm=norm, negative_slope=0.0)
    return 0


FAMILIES = (
    Family(_PLAIN, _plain_jobs, _run_plain),
    Family(HALO_OPS, _halo_jobs, _run_halo),
    Family(_E4M3_OPS, _e4m3_jobs, _run_e4m3),
    Family(_COMPOSED_OPS, _composed_jobs, _run_composed),
)
