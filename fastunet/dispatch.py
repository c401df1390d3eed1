"""The only place that picks an implementation, with its reason.

`auto` is for what has been measured faster. On CUDA that is what is known of a layer on that GPU (`kernels.autotune`),
its size included: a kernel that lost there, came out wrong, or was not measured yet leaves the layer to ATen (cuDNN).
On the CPU, inference runs oneDNN with weights prepared once, training in float32 the wide convolutions by Winograd's
algorithm, and the rest ATen. The choice is process-wide: autograd runs CUDA backwards in threads of its own, which see
no context variable.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastunet import torch_private
from fastunet.checks import BackendError, check_choice
from fastunet.kernels import autotune

BACKENDS = ("auto", "triton", "aten")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Ops with a 3x3 convolution that is faster on the CPU by Winograd's algorithm, in float32: from so many channels,
# pixels and products on, and up to so many weights for each pixel, which is where it wins with a single image.
WINOGRAD_OPS = ("conv3x3_batch_norm_relu", "conv3x3_bias_relu", "conv3x3_instance_norm_relu")
_WINOGRAD_CHANNELS, _WINOGRAD_PIXELS, _WINOGRAD_PRODUCTS, _WINOGRAD_WEIGHTS_PER_PIXEL = 128, 1024, 1 << 25, 1024
# By stride 2 an op goes by another name: it has kernels, checks and measurements of its own.
STRIDE2 = autotune.STRIDE2
STRIDED_OPS = tuple(op + STRIDE2 for op in WINOGRAD_OPS)
# The op whose kernel is for some GPUs and sizes only: elsewhere its two steps are ops of their own.
FUSED_UP = "conv_transpose2x2_concat_conv3x3_relu"
# Ops with convolutions whose weights can be prepared once for inference on the CPU.
ONEDNN_OPS = (*WINOGRAD_OPS, *STRIDED_OPS, "conv3x3_relu_conv1x1", "conv_transpose2x2", FUSED_UP)
# Ops that have Triton kernels, forward and backward.
TRITON_OPS = (*ONEDNN_OPS, "conv1x1", "max_pool2x2", "segmentation_sums")

# A call of oneDNN has a fixed cost, several times that of ATen's own convolution: it has lost up to so many products,
# and weights, which ATen arranges at every call.
_FEW_PRODUCTS, _FEW_WEIGHTS = 1 << 20, 1 << 14
# Of few channels it is a loop of its own, which loses from so many pixels on.
_FEW_CHANNELS, _FEW_PIXELS_OF_FEW_CHANNELS = 4, 1024
# Up to so many an upsampling and the convolution after it are quicker one after the other.
_FEW_PRODUCTS_OF_TWO = 1 << 24

# Why nothing of ours runs a net of volumes.
VOLUMES = "three dimensions run on torch's own layers"

# From which speedup on a kernel replaces ATen: what is less is within the noise of a clock that moves.
LEAST_SPEEDUP = 1.03

# Of this build of torch, and of this processor.
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
_ONEDNN_BFLOAT16 = _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@dataclass(frozen=True)
class Choice:
    """What runs an op ("triton", "onednn", "winograd" or "aten"), why, and whether its weights are prepared once.

    speedup, over_inductor: where measured, over ATen, and over what inductor makes of ATen's ops. unmeasured: the
    layer, where ATen runs because nothing is known of it.
    """

    implementation: str
    reason: str
    prepares: bool = False
    speedup: float | None = None
    over_inductor: float | None = None
    unmeasured: autotune.Layer | None = None


_selected = check_choice("FASTUNET_BACKEND", os.environ.get("FASTUNET_BACKEND", "auto"), BACKENDS)
# Whether layers are measured at their first use ("1"), not at all ("0"), or again whatever is known ("force").
_tune = check_choice("FASTUNET_TUNE", os.environ.get("FASTUNET_TUNE", "1"), ("0", "1", "force"))


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run ops by `name` within the block, in every thread: "auto", "triton" or "aten".

    "triton" forces the kernels: an op that has one and cannot run it here raises BackendError. An op without one runs
    on ATen under every setting; `fastunet.explain` tells. "aten" is torch's own ops and nothing else. Without the
    block, the variable FASTUNET_BACKEND holds.
    """
    global _selected
    previous, _selected = _selected, check_choice("backend", name, BACKENDS)
    try:
        yield
    finally:
        _selected = previous


def selected_backend() -> str:
    """The backend in force: "auto", "triton" or "aten"."""
    return _selected


def choose(op: str, x: Tensor, weight: Tensor | None = None, *, training: bool = False) -> Choice:
    """Which implementation runs `op` on an activation like x (its device, dtype and shape count, never its values, nor
    the number of images: an image's result is the same in any batch).

    weight: the op's, of which the same holds; without it nothing is known to be faster. training: there is to be a
    backward, or this is it. A weight is worth preparing where there is none.

    The choice is a pure function of what is named here and of settings, and is remembered: asking again costs the host
    a dictionary look-up.
    """
    shape = x.shape
    of_weight = (None, None) if weight is None else (weight.dtype, weight.shape)
    key = (op, training, x.device, x.dtype, shape[1:], 0 in shape[:1], *of_weight, *settings(x.device))
    try:
        found = _choices.get(key)
    except TypeError:  # A symbolic size has no hash.
        return _decide(op, x, weight, training)
    if found is None:
        if len(_choices) >= _MOST_CHOICES:
            _choices.clear()
        found = _choices[key] = _decide(op, x, weight, training)
    return found


def prepares_nets(x: Tensor, dtype: torch.dtype, parameters: Sequence[Tensor]) -> bool:
    """Return whether inference of a net on images like x, in `dtype`, is by weights prepared for all of it at once."""
    return (
        _selected == "auto"
        and x.device.type == "cpu"
        and x.numel() > 0
        and has_onednn()
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and _ONEDNN_BFLOAT16))
        and all(p.device.type == "cpu" and p.dtype == torch.float32 for p in parameters)
    )


def _products(x: Tensor, weight: Tensor) -> float:
    """How many products a layer adds up for one image; no end of them where its size is open, in a graph for any."""
    sizes: list[Any] = [*x.shape[2:]]
    return weight.numel() * math.prod(sizes) if all(isinstance(size, int) for size in sizes) else math.inf


def settings(device: torch.device) -> tuple[Any, ...]:
    """Return what choices depend on beside the layer."""
    return (
        _selected,
        torch_private.onednn_enabled(),
        torch.compiler.is_compiling(),
        autotune.generation(),
        device.type != "cpu" and tf32_allowed(),
        multiplies_in_float32(),
    )


# Choices made, by all that they depend on; forgotten together when images of ever new sizes have filled it.
_choices: dict[tuple[Any, ...], Choice] = {}
_MOST_CHOICES = 4096


def _decide(op: str, x: Tensor, weight: Tensor | None, training: bool) -> Choice:
    if _selected == "aten":
        return Choice("aten", "backend is set to aten")
    if _selected == "auto" and op in ONEDNN_OPS and weight is not None and not training and x.device.type == "cpu":
        products = _products(x, weight) / (4 if op in STRIDED_OPS else 1)
        pixels: Any = x.shape[2] * x.shape[3]
        is_few = products <= _FEW_PRODUCTS and weight.numel() <= _FEW_WEIGHTS
        if is_few and (weight.shape[1] > _FEW_CHANNELS or pixels <= _FEW_PIXELS_OF_FEW_CHANNELS):
            return Choice("aten", "for a layer this small ATen has less overhead than packed weights")
        if op == FUSED_UP and products <= _FEW_PRODUCTS_OF_TWO:
            return Choice("aten", "in two steps, which have less overhead for a layer this small")
        if _onednn_takes(op, x, weight):
            if op in WINOGRAD_OPS and winograd_wins(x, weight):
                return Choice("onednn", "Winograd's algorithm, with weights transformed once", True)
            return Choice("onednn", "weights folded and packed once", True)
        if x.dtype == torch.bfloat16 and not _ONEDNN_BFLOAT16:
            return Choice("aten", "oneDNN has no kernels for bfloat16 on this processor")
        if weight.dtype == torch.bfloat16:
            return Choice("aten", "weights in bfloat16 are not packed: keep them in float32, under autocast")
    if _selected == "auto" and op in WINOGRAD_OPS and weight is not None and training and winograd_wins(x, weight):
        return Choice("winograd", "Winograd's algorithm multiplies less")
    if op not in TRITON_OPS:
        return Choice("aten", "no Triton kernel for this op")
    unsupported = triton_unsupported(x.device, x.dtype)
    if _selected == "triton" and unsupported is not None:
        raise BackendError(f"{op}: backend 'triton' was asked for, but {unsupported}")
    if unsupported is None and op == FUSED_UP:
        unsupported = _composition_unsupported(x, weight, training)
    if unsupported is not None:
        return Choice("aten", unsupported)
    choice = Choice("triton", "backend is set to triton") if _selected == "triton" else _faster(op, x, weight, training)
    if op == FUSED_UP and choice.implementation == "triton":
        return replace(choice, prepares=True)
    return choice


def _composition_unsupported(skip: Tensor, weight: Tensor | None, training: bool) -> str | None:
    """Why no kernel computes an upsampling together with the convolution after it, or None if one does."""
    sizes = [*skip.shape[1:], *(() if weight is None else weight.shape[:1])]
    if weight is None or training or len(sizes) != 4 or not all(isinstance(size, int) for size in sizes):
        return "in two steps: an upsampling is composed with the convolution after it in inference, at a known size"
    if skip.device.type == "cuda" and not torch.cuda.is_available():
        return "in two steps: only that GPU can tell whether it has a kernel for both, and there is none here"
    from fastunet.kernels import gpu
    from fastunet.kernels.conv3x3 import config

    if config.fits_descriptors(skip.dtype, gpu.target(skip.device), skip.shape[1:2], weight.shape[:1]):
        return None
    return "in two steps: the kernel for both takes 16 bits, multiples of 16 channels to more than 32, and sm_90"


def _faster(op: str, x: Tensor, weight: Tensor | None, training: bool) -> Choice:
    """What is known of the layer on x's device."""
    if x.device.type == "cuda" and not torch.cuda.is_available():
        return Choice("aten", "not measured, since there is no such GPU here")
    from fastunet.kernels import gpu

    name, dtype = gpu.target(x.device).name, autotune.format_of(x.dtype, tf32_allowed())
    sizes = [*x.shape[1:], *(() if weight is None else weight.shape[:2])]
    if x.dim() != 4 or not all(isinstance(size, int) for size in sizes):
        reason = "which is faster depends on the size of the layer, which is not known yet"
        if x.dim() == 4 and _wins_somewhere(autotune.layer(op, x, weight, training=training), dtype, name):
            return Choice("triton", f"{reason}: the op decides when it runs")
        return Choice("aten", reason)
    layer = autotune.layer(op, x, weight, training=training)
    check, found = autotune.look_up(name, op, dtype, {}), autotune.look_up(name, op, dtype, layer.shape)
    if failed := check.get("failed") or found.get("failed"):
        return Choice("aten", f"on {name} the Triton kernel is not used: {failed}")
    if "skipped" in found:
        return Choice("aten", f"the Triton kernel is not measured for this layer on {name}: {found['skipped']}")
    if "failed" not in check or "speedup" not in found:
        return Choice("aten", f"the Triton kernel is not measured for this layer on {name}", unmeasured=layer)
    known = {"speedup": found["speedup"], "over_inductor": found.get("over_inductor")}
    reason = f"measured on {name}: {found['speedup']:.2f} times as fast as ATen"
    if found["speedup"] < LEAST_SPEEDUP:
        return Choice("aten", f"{reason}, too little", **known)
    return Choice("triton", reason, **known)


def _wins_somewhere(layer: autotune.Layer, dtype: str, gpu: str) -> bool:
    """Whether a layer of these channels was measured faster for some size of image."""
    return any(
        (row["op"], row["dtype"]) == (layer.op, dtype)
        and row.get("speedup", 0.0) >= LEAST_SPEEDUP
        and all(row["shape"][name] == getattr(layer, name) for name in ("c_in", "c_out", "training"))
        for row in autotune.table(gpu).values()
    )


def tunes_at_first_use() -> bool:
    """Return whether FASTUNET_TUNE lets kernels be checked and measured when they are first used."""
    return _tune != "0"


def is_to_measure(choice: Choice, device: torch.device) -> bool:
    """Return whether the layer will be measured when it first runs there: on a GPU, by one process, and not where
    results are to be the same in every run, which a choice by time is no part of.
    """
    return (
        choice.unmeasured is not None
        and tunes_at_first_use()
        and device.type == "cuda"
        and not torch.are_deterministic_algorithms_enabled()
        and ranks() == 1
    )


def ranks() -> int:
    """Return how many processes train together."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_distributed else 1


def triton_unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a Triton kernel cannot run on that device and dtype, or None if it can."""
    if not _has_triton():
        return "triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {dtype}"
    # Of a tensor on "meta", which has no data, a forced backend may be asked what it would keep.
    if device.type not in ("cuda", "meta") and not interpreting():
        return f"the device is {device.type}, not cuda"
    return None


def _onednn_takes(op: str, x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is there for an activation in float32, or in bfloat16 with weights in float32.

    Of weights in bfloat16 a folded norm would round each once more, and composed ones more than the two steps do.
    """
    takes_bfloat16 = _ONEDNN_BFLOAT16 and op != FUSED_UP
    return (
        weight.dtype == torch.float32
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and takes_bfloat16))
        and x.numel() > 0
        and has_onednn()
    )


def has_onednn() -> bool:
    """Return whether oneDNN's ops are there, and not switched off."""
    # A graph may be traced through here, but not through the question; its ops ask again when they run.
    return _HAS_ONEDNN and (torch.compiler.is_compiling() or torch_private.onednn_enabled())


def multiplies_in_float32() -> bool:
    """Return whether matrix products on the CPU are as precise as its convolutions, which have their own setting."""
    return torch.compiler.is_compiling() or torch_private.multiplies_in_float32()  # as `has_onednn`


def winograd_wins(x: Tensor, weight: Tensor) -> bool:
    """Whether a 3x3 convolution is faster by Winograd's algorithm, of images like x and a weight like this one."""
    if x.dim() != 4 or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return False
    channels_out, channels = weight.shape[:2]
    pixels: Any = x.shape[2] * x.shape[3]
    return (
        isinstance(pixels, int)  # Open, in a graph that is compiled for any size.
        and min(channels, channels_out) >= _WINOGRAD_CHANNELS
        and pixels >= _WINOGRAD_PIXELS
        and channels * channels_out * pixels >= _WINOGRAD_PRODUCTS
        and channels * channels_out <= pixels * _WINOGRAD_WEIGHTS_PER_PIXEL
        and x.shape[0] > 0
        and multiplies_in_float32()  # Rounded, Winograd's sums of large terms would be off by percents.
    )


# Up to so many pixels of a batch's results, and from so many weights, oneDNN's weight gradient takes up to eight times
# as long as the matrix product it stands for in bfloat16, and up to twice as long in float32.
_FEW_PIXELS, _MANY_WEIGHTS = 1024, 1 << 20


def aten_is_slow(x: Tensor, weight: Tensor | None, stride: int = 1) -> bool:
    """Whether the weight gradient of a 3x3 convolution of x on the CPU is better computed as a matrix product."""
    return (
        weight is not None
        and x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float32)
        and weight.numel() >= _MANY_WEIGHTS
        and x.shape[0] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride) <= _FEW_PIXELS
        and multiplies_in_float32()
    )


@cache
def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:  # A finder may refuse it instead of not finding it.
        return False


@cache
def interpreting() -> bool:
    """Return whether Triton's interpreter runs the kernels: the variable is read once, as triton does at its import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def tf32_allowed() -> bool:
    """Whether float32 convolutions may round their inputs to TF32, as torch is set. "none" inherits from the level
    above.

    `allow_tf32` is not read: it raises when the old and the new settings disagree.
    """
    cudnn: Any = torch.backends.cudnn
    settings = (cudnn.conv, cudnn, torch.backends)
    precisions = (getattr(setting, "fp32_precision", "none") for setting in settings)
    return next((p for p in precisions if p != "none"), "ieee") == "tf32"
