"""How tensors lie in memory: activations packed NHWC from a 16-byte boundary on, weights by their strides."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", Tensor, Tensor | None)


def packed(x: T) -> T:
    """Return x [N, C, H, W] in packed NHWC order from a 16-byte boundary on, copied only where it is not; or None."""
    return None if x is None else on_boundary(x.contiguous(memory_format=torch.channels_last))


def dense(x: T) -> T:
    """Return x in contiguous order, or None."""
    return None if x is None else x.contiguous()


def on_boundary(x: Tensor) -> Tensor:
    """Return x, or a channels_last copy where its memory starts off the 16-byte boundary that vector loads need."""
    return x.clone(memory_format=torch.channels_last) if x.data_ptr() % 16 else x


def empty_packed(like: Tensor, channels: int, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised packed NHWC tensor [N, channels, height, width] with `like`'s batch, device and dtype."""
    shape, format = (like.shape[0], channels, height, width), torch.channels_last
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=format)


def strided_weight(weight: Tensor) -> tuple[Tensor, int, int, int]:
    """Return a weight [O, I, 3, 3], copied only if need be, and its strides over O, over I, and from tap to tap."""
    if weight.stride(2) != 3 * weight.stride(3):  # The nine taps are to be one strided run.
        weight = weight.contiguous()
    weight = on_boundary(weight)
    stride_out, stride_in, _, stride_tap = weight.stride()
    return weight, stride_out, stride_in, stride_tap


def weight_matrix(weight: Tensor) -> Tensor:
    """Return a weight [O, I, 3, 3] as [O, 9*I], tap by tap; copied unless it is channels_last and on a 16-byte
    boundary.
    """
    matrix = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
    return matrix.clone() if matrix.data_ptr() % 16 else matrix
