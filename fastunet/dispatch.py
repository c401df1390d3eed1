"""The only place that picks an implementation, with its reason.

`auto` is for what has been measured faster; no Triton kernel has been measured yet, so it runs ATen (cuDNN on CUDA,
oneDNN on the CPU) everywhere. The choice is process-wide: autograd runs CUDA backwards in threads of its own, which
see no context variable.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastunet.checks import BackendError, ConfigError

BACKENDS = ("auto", "triton", "aten")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Ops that have Triton kernels, forward and backward.
TRITON_OPS = (
    "conv1x1",
    "conv3x3_batch_norm_relu",
    "conv3x3_bias_relu",
    "conv3x3_instance_norm_relu",
    "conv3x3_relu_conv1x1",
    "conv_transpose2x2",
    "max_pool2x2",
    "segmentation_sums",
)


@dataclass(frozen=True)
class Choice:
    """What runs an op ("triton" or "aten"), and why."""

    implementation: str
    reason: str


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ConfigError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_selected = _checked(os.environ.get("FASTUNET_BACKEND", "auto"), "FASTUNET_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block, in every thread, run ops by `name`: "auto", "triton" or "aten".

    "triton" forces the kernels: an op that has one and cannot run it here raises BackendError. An op without one runs
    on ATen under every setting; `fastunet.explain` tells. Without the block, the variable FASTUNET_BACKEND holds.
    """
    global _selected
    previous, _selected = _selected, _checked(name, "backend")
    try:
        yield
    finally:
        _selected = previous


def selected_backend() -> str:
    """The backend in force: "auto", "triton" or "aten"."""
    return _selected


def choose(op: str, x: Tensor) -> Choice:
    """Which implementation runs `op` on an activation like x (its device and dtype count, never its values)."""
    if _selected == "aten":
        return Choice("aten", "backend is set to aten")
    if op not in TRITON_OPS:
        return Choice("aten", "no Triton kernel for this op")
    obstacle = triton_obstacle(x.device, x.dtype)
    if _selected == "triton":
        if obstacle is not None:
            raise BackendError(f"{op}: backend 'triton' was asked for, but {obstacle}")
        return Choice("triton", "backend is set to triton")
    if obstacle is not None:
        return Choice("aten", obstacle)
    return Choice("aten", "no measurement of the Triton kernel on this kind of device yet")


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a Triton kernel cannot run on that device and dtype, or None if it can."""
    if not _has_triton():
        return "triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {dtype}"
    if device.type != "cuda" and not interpreting():
        return f"the device is {device.type}, not cuda (TRITON_INTERPRET=1 runs the kernels anywhere, slowly)"
    return None


@cache
def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:  # A finder may refuse it instead of not finding it.
        return False


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels: the variable is read once by triton, when it is imported."""
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
