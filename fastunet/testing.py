"""What a parity test needs: inputs in every memory layout, random cotangents, float64 references, error budgets.

A tolerance here is never a figure that happened to pass. With u_acc the unit roundoff of the accumulation, u_in of
rounding the inputs (TF32 only), u_out of the output's dtype, K the number of terms of a sum and S the sum of their
absolute values, an element of a convolution may be off by

    E = (6 sqrt(K) u_acc + 2 u_in + u_in^2) S        before it is rounded to the output's dtype, and by
    E + u_out (|reference| + E)  (+ 2^-25 for float16, whose smallest numbers are spaced 2^-24)        after.

The first term is the random-walk growth of K rounding errors with a margin of six; a worst case would have K where
it has 6 sqrt(K). References are computed in float64 from the inputs as they are, already rounded to their dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded", "unaligned")

# u_out: half the distance from 1 to the next number.
UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

_TF32_INPUT_ROUNDOFF = 2.0**-10
_TENSOR_CORE_ROUNDOFF = 2.0**-23
_FP16_UNDERFLOW = 2.0**-25
_FP32_SMALLEST = 2.0**-126


class Expected(NamedTuple):
    """A float64 reference and, of the same shape, how far from it a correct result may lie."""

    value: Tensor
    tolerance: Tensor


def in_layout(x: Tensor, layout: str) -> Tensor:
    """x [N, C, H, W] with the same values in another memory layout, one of LAYOUTS.

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
    """Normal values times `scale`, rounded to `dtype`: the same on every device. Layouts are of 4-D shapes."""
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
    """Integers from -largest to largest: while sums stay below 2^24, float32 convolutions of them are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, tuple(shape), generator=generator).to(device=device, dtype=dtype)


def random_cotangent(like: Tensor, *, seed: int = 1) -> Tensor:
    """A normal gradient for `like`. A constant one, as of .sum(), would hide every error that permutes or averages."""
    values = torch.randn(tuple(like.shape), generator=torch.Generator().manual_seed(seed))
    return values.to(device=like.device, dtype=like.dtype)


@contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Within the block, convolutions and matrix products compute float32 as "ieee" or as "tf32"."""
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


def conv_tolerance(
    reference: Tensor,
    magnitude: Tensor,
    terms: int,
    dtype: torch.dtype,
    *,
    allow_tf32: bool = False,
    tensor_cores: bool | None = None,
) -> Tensor:
    """How far a sum of `terms` products may lie from `reference`, stored as `dtype`; `magnitude` is S above.

    tensor_cores: whether the accumulation runs on them; by default where `reference` is on a GPU and the inputs are
    16 bits wide or TF32. All float64, of reference's shape.
    """
    tf32 = allow_tf32 and dtype == torch.float32
    if tensor_cores is None:
        tensor_cores = reference.is_cuda and (dtype.itemsize == 2 or tf32)
    u_acc = _TENSOR_CORE_ROUNDOFF if tensor_cores else UNIT_ROUNDOFF[torch.float32]
    u_in = _TF32_INPUT_ROUNDOFF if tf32 else 0.0
    error = (6 * math.sqrt(terms) * u_acc + 2 * u_in + u_in**2) * magnitude
    return _stored(reference, error, dtype)


def _stored(reference: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """The error after rounding to `dtype`. Next to an infinity there is no error to speak of: zero."""
    tolerance = error + UNIT_ROUNDOFF[dtype] * (reference.abs() + error)
    if dtype == torch.float16:
        tolerance = tolerance + _FP16_UNDERFLOW
    return torch.where(reference.isinf(), 0.0, tolerance)


def conv3x3_expected(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    up: Tensor | None = None,
    negative_slope: float | None = None,
    allow_tf32: bool = False,
    tensor_cores: bool | None = None,
) -> Expected:
    """activation(conv2d(cat([x, up], 1), weight, bias, padding=1)); negative_slope None is no activation, 0 ReLU."""
    inputs = (x if up is None else torch.cat([x, up], dim=1)).double()
    b = None if bias is None else bias.double()
    value = F.conv2d(inputs, weight.double(), b, padding=1)
    magnitude = F.conv2d(inputs.abs(), weight.double().abs(), None if b is None else b.abs(), padding=1)
    terms = 9 * inputs.shape[1] + 1
    tolerance = conv_tolerance(value, magnitude, terms, x.dtype, allow_tf32=allow_tf32, tensor_cores=tensor_cores)
    if negative_slope is not None:  # Neither activation magnifies an error, unless its slope is above 1.
        value = torch.where(value <= 0, value * negative_slope if negative_slope else 0.0, value)
        tolerance = tolerance * max(1.0, negative_slope)
    return Expected(value, tolerance)


def pooled_expected(expected: Expected) -> Expected:
    """The 2x2 maxima of an expected result: a maximum is off by no more than the worst of its window."""
    return Expected(F.max_pool2d(expected.value, 2), F.max_pool2d(expected.tolerance, 2))


def conv3x3_input_grad_expected(
    grad: Tensor, weight: Tensor, *, allow_tf32: bool = False, tensor_cores: bool | None = None
) -> Expected:
    """The gradient of the convolution's input: a sum of 9*Cout products."""
    g, w = grad.double(), weight.double()
    value = F.conv_transpose2d(g, w, padding=1)
    magnitude = F.conv_transpose2d(g.abs(), w.abs(), padding=1)
    terms = 9 * weight.shape[0] + 1
    return Expected(
        value,
        conv_tolerance(value, magnitude, terms, grad.dtype, allow_tf32=allow_tf32, tensor_cores=tensor_cores),
    )


def conv3x3_weight_grad_expected(
    grad: Tensor, x: Tensor, *, allow_tf32: bool = False, tensor_cores: bool | None = None
) -> Expected:
    """The gradient of the convolution's weight: a sum of N*H*W products."""
    shape = (grad.shape[1], x.shape[1], 3, 3)
    value = conv2d_weight(x.double(), shape, grad.double(), padding=1)
    magnitude = conv2d_weight(x.double().abs(), shape, grad.double().abs(), padding=1)
    terms = grad.shape[0] * grad.shape[2] * grad.shape[3] + 1
    return Expected(
        value,
        conv_tolerance(value, magnitude, terms, grad.dtype, allow_tf32=allow_tf32, tensor_cores=tensor_cores),
    )


def bias_grad_expected(grad: Tensor) -> Expected:
    """The gradient of a bias: a float32 sum of N*H*W values, with no products and so no TF32."""
    value, magnitude = grad.double().sum((0, 2, 3)), grad.double().abs().sum((0, 2, 3))
    terms = grad.shape[0] * grad.shape[2] * grad.shape[3] + 1
    return Expected(value, conv_tolerance(value, magnitude, terms, grad.dtype, tensor_cores=False))


def conv3x3_activation_grad_expected(
    y: Tensor, grad_y: Tensor | None, grad_pooled: Tensor | None, negative_slope: float | None
) -> Expected:
    """The gradient behind activation and pooling, from torch's backward: an addition and a product may err."""
    leaf = y.detach().double().requires_grad_()
    gradient = torch.zeros_like(leaf) if grad_y is None else grad_y.double()
    if grad_pooled is not None:
        (unpooled,) = torch.autograd.grad(F.max_pool2d(leaf, 2), leaf, grad_pooled.double())
        gradient = gradient + unpooled
    if negative_slope is not None:
        gradient = torch.where(y > 0, gradient, torch.where(y <= 0, gradient * negative_slope, gradient))
    error = 2 * UNIT_ROUNDOFF[torch.float32] * gradient.abs()
    return Expected(gradient, _stored(gradient, error, y.dtype))


class _Activated(NamedTuple):
    """p, 1 - p, -log p and -log(1 - p) of logits in float64, the last None for softmax, and the errors of p and of
    both logarithms in units of u: see segmentation_sums_expected.
    """

    p: Tensor
    rest: Tensor
    logs: tuple[Tensor, Tensor | None]
    p_error: Tensor
    log_errors: tuple[Tensor, Tensor | None]


def _activated(x: Tensor, softmax: bool) -> _Activated:
    if not softmax:
        p, positive, negative = x.sigmoid(), -F.logsigmoid(x), -F.logsigmoid(-x)
        relative = 4 * x.abs() + 18
        return _Activated(
            p, (-x).sigmoid(), (positive, negative), relative * p, (relative * positive, relative * negative)
        )
    p, positive = x.softmax(1), -x.log_softmax(1)
    distance = x.amax(1, keepdim=True) - x
    of_total = 3 * (p * distance).sum(1, keepdim=True) + 6 * math.sqrt(x.shape[1]) + 4
    return _Activated(p, 1 - p, (positive, None), (3 * distance + of_total + 10) * p, (of_total + 4 * positive, None))


def _target_and_mask(logits: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both in float64: [N, C, H, W], indices one-hot, and [N, 1, H, W]. An index that is no class has no one."""
    t = target.double()
    if target.shape != logits.shape:
        t = (target.long() == torch.arange(logits.shape[1], device=target.device)[:, None, None]).double()
    return t, torch.ones_like(logits[:, :1], dtype=torch.float64) if mask is None else mask.double()


def segmentation_sums_expected(
    logits: Tensor, target: Tensor, mask: Tensor | None, *, softmax: bool, squared: bool, entropy: bool
) -> Expected:
    """fastunet.ops.segmentation_sums, stored as float32; target and mask lie between 0 and 1.

    The terms are rounded, and their errors add up, before the sum of K = H*W of them errs as every sum does. In units
    of u = 2^-24, for a float32 that is evaluated with these relative errors: exp(y) 2|y| + 4 (y and log2(e) are rounded
    and multiplied, 2^y is good to 2 units in the last place, and such a unit is up to 2u), a quotient 4, log 2, other
    operations 1:

    - sigmoid: e = exp(-|x|) errs by 2|x| + 4; 1 / (1 + e) by that times e/(1 + e), 1 and 4; e / (1 + e) by that, e's
      own error and 1: at most 4|x| + 14. log(1 + e) errs by that of e, and by 4 units of each of the two parts of
      log(r) + (e - (r - 1)) / r, r the rounded 1 + e, whose sizes add up to at most three times the result: 2|x| + 16;
      the addition to max(x, 0) 1. Both lie below 4|x| + 18.
    - softmax: z = x - max(x) errs by |z|, exp(z) so by 3|z| + 4, and their sum by the mean of this under p,
      R = 3 sum(p |z|) + 4, and by 6 sqrt(C) for the addition of C terms. The quotient errs by the two and 4, hence
      p by 3|z| + R + 6 sqrt(C) + 10. -log p = log(sum) + |z| is off by R + 6 sqrt(C), not relative to it, and by
      2, 1 and 1 units of itself.

    Products add one for each factor: at most 4. Below 2^-126, where float32 has no full precision, each term may be
    lost.
    """
    x = logits.double()
    t, m = _target_and_mask(logits, target, mask)
    a = _activated(x, softmax)
    pm, tm = a.p * m, t * m
    # Each term and its error in units of u.
    rows = [
        (pm * tm, (a.p_error + 4 * a.p) * m * tm),
        (pm * pm, (2 * a.p_error + 4 * a.p) * pm * m) if squared else (pm, (a.p_error + a.p) * m),
        (tm * tm, 3 * tm * tm) if squared else (tm, tm),
    ]
    if entropy:
        for weight, value, error in zip((tm, m * (1 - t)), a.logs, a.log_errors, strict=True):
            if value is not None and error is not None:
                rows.append((torch.where(weight == 0, 0.0, weight * value), weight * (error + 4 * value)))
    terms, errors = (torch.stack([row[i] for row in rows]).sum((3, 4)) for i in range(2))
    pixels = logits.shape[2] * logits.shape[3]
    u = UNIT_ROUNDOFF[torch.float32]
    error = u * (errors + 6 * math.sqrt(pixels) * terms) + pixels * _FP32_SMALLEST
    return Expected(terms, _stored(terms, error, torch.float32))


def segmentation_sums_grad_expected(
    grad: Tensor, logits: Tensor, target: Tensor, mask: Tensor | None, *, softmax: bool, squared: bool
) -> Expected:
    """The gradient of the logits from that of the sums, grad [3, N, C] or with the entropies' rows.

    The value is float64 autograd's. Its error, with the notation and the errors of segmentation_sums_expected and
    D = |grad0| m^2 t + |grad1| (m or 2 m^2 p) the size of what is multiplied with p's own derivative: three factors
    for sigmoid, p (1 - p) and p once more in D, and 8 roundings; for softmax each p (dp - sum(dp p)) has D's, p's and
    the sum's, whose C terms err by 6 sqrt(C) more. The entropies' parts have one such factor each.
    """
    leaf = logits.detach().double().requires_grad_()
    t, m = _target_and_mask(logits, target, mask)
    g = grad.double()[..., None, None]
    # The sigmoid's own derivative, p (1 - p), is not good to float32 where p is next to 1.
    pm, tm = (leaf.softmax(1) if softmax else F.logsigmoid(leaf).exp()) * m, t * m
    of_sums = g[0] * pm * tm + g[1] * (pm * pm if squared else pm)
    if len(grad) > 3:
        of_sums = of_sums - g[3] * tm * (leaf.log_softmax(1) if softmax else F.logsigmoid(leaf))
    if len(grad) > 4:
        of_sums = of_sums - g[4] * m * (1 - t) * F.logsigmoid(-leaf)
    (value,) = torch.autograd.grad(of_sums.sum(), leaf)

    a = _activated(leaf.detach(), softmax)
    g = g.abs()
    size = g[0] * m * tm + g[1] * (2 * m * m * a.p if squared else m)
    positive = g[3] * tm if len(grad) > 3 else torch.zeros_like(size)
    if softmax:
        root = 6 * math.sqrt(logits.shape[1])
        total, of_positive = (size * a.p).sum(1, keepdim=True), positive.sum(1, keepdim=True)
        of_total = (size * (2 * a.p_error + 8 * a.p)).sum(1, keepdim=True) + root * total
        error = size * (2 * a.p_error + 10 * a.p) + a.p_error * total + a.p * (of_total + 4 * total)
        error += 4 * positive + (a.p_error + (6 + root) * a.p) * of_positive
    else:
        relative = 4 * leaf.detach().abs() + 18
        error = size * a.p * a.rest * (3 * relative + 11) + positive * a.rest * (relative + 9)
        if len(grad) > 4:
            error += g[4] * m * (1 - t) * a.p * (relative + 9)
    smallest = _FP32_SMALLEST * g.sum((0, 2), keepdim=True)[0]
    return Expected(value, _stored(value, UNIT_ROUNDOFF[torch.float32] * error + smallest, logits.dtype))


def assert_within(actual: Tensor, reference: Tensor, tolerance: Tensor | float) -> None:
    """AssertionError unless |actual - reference| <= tolerance everywhere, with NaNs in the same places.

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
