"""What follows a convolution inside one op, in ATen: activation and 2x2 max-pool, and the gradient through both.

An activation is given by its slope for negative values: None is the identity, 0 is ReLU, above 0 LeakyReLU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastunet.checks import ConfigError

aten = torch.ops.aten


def slope_of(relu: bool, negative_slope: float) -> float | None:
    """Return the slope that stands for the public arguments `relu` and `negative_slope`.

    A negative slope is refused: the gradient is taken from the sign of the output.
    """
    if not (negative_slope >= 0 and math.isfinite(negative_slope)):
        raise ConfigError(f"negative_slope: expected a finite number >= 0, got {negative_slope}")
    return float(negative_slope) if relu else None


def arguments_of(slope: float | None) -> dict[str, Any]:
    """Return the public arguments that a slope stands for."""
    return {"relu": slope is not None, "negative_slope": slope or 0.0}


def epilogue_grad(grad_y: Tensor | None, grad_pooled: Tensor | None, y: Tensor | None, slope: float | None) -> Tensor:
    """Return the gradient of the activation's input, from those of its output y and of max_pool2x2(y); either may be
    missing.

    The pooling's winners are found again from y rather than kept: they would be int64.
    """
    grad = grad_y
    if grad_pooled is not None:
        assert y is not None
        winners = aten.max_pool2d_with_indices(y, [2, 2])[1]
        unpooled = aten.max_pool2d_with_indices_backward(grad_pooled, y, [2, 2], [2, 2], [0, 0], [1, 1], False, winners)
        grad = unpooled if grad is None else unpooled.add_(grad)
    assert grad is not None, "a backward runs only when one of its outputs has a gradient"
    if slope is None:
        return grad
    if slope == 0:
        return aten.threshold_backward(grad, y, 0)
    return aten.leaky_relu_backward(grad, y, slope, True)
