"""The second half of every sum over pixels: partial sums, one row a program, added in a fixed order.

No atomics: the same inputs give the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from fastunet.kernels import gpu
from torch import Tensor

# Rows and columns that a program reads at a time. Unmeasured.
_ROWS, _COLUMNS = 8, 128


# fmt: off
@triton.jit(do_not_specialize=["rows"])
def sum_rows_kernel(
    partial_ptr, first_ptr, second_ptr, rows, split, total, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of the rows of partial [rows, total]: `split` values into first, the rest into second.

    Row r is added to sum r % BLOCK_R, first to last, and these sums in the end: many rows are not waited for in turn.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, BLOCK_R)[:, None]
    sums = tl.zeros((BLOCK_R, BLOCK), tl.float32)
    pointers = partial_ptr + row.to(tl.int64) * total + at[None, :]
    for first in range(0, rows, BLOCK_R):
        sums += tl.load(pointers, mask=(first + row < rows) & (at < total)[None, :], other=0.0)
        pointers += tl.cast(total, tl.int64) * BLOCK_R
    acc = tl.sum(sums, 0)
    tl.store(first_ptr + at, acc.to(first_ptr.dtype.element_ty), mask=at < split)
    if second_ptr is not None:
        mask = (at >= split) & (at < total)
        tl.store(second_ptr + (at - split), acc.to(second_ptr.dtype.element_ty), mask=mask)
# fmt: on


def sum_rows(partial: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Sum float32 partial [rows, n] over its rows, into first and then second.

    Both are dense and hold n elements together, taken in the order they lie in memory.
    """
    rows, total = partial.shape
    arguments = {
        "partial_ptr": partial,
        "first_ptr": first,
        "second_ptr": second,
        "rows": rows,
        "split": first.numel(),
        "total": total,
        "BLOCK_R": _ROWS,
        "BLOCK": _COLUMNS,
    }
    launch = gpu.Launch(sum_rows_kernel, gpu.cdiv(total, _COLUMNS), arguments, num_warps=4, num_stages=1)
    launch.run(partial.device)


def empty_weight_grads(shape: Sequence[int], grad: Tensor, *, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """Return gradients of a weight, channels_last, and, with_bias, of a bias [Cout], of grad's dtype: uninitialised, or
    zeros of an empty batch.
    """
    options: dict[str, Any] = {"dtype": grad.dtype, "device": grad.device}
    grad_weight = torch.empty(shape, memory_format=torch.channels_last, **options)
    grad_bias = torch.empty(grad.shape[1:2], **options) if with_bias else None
    if grad.shape[0] == 0:
        return grad_weight.zero_(), None if grad_bias is None else grad_bias.zero_()
    return grad_weight, grad_bias
