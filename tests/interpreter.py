"""Repairs to Triton's interpreter, for tests: bfloat16 and e4m3 as hardware computes them, reductions slice by slice.

As of Triton 3.7 the interpreter multiplies the bit patterns of bfloat16 and of float8 in tl.dot, truncates float32 to
bfloat16 where GPUs round to nearest even, loses the NaN of e4m3 and rounds some of its values otherwise, reduces with a
custom function one element at a time, and patches the language anew for every helper a kernel calls. Call repair()
once, after TRITON_INTERPRET=1 is set; a second call changes nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _widened(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(bits)).view(dtype).float().numpy()


def _narrowed(values: np.ndarray, dtype: torch.dtype, bits: torch.dtype) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).view(bits).numpy()


def _as_float32(handle: Any) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return _widened(handle.data, torch.bfloat16)
    if handle.dtype.scalar == tl.float8e4nv:
        return _widened(handle.data, torch.float8_e4m3fn)
    return handle.data.astype(np.float32, copy=False)


def _create_dot(self: Any, a: Any, b: Any, acc: Any, *_: Any) -> Any:
    with np.errstate(invalid="ignore"):  # NaN is a result like any other.
        product = np.matmul(_as_float32(a), _as_float32(b))
    return interpreter.TensorHandle((product + acc.data).astype(acc.data.dtype, copy=False), acc.dtype.scalar)


def _cast(self: Any, source: Any, target: Any) -> Any:
    old, new = source.dtype.scalar, target.scalar
    if old == tl.bfloat16 and new == tl.float32:
        return interpreter.TensorHandle(_widened(source.data, torch.bfloat16), new)
    if old == tl.float32 and new == tl.bfloat16:
        return interpreter.TensorHandle(_narrowed(source.data, torch.bfloat16, torch.uint16), new)
    return _original_cast(self, source, target)


def _convert(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
    if source.dtype.scalar == tl.float32 and target.scalar == tl.float8e4nv:
        return interpreter.TensorHandle(_narrowed(source.data, torch.float8_e4m3fn, torch.uint8), tl.float8e4nv)
    return _original_convert(self, source, target, *rounding)


def _reduce(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """Combine whole slices along the axis, first to last, with the kernel's own function."""
    if self.axis is None or self.keep_dims or len(inputs) != 1:
        return _original_reduce(self, inputs)
    slices = np.moveaxis(inputs[0].handle.data, self.axis, 0)
    total = self.to_tensor(slices[0], inputs[0].dtype)
    for part in slices[1:]:
        total = self.combine_fn.fn(total, self.to_tensor(part, inputs[0].dtype))
    return [total]


def _call_helper(self: Any, *arguments: Any, **keywords: Any) -> Any:
    # A helper that knows the language by the name `tl`, as kernels do, finds it patched by the kernel that calls it.
    if self.fn.__globals__.get("tl") is tl:
        return self.rewrite()(*arguments, **keywords)
    return _original_call(self, *arguments, **keywords)


_original_convert = interpreter.InterpreterBuilder.create_fp_to_fp
_original_cast = interpreter.InterpreterBuilder.cast_impl
_original_reduce = interpreter.ReduceOps.generic_reduce
_original_call = interpreter.InterpretedFunction.__call__


def repair() -> None:
    """Install the repairs in this process."""
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter.InterpreterBuilder.cast_impl = _cast
    interpreter.InterpreterBuilder.create_fp_to_fp = _convert
    interpreter.ReduceOps.generic_reduce = _reduce
    interpreter.InterpretedFunction.__call__ = _call_helper
