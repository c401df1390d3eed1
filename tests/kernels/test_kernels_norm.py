"""The norm kernels against float64: statistics, normalisation, and the way back.

Where a result follows from inputs the test hands over (mean and invstd, say), the reference takes them as they are, so
that each tolerance counts the roundings of one kernel.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv3x3_checks import BFLOAT, HALF, Shape, make_inputs
from fastunet.kernels import gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from injected_faults import check_tests, load
from kernel_device import DEVICE, DTYPES, HOPPER, MARK, on
from torch import Tensor

from fastunet.testing import assert_within, conv3x3_expected, random_input
from fastunet.testing.bounds import Expected, activation_grad, pool_grad

pytestmark = [MARK, pytest.mark.usefixtures("nan_in_fresh_memory")]
KERNELS = load()
EPS = 1e-5


# --- statistics ---


def assert_statistics(kernels: ModuleType, y: Tensor, statistics: Any, groups: int, momentum: float = 0.3) -> None:
    """mean, invstd and, for one group, running statistics of y as it was stored."""
    channels = y.shape[1]
    running = [random_input((channels,), seed=i, device=DEVICE).abs() for i in (5, 6)] if groups == 1 else None
    before = [Expected.exact(t) for t in running or ()]
    actual = kernels.norm.finish_statistics(statistics, groups, eps=EPS, running=running, momentum=momentum)
    values = Expected.exact(y.movedim(1, -1).reshape(groups, -1, channels))
    count = values.value.shape[1]
    # The merging adds a rounding for each of its few steps.
    mean = values.sum([1], keepdim=True, merging=16).scaled(1 / count)
    deviation = values - mean
    m2 = (deviation * deviation).sum([1], merging=32)
    assert_within(actual[0], *mean[:, 0])
    assert_within(actual[1], *m2.scaled(1 / count).inverse_root(EPS))
    moved = (mean[0, 0], m2[0].scaled(1 / max(count - 1, 1)))
    for result, old, new in zip(running or (), before, moved, strict=False):
        assert_within(result, *(old + (new - old).scaled(momentum)))


def convolve(kernels: ModuleType, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """A convolution's output and its statistics."""
    x, up, weight, _ = make_inputs(shape, dtype)
    y, statistics = kernels.conv3x3.pointer.conv3x3_with_statistics(x, weight, up=up)
    assert_within(y, *conv3x3_expected(x, weight, up=up))
    return y, statistics


CONVOLUTIONS = [
    *(((2, 3, 0, 17, 9, 11), dtype, None) for dtype in DTYPES),
    ((1, 32, 16, 40, 8, 8), torch.float32, None),
    ((2, 1, 0, 1, 1, 2), HALF, None),
    ((1, 32, 16, 40, 8, 8), HALF, HOPPER),
    ((3, 16, 0, 72, 5, 3), BFLOAT, HOPPER),
]


@pytest.mark.parametrize(("shape", "dtype", "target"), CONVOLUTIONS, ids=str)
def test_statistics_of_a_convolution(shape: Shape, dtype: torch.dtype, target: gpu.Target | None) -> None:
    with on(target, KERNELS):
        y, statistics = convolve(KERNELS, shape, dtype)
    for groups in {1, shape[0]}:
        assert_statistics(KERNELS, y, statistics, groups)


def test_variance_beside_a_large_mean_by_boxes() -> None:
    with on(HOPPER, KERNELS):
        variance_beside_a_large_mean(KERNELS)


# --- normalisation, and the way back ---


def make(n: int, c: int, h: int, w: int, dtype: torch.dtype, groups: int, affine: bool = True) -> tuple[Tensor, dict]:
    """raw and what the norm is given: any numbers will do."""
    raw = random_input((n, c, h, w), dtype=dtype, device=DEVICE)
    mean = random_input((groups, c), seed=1, device=DEVICE)
    invstd = random_input((groups, c), seed=2, device=DEVICE).abs() + 0.1
    gamma, beta = (random_input((c,), dtype=dtype, seed=i, device=DEVICE) if affine else None for i in (3, 4))
    return raw, {"mean": mean, "invstd": invstd, "gamma": gamma, "beta": beta}


def expected_affine(affine: dict) -> tuple[Expected, ...]:
    """mean and invstd [N or 1, C, 1, 1], gamma and beta [1, C, 1, 1], or 1 and 0."""
    values = {**affine, "gamma": torch.ones(1), "beta": torch.zeros(1)} if affine["gamma"] is None else affine
    return tuple(Expected.exact(t.reshape(-1, t.shape[-1], 1, 1).to(DEVICE)) for t in values.values())


def assert_normalise(kernels: ModuleType, raw: Tensor, affine: dict, slope: float | None) -> None:
    """y and its maxima."""
    pool = min(raw.shape[2:]) >= 2
    y, pooled = kernels.norm.normalise(raw, kernels.norm.Affine(**affine), slope, pool=pool)
    assert y.dtype == raw.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    mean, invstd, gamma, beta = expected_affine(affine)
    value = (Expected.exact(raw) - mean) * invstd * gamma + beta
    assert_within(y, *value.activate(slope).stored(raw.dtype))
    if pool and raw.numel():
        assert torch.equal(pooled, F.max_pool2d(y, 2))


def assert_grad(
    kernels: ModuleType, raw: Tensor, affine: dict, slope: float | None, which: str, *, statistics_given: bool
) -> None:
    """The gradients of raw, gamma and beta, from y as the forward kernel stored it."""
    y = Expected.exact(kernels.norm.normalise(raw, kernels.norm.Affine(**affine), slope)[0])
    pooled_shape = (*raw.shape[:2], raw.shape[2] // 2, raw.shape[3] // 2)
    grad_y = random_input(raw.shape, dtype=raw.dtype, seed=7, device=DEVICE) if which != "pooled" else None
    grad_pooled = random_input(pooled_shape, dtype=raw.dtype, seed=8, device=DEVICE) if which != "y" else None
    actual = kernels.norm_grad.norm_grad(
        raw, grad_y, grad_pooled, kernels.norm.Affine(**affine), slope, statistics_given=statistics_given
    )
    g = Expected.exact(torch.zeros_like(raw) if grad_y is None else grad_y)
    g = activation_grad(g if grad_pooled is None else g + pool_grad(grad_pooled, y), y, slope)
    mean, invstd, gamma, _ = expected_affine(affine)
    normal = (Expected.exact(raw) - mean) * invstd
    over = (0, 2, 3) if affine["mean"].shape[0] == 1 else (2, 3)
    sums = [each.sum(over, keepdim=True) for each in (g, g * normal)]
    value = g
    if not statistics_given:
        value = g - (sums[0] + normal * sums[1]).scaled(raw.shape[1] * affine["mean"].shape[0] / raw.numel())
    assert actual[0].dtype == raw.dtype
    assert_within(actual[0], *(value * (invstd * gamma)).stored(raw.dtype))
    for result, total in zip(actual[1:], sums[::-1], strict=True):
        assert_within(result, *total.sum([0, 2, 3]))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("dtype", "slope"), list(zip(DTYPES, (None, 0.0, 0.1), strict=True)), ids=str)
def test_normalise_and_back(dtype: torch.dtype, slope: float | None, groups: int) -> None:
    raw, affine = make(2, 5, 5, 7, dtype, groups)
    assert_normalise(KERNELS, raw, affine, slope)
    for which in ("both", "y", "pooled"):
        assert_grad(KERNELS, raw, affine, slope, which, statistics_given=which == "y")


@settings(max_examples=6, derandomize=True, deadline=None)
@given(
    shape=st.tuples(*(st.integers(low, high) for low, high in ((1, 3), (1, 17), (1, 19), (1, 19)))),
    dtype=st.sampled_from(DTYPES),
    slope=st.sampled_from([None, 0.0, 0.2]),
    per_image=st.booleans(),
    affine=st.booleans(),
    statistics_given=st.booleans(),
)
def test_any_shape(
    shape: tuple[int, ...], dtype: torch.dtype, slope: float | None, per_image: bool, affine: bool,
    statistics_given: bool,
) -> None:  # fmt: skip
    raw, parameters = make(*shape, dtype, shape[0] if per_image else 1, affine)
    assert_normalise(KERNELS, raw, parameters, slope)
    which = "both" if min(shape[2:]) >= 2 else "y"
    assert_grad(KERNELS, raw, parameters, slope, which, statistics_given=statistics_given)


# --- what catches the injected faults ---


def statistics_of_all_images_and_of_each(kernels: ModuleType) -> None:
    y, statistics = convolve(kernels, (2, 3, 0, 17, 9, 11), torch.float32)
    for groups in (1, 2):
        assert_statistics(kernels, y, statistics, groups)


def variance_beside_a_large_mean(kernels: ModuleType) -> None:
    """A float32 convolution whose output is 1e4 plus noise of deviation 1: the weight's centre tap carries it."""
    noise = random_input((2, 1, 48, 17), device=DEVICE)
    x = torch.cat([torch.ones_like(noise), noise], dim=1)
    weight = torch.zeros(3, 2, 3, 3, device=DEVICE)
    weight[:, 0, 1, 1], weight[:, 1, 1, 1] = 1e4, 1.0
    y, statistics = kernels.conv3x3.pointer.conv3x3_with_statistics(x, weight)
    _, invstd = kernels.norm.finish_statistics(statistics, 1, eps=0.0)
    variance = y.double().var((0, 2, 3), correction=0)
    assert_within(invstd[0].double() ** -2, variance, 1e-3 * variance)
    naive = y.square().mean((0, 2, 3)) - y.mean((0, 2, 3)).square()
    assert ((naive - variance).abs() > 0.1 * variance).any(), "the naive formula would have done"


def merging_in_two_rounds(kernels: ModuleType) -> None:
    """More tiles of four values in each of two channels than one round merges, in parts that do not come out even."""
    for tiles, groups in ((700, 1), (1030, 2), (40, 4)):
        values = random_input((tiles, 4, 2), seed=4, device=DEVICE) + 3
        partial = torch.stack([values.mean(1), values.var(1, correction=0) * 4])
        statistics = kernels.epilogue.Statistics(torch.full((tiles,), 4.0, device=DEVICE), partial)
        assert_statistics(kernels, values.reshape(groups, -1, 2).movedim(2, 1)[..., None], statistics, groups)


def normalisation_and_its_gradients(kernels: ModuleType) -> None:
    for groups in (1, 2):
        raw, affine = make(2, 5, 21, 17, torch.float32, groups)
        assert_normalise(kernels, raw, affine, 0.1)
        assert_grad(kernels, raw, affine, 0.1, "both", statistics_given=False)
        assert_grad(kernels, raw, affine, 0.0, "y", statistics_given=True)


test_check, test_injected_fault_is_caught = check_tests({
    statistics_of_all_images_and_of_each: [
        ("epilogue", "v - tl.expand_dims(mean, 1 - AXIS)", "v"),
        ("epilogue", "tl.sum(inside.to(tl.float32), 0)", "tl.sum(1.0 + 0 * inside.to(tl.float32), 0)"),
        ("epilogue", "tl.where(inside, deviation, 0.0)", "deviation"),
        ("conv3x3.pointer", "h0 + TILE_H <= H", "h0 <= H"),
        ("norm", "means - block_mean[None, :], 0.0", "means - pivot[None, :], 0.0"),
        ("norm", "m2 / (n - 1.0)", "m2 / n"),
    ],
    variance_beside_a_large_mean: [],
    merging_in_two_rounds: [
        ("norm", "m2 += block_m2 + step", "m2 += block_m2 + 0 * step"),
        ("norm", "tl.minimum(first + per_split, (out // splits + 1) * per_group)", "first + 1"),
    ],
    normalisation_and_its_gradients: [
        ("norm", "at = image[:, None] * C + at", "at = 0 * image[:, None] + at"),
        ("norm", "normal * gamma + beta", "normal * gamma + beta + beta"),
        ("norm_grad", "(sum_g + normal * sum_gn)", "(normal * sum_gn)"),
        ("norm_grad", "(sum_g + normal * sum_gn)", "(sum_g)"),
        ("norm_grad", "scale = invstd * gamma", "scale = invstd + 0 * gamma"),
        ("norm_grad", "at = image[:, None] * (2 * C) + at", "at = 0 * image[:, None] + at"),
        ("norm_grad", "last = tl.minimum(first + per_split, windows)", "last = tl.minimum(first + 1, windows)"),
        ("norm_grad", "tl.where(winner == 3, routed", "tl.where(winner == 0, routed"),
    ],
})  # fmt: skip
