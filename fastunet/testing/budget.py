"""Inputs in every memory layout, random cotangents, and how far from its reference a result may lie."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded", "unaligned")

# u_out: half the distance from 1 to the next number.
UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

TF32_INPUT_ROUNDOFF = 2.0**-10
TENSOR_CORE_ROUNDOFF = 2.0**-23
# What sm_90's tensor cores cut off a sum of e4m3 products, relative to its largest term: they keep 13 bits behind the
# leading one (Xie et al. 2025, arXiv:2511.10909), and add 32 products with one instruction.
E4M3_TRUNCATION, E4M3_PRODUCTS = 2.0**-13, 32
FP16_UNDERFLOW = 2.0**-25
FP32_SMALLEST = 2.0**-126


def in_layout(x: Tensor, layout: str) -> Tensor:
    """Return x [N, C, H, W] with the same values in another memory layout, one of LAYOUTS.

    sliced: a window of a larger NaN-filled tensor, strided in every dimension. unaligned: channels_last, its first
    element 2 or 4 bytes past a 16-byte boundary. expanded is the exception to "the same values": every image is x[0],
    with batch stride 0. ValueError for any other name.
    """
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return x[:1].expand_as(x)
    n, c, h, w = x.shape
    if layout == "sliced":
        outer = torch.full((n + 1, c + 1, h + 2, 2 * w + 1), math.nan, dtype=x.dtype, device=x.device)
        return outer[1:, :c, 1 : h + 1, 1 : 2 * w : 2].copy_(x)
    if layout == "unaligned":
        flat = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype, device=x.device)
        return flat[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(x)
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def random_input(
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    scale: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return normal values times `scale`, rounded to `dtype`: the same on every device. Layouts are of 4-D shapes."""
    values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) * scale
    values = values.to(device=device, dtype=dtype)
    return in_layout(values, layout) if len(shape) == 4 else values


def random_integers(
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    largest: int = 5,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return integers from -largest to largest: while sums stay below 2^24, float32 convolutions of them are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, tuple(shape), generator=generator).to(device=device, dtype=dtype)


def random_cotangent(like: Tensor, *, seed: int = 1) -> Tensor:
    """Return a normal gradient for `like`. A constant one, as of .sum(), would hide every error that permutes or
    averages.
    """
    values = torch.randn(tuple(like.shape), generator=torch.Generator().manual_seed(seed))
    return values.to(device=like.device, dtype=like.dtype)


@contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Have convolutions and matrix products compute float32 as "ieee" or as "tf32" within the block."""
    cudnn: Any = torch.backends.cudnn
    settings: tuple[Any, ...] = (cudnn.conv, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = precision
        yield
    finally:
        for setting, old in zip(settings, before, strict=True):
            setting.fp32_precision = old


def cpu_accumulates_in_float32(dtype: torch.dtype) -> bool:
    """Return whether the CPU's convolutions sum this dtype's products in float32, as the tolerances assume.

    Where oneDNN has no kernels for 16 bits on a processor, torch's own round each partial sum to the dtype.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)()


def conv_tolerance(reference: Tensor, magnitude: Tensor, terms: int, dtype: torch.dtype, **rounds: Any) -> Tensor:
    """Return how far a sum of `terms` products may lie from `reference`, stored as `dtype`; the rest as `sum_error`."""
    return stored(reference, sum_error(magnitude, terms, dtype, **rounds), dtype)


def sum_error(
    magnitude: Tensor,
    terms: int,
    dtype: torch.dtype,
    *,
    allow_tf32: bool = False,
    tensor_cores: bool | None = None,
) -> Tensor:
    """Return the error E of a sum of `terms` products before it is stored as `dtype`; `magnitude` is S above.

    tensor_cores: whether the accumulation runs on them; by default where `magnitude` is on a GPU and the inputs are
    16 bits wide or TF32. All float64, of magnitude's shape.
    """
    tf32 = allow_tf32 and dtype == torch.float32
    if tensor_cores is None:
        tensor_cores = magnitude.is_cuda and (dtype.itemsize == 2 or tf32)
    u_acc = TENSOR_CORE_ROUNDOFF if tensor_cores else UNIT_ROUNDOFF[torch.float32]
    u_in = TF32_INPUT_ROUNDOFF if tf32 else 0.0
    return (6 * math.sqrt(terms) * u_acc + 2 * u_in + u_in**2) * magnitude


def stored(reference: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the error after rounding to `dtype`. Next to an infinity there is no error to speak of: zero."""
    tolerance = error + UNIT_ROUNDOFF[dtype] * (reference.abs() + error)
    if dtype == torch.float16:
        tolerance = tolerance + FP16_UNDERFLOW
    return torch.where(reference.isinf(), 0.0, tolerance)


def assert_within(actual: Tensor, reference: Tensor, tolerance: Tensor | float) -> None:
    """Raise AssertionError unless |actual - reference| <= tolerance everywhere, with NaNs in the same places.

    The message gives the worst element: its index, expected and actual value, and the tolerance it exceeds. An
    infinity must be met exactly. tolerance 0 demands equality.
    """
    if actual.shape != reference.shape:
        raise AssertionError(f"shape: expected {tuple(reference.shape)}, got {tuple(actual.shape)}")
    if actual.numel() == 0:
        return
    a, r = actual.detach().double(), reference.detach().double()
    limit = torch.as_tensor(tolerance, dtype=torch.float64, device=r.device).expand_as(r)
    error = (a - r).abs()
    # In units of the tolerance; 0/0, a perfect match, counts as zero, and what must match exactly but does not as inf.
    excess = torch.where(error == 0, 0.0, error / limit)
    exact = ~(a.isfinite() & r.isfinite())
    same = (a == r) | (a.isnan() & r.isnan())
    excess = torch.where(exact, torch.where(same, 0.0, math.inf), excess)
    worst = int(excess.argmax())
    if excess.flatten()[worst] <= 1:
        return
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), a.shape))
    raise AssertionError(
        f"{int((excess > 1).sum())} of {a.numel()} elements are outside the tolerance; the worst is {index}: "
        f"expected {float(r[index])!r}, got {float(a[index])!r}, off by {float(error[index]):.3e} "
        f"where {float(limit[index]):.3e} is allowed"
    )
