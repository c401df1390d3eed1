"""The activation behind a convolution, in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The bits of bfloat16's minus infinity as an integer: of the numbers whose sign bit is set, only NaN's are greater. A
# threshold on integers takes a quarter of the time of torch's ReLU in bfloat16.
_MINUS_INFINITY = -128


def activate_(y: Tensor, slope: float | None) -> Tensor:
    """Apply the activation of that slope in place: None is the identity, 0 ReLU, above 0 LeakyReLU."""
    if slope is None:
        return y
    if slope == 0 and y.device.type == "cpu" and y.dtype == torch.bfloat16:
        F.threshold(y.view(torch.int16), _MINUS_INFINITY, 0, inplace=True)
        return y
    return F.leaky_relu_(y, slope) if slope else F.relu_(y)
