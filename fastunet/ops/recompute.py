"""Inputs that a backward recomputes instead of keeping them.

An op keeps its input for the gradient of its weight. Where that is y = activation(norm(raw)) of an op before it, which
keeps raw and the statistics in any case, both can do with those: one pass over raw recomputes y, as forward did, to
the same bits. Of a U-Net with norm this leaves half of what its layers keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastunet.ops.registration import memory_format
from fastunet.torch_private import version

# By y, what it was made of: raw, mean and invstd [C] or [N, C], gamma and beta [C] or None; the slope; y's version.
_origins: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_enabled = True


@contextmanager
def recomputing(enabled: bool) -> Iterator[None]:
    """Choose within the block, in every thread, whether outputs of norms by Triton kernels are recomputed in backward
    or kept. Outside they are recomputed: half the memory, for a pass over each of them.
    """
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def remember(y: Tensor, made_of: tuple[Tensor | None, ...], slope: float | None) -> None:
    """Let the ops that y goes into keep raw, mean, invstd, gamma and beta instead, if our kernels made y of them and
    there will be a backward.
    """
    if _enabled and not torch.compiler.is_compiling() and getattr(y.grad_fn, "is_recomputable", False):
        _origins[y] = made_of, slope, version(y)


def save(ctx: Any, x: Tensor, *others: Tensor | None) -> None:
    """Keep x, or what it is made of, and the others for `saved`."""
    origin = None if torch.compiler.is_compiling() else _origins.get(x)
    if origin is None or origin[-1] != version(x):
        ctx.save_for_backward(x, *(None,) * 5, *others)
        return
    made_of, ctx.slope_of_input, _ = origin
    ctx.save_for_backward(None, *made_of, *others)


def saved(ctx: Any, *, reads_values: bool) -> list[Any]:
    """Return x and the others; without reads_values x is only of the right shape, dtype and strides."""
    x, raw, mean, invstd, gamma, beta, *others = ctx.saved_tensors
    if x is not None:
        return [x, *others]
    if not reads_values:
        return [raw, *others]
    from fastunet.kernels.norm import Affine, normalise

    statistics = (t.view(-1, raw.shape[1]) for t in (mean, invstd))
    y, _ = normalise(raw, Affine(*statistics, gamma, beta), ctx.slope_of_input)
    return [y.contiguous(memory_format=memory_format(raw)), *others]
