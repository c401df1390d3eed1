"""torch.compile as a provider: once for each function, for the shapes of its calls, in one graph or not at all."""

from __future__ import annotations

import os
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch

from fastunet import dispatch


def no_cuda(device: torch.device) -> str:
    """Why there are no CUDA graphs on that device, or ""."""
    return "" if device.type == "cuda" else f"CUDA graphs need CUDA, the device is {device.type}"


def compile_unsupported(device: torch.device, mode: str, *, thorough: bool) -> str:
    """Why torch.compile cannot run in that mode on that device, or "". thorough: let it take minutes on a CPU."""
    if device.type != "cuda":
        if mode == "max-autotune":
            return no_cuda(device)
        if mode == "max-autotune-no-cudagraphs" and not thorough:
            return "max-autotune takes minutes on a CPU, and was not asked for"
        compiler = os.environ.get("CXX", "g++")
        return "" if shutil.which(compiler) else f"there is no C++ compiler ({compiler})"
    if mode == "freezing":
        return "freezing is the CPU's form of what CUDA graphs and max-autotune are on a GPU"
    return dispatch.triton_unsupported(device, torch.float32) or ""


def compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """The function compiled by inductor, at its first call, for exactly the shapes of that call.

    mode: one of torch.compile's, or "freezing": the weights are constants, which inductor folds and lays out anew.
    Raises at a call that torch.compile would leave uncompiled in part or, after too many compilations, entirely.
    """
    target, freezes = own_code(function), mode == "freezing"
    optimized: Callable[..., Any] | None = None

    def call(*arguments: Any) -> Any:
        nonlocal optimized
        if optimized is not None:
            return optimized(*arguments)
        optimized = torch.compile(target, mode=None if freezes else mode, fullgraph=True, dynamic=False)
        # Only the compilation looks at the setting, and other providers are to compile without it.
        with torch._inductor.config.patch(freezing=freezes):
            return optimized(*arguments)

    return call


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls it, with a code object of its own.

    torch.compile counts compilations by code object, and after eight leaves it uncompiled: functions made by the same
    `def` would use them up together.
    """

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    return types.FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
