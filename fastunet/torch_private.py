"""Every private name of torch that fastunet uses, and what stands in for it in a release that has none.

All are in the wheels for Linux of torch 2.10 to 2.15. Where no fallback is given, there is none: importing fastunet, or
what needs the name, then raises.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FakeTensorMode", "TorchDispatchMode", "suggest_memory_format"]

# --- is a call plain? Each fallback has every call take the dispatcher's way, which is right, and slower. ---

dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
# A transform of torch.func is active: a tensor may then stand for a batch, which has no memory format.
in_transform: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
onednn_enabled: Callable[[], bool] = getattr(torch._C, "_get_mkldnn_enabled", lambda: True)


def multiplies_in_float32() -> bool:
    """Return whether oneDNN's matrix products of float32 are not rounded to bfloat16, as of a matmul precision of
    "medium".
    """
    if hasattr(torch._C, "_get_fp32_precision_getter"):
        return torch._C._get_fp32_precision_getter("mkldnn", "matmul") != "bf16"
    return torch.get_float32_matmul_precision() != "medium"


def is_profiling() -> bool:
    """Return whether a profiler is to see the names of ops."""
    return getattr(torch.autograd.profiler, "_is_profiler_enabled", True)


def in_forward_mode() -> bool:
    """Return whether forward-mode AD is active: any tensor may then carry a tangent, which a kernel would drop."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def has_hooks(module: nn.Module) -> bool:
    """Return whether something is called before or after the module; no fallback."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def forward_hooks(module: nn.Module) -> list[Any]:
    """Return what is called before and after the module's forward; no fallback."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def convolve_of(kind: type[nn.Module]) -> Any:
    """Return what the forward of a class of convolutions calls, None of another class; no fallback."""
    return kind._conv_forward if issubclass(kind, nn.Conv2d) else None


def has_amx() -> bool:
    """Return whether the CPU multiplies bfloat16 by AMX; that it does not where torch cannot tell."""
    if hasattr(torch.cpu, "get_capabilities"):  # public, but not in every release
        return bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


# --- ops ---

below_autograd = torch._C._AutoDispatchBelowAutograd
version: Callable[[Tensor], int] = operator.attrgetter("_version")


def may_mutate(target: Any) -> bool:
    """Return whether what a node of a graph calls is an op of torch.ops that changes an argument, in any overload, or a
    higher-order one.
    """
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    return isinstance(target, torch._ops.HigherOrderOperator)


# What F.pad leaves in a graph.
pad: Callable[..., Tensor] = getattr(torch._C._nn, "pad", torch.nn.functional.pad)

# --- weights. Without copy-on-write each is compared by its checksum every time. ---

# Where a tensor's storage begins; `data_ptr` takes the mark away.
storage_address: Callable[[Tensor], int] = getattr(torch._C, "_data_address", lambda t: t.untyped_storage().data_ptr())
is_marked: Callable[[Tensor], bool] = getattr(torch._C, "_is_cow_tensor", lambda t: False)
mark: Callable[[Tensor], Any] = getattr(torch, "_lazy_clone", lambda t: None)


def without_modes() -> Any:
    """Return a context in which no dispatch mode sees what is computed."""
    return getattr(_python_dispatch, "_disable_current_modes", nullcontext)()


# --- timing. Without it the GPU may wait for Python within a sample. ---

# Has the current stream wait for so many clock cycles.
sleep_on_gpu: Callable[[int], Any] = getattr(torch.cuda, "_sleep", lambda cycles: None)

# --- the compiler, whose modules take seconds to import ---

# Has torch.compile go around a function, which it would trace into Triton's launches and fail.
# torch.compiler.disable imports the compiler at once, this at a call.
untraced = getattr(torch, "_disable_dynamo", torch.compiler.disable)


def original(model: nn.Module) -> nn.Module:
    """Return what torch.compile wraps, and any other model as it is."""
    return getattr(model, "_orig_mod", model)


def run_backend(name: str, graph_module: Any, inputs: list[Any], **options: Any) -> Any:
    """Have another backend of torch.compile compile a graph; no fallback."""
    return torch._dynamo.lookup_backend(name)(graph_module, inputs, **options)


def options_of_mode(mode: str) -> dict[str, Any]:
    """Return inductor's options for a mode of torch.compile; no fallback."""
    from torch._inductor import list_mode_options

    return list_mode_options(mode)


def has_cpp_compiler() -> bool:
    """Return whether inductor finds a C++ compiler; that it does where torch cannot tell."""
    try:
        from torch._inductor import cpp_builder, exc
    except ImportError:
        return True
    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError):  # The latter where CXX names what cannot be run.
        return False
    return True
