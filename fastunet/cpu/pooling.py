"""Max-pooling on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Fewer values are pooled before the six calls of the other way are through.
_MANY_VALUES = 1 << 17


def max_pool2x2(x: Tensor) -> Tensor:
    """Return F.max_pool2d(x, 2), of which torch would keep the winners too.

    Images that lie in memory pixel by pixel are halved by the larger of two rows, then of two columns: loops over
    whole rows instead of one over windows.
    """
    plain = x.device.type != "cpu" or x.requires_grad or torch.compiler.is_compiling()
    if plain or x.numel() < _MANY_VALUES or not x.is_contiguous(memory_format=torch.channels_last):
        return F.max_pool2d(x, 2)
    height, width = (side // 2 * 2 for side in x.shape[2:])
    pixels = x.permute(0, 2, 3, 1)
    rows = torch.maximum(pixels[:, 0:height:2], pixels[:, 1:height:2])
    return torch.maximum(rows[:, :, 0:width:2], rows[:, :, 1:width:2]).permute(0, 3, 1, 2)
