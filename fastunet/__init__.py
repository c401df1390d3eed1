"""fastunet: a U-Net for PyTorch made of fused kernels. Importing it needs neither triton nor a GPU."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastunet import losses, ops, reference
    from fastunet.checks import FastUNetError
    from fastunet.compiler.backend import compile
    from fastunet.dispatch import backend
    from fastunet.explanation import explain
    from fastunet.inference.cuda_graphs import graphed
    from fastunet.inference.predict import predict
    from fastunet.inference.quantization import quantize
    from fastunet.ops.recompute import recomputing
    from fastunet.unet import UNet

__version__ = "0.1.0"

# Public name -> the module that holds it; None for a submodule itself.
_HOMES: dict[str, str | None] = {
    "FastUNetError": "checks",
    "UNet": "unet",
    "backend": "dispatch",
    "compile": "compiler.backend",
    "explain": "explanation",
    "graphed": "inference.cuda_graphs",
    "losses": None,
    "ops": None,
    "predict": "inference.predict",
    "quantize": "inference.quantization",
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
