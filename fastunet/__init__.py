"""fastunet: a U-Net for PyTorch made of fused kernels. Importing it needs neither triton nor a GPU."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastunet import losses, ops, reference
    from fastunet.checks import FastUNetError
    from fastunet.compiler import compile
    from fastunet.dispatch import backend
    from fastunet.explanation import explain
    from fastunet.graphs import graphed
    from fastunet.inference import predict
    from fastunet.ops.recompute import recomputing
    from fastunet.quantization import quantize
    from fastunet.unet import UNet

__version__ = "0.1.0"

# Public name -> the module that holds it; None for a submodule itself.
_HOMES: dict[str, str | None] = {
    "FastUNetError": "checks",
    "UNet": "unet",
    "backend": "dispatch",
    "compile": "compiler",
    "explain": "explanation",
    "graphed": "graphs",
    "losses": None,
    "ops": None,
    "predict": "inference",
    "quantize": "quantization",
    "recomputing": "ops.recompute",
    "reference": None,
}
__all__ = [
    "FastUNetError",
    "UNet",
    "backend",
    "compile",
    "explain",
    "graphed",
    "losses",
    "ops",
    "predict",
    "quantize",
    "recomputing",
    "reference",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastunet' has no attribute {name!r}")
    home = _HOMES[name]
    if home is None:
        return importlib.import_module(f"fastunet.{name}")
    value = getattr(importlib.import_module(f"fastunet.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
