"""fastunet: a U-Net for PyTorch made of fused kernels. Importing it needs neither triton nor a GPU."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastunet import losses as losses
    from fastunet import metrics as metrics
    from fastunet import ops as ops
    from fastunet import reference as reference
    from fastunet.checks import FastUNetError as FastUNetError
    from fastunet.compiler.backend import compile as compile
    from fastunet.dispatch import backend as backend
    from fastunet.explanation import explain as explain
    from fastunet.inference.cuda_graphs import graphed as graphed
    from fastunet.inference.frozen import freeze as freeze
    from fastunet.inference.predict import predict as predict
    from fastunet.inference.quantization import quantize as quantize
    from fastunet.ops.recompute import recomputing as recomputing
    from fastunet.segmenter import load as load
    from fastunet.tuning import tune as tune
    from fastunet.unet import UNet as UNet

__version__ = "0.1.0"

# Public name -> the module that holds it; None for a submodule itself.
_HOMES: dict[str, str | None] = {
    "FastUNetError": "checks",
    "UNet": "unet",
    "backend": "dispatch",
    "compile": "compiler.backend",
    "explain": "explanation",
    "freeze": "inference.frozen",
    "graphed": "inference.cuda_graphs",
    "load": "segmenter",
    "losses": None,
    "metrics": None,
    "ops": None,
    "predict": "inference.predict",
    "quantize": "inference.quantization",
    "recomputing": "ops.recompute",
    "reference": None,
    "tune": "tuning",
}
__all__ = [*_HOMES]


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
