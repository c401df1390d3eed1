"""The norm kernels against float64: statistics, normalisation, and the way back.

Where a result follows from inputs the test hands over (mean and invstd, say), the reference takes them as they are, so
that each tolerance counts the roundings of one kernel. u is float32's unit roundoff.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastunet.kernels import gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from injected_faults import kernels_with
from kernel_device import DEVICE, DTYPES, INTERPRETED, MARK
from torch import Tensor

from fastunet.testing import UNIT_ROUNDOFF, assert_within, conv3x3_expected, random_input, random_integers

pytestmark = [MARK, pytest.mark.usefixtures("nan_in_fresh_memory")]

U = UNIT_ROUNDOFF[torch.float32]
EPS = 1e-5
HOPPER = dataclasses.replace(gpu.known_target(90), multiprocessors=4)
TARGETS = {"here": None, **({"hopper": HOPPER} if INTERPRETED else {})}


def load_ops(package: str = "fastunet.kernels") -> SimpleNamespace:
    """The public launchers of a kernels package."""
    modules = (
        importlib.import_module(f"{package}.{name}") for name in ("conv3x3.pointer", "epilogue", "norm", "norm_grad")
    )
    conv3x3, epilogue, norm, norm_grad = modules
    return SimpleNamespace(
        conv=conv3x3.conv3x3_with_statistics,
        Statistics=epilogue.Statistics,
        finish=norm.finish_statistics,
        Affine=norm.Affine,
        normalise=norm.normalise,
        grad=norm_grad.norm_grad,
    )


OPS = load_ops()


@pytest.fixture(params=TARGETS.values(), ids=TARGETS)
def any_target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target as it is, and, in the interpreter, one whose convolution has the descriptor form."""
    if request.param is not None:
        monkeypatch.setattr(gpu, "target", lambda device: request.param)


def stored(value: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """The tolerance after rounding to dtype."""
    underflow = 2.0**-25 if dtype == torch.float16 else 0.0
    return error + UNIT_ROUNDOFF[dtype] * (value.abs() + error) + underflow


# --- statistics ---


def check_statistics(ops: Any, y: Tensor, statistics: Any, groups: int, momentum: float = 0.3) -> None:
    """mean, invstd and, for one group, running statistics of y as it was stored."""
    channels = y.shape[1]
    running = None
    if groups == 1:
        running = [random_input((channels,), seed=i, device=DEVICE).abs() for i in (5, 6)]
    before = None if running is None else [t.double() for t in running]
    mean, invstd = ops.finish(statistics, groups, eps=EPS, running=running, momentum=momentum)
    assert mean.shape == invstd.shape == (groups, channels)
    values = y.double().movedim(1, -1).reshape(groups, -1, channels)
    count, true_mean = values.shape[1], values.mean(1)
    variance = values.var(1, correction=0)
    # A tile's sum has at most 256 terms; the merging adds a rounding for each of its few steps.
    mean_error = (6 * 16 + 16) * U * values.abs().mean(1)
    # M2 about a mean that is off by d is off by n d^2, beside the roundings of its own sum.
    variance_error = (6 * 16 + 32) * U * variance + mean_error.square() + 4 * U * mean_error * variance.sqrt()
    assert_within(mean, true_mean, mean_error)
    true_invstd = (variance + EPS).rsqrt()
    assert_within(invstd, true_invstd, true_invstd * (4 * U + 0.5 * variance_error / (variance + EPS)))
    if running is None or before is None:
        return
    unbiased = variance * count / (count - 1)
    for actual, old, new, error in zip(
        running, before, (true_mean, unbiased), (mean_error, variance_error), strict=True
    ):
        expected = old + momentum * (new[0] - old)
        assert_within(actual, expected, momentum * 2 * error[0] + 4 * U * (old.abs() + new[0].abs()))


def convolve(ops: Any, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Any]:
    """A convolution's output and its statistics; shape: n, c1, c2, c_out, h, w."""
    n, c1, c2, c_out, h, w = shape
    options = {"dtype": dtype, "device": DEVICE}
    x = random_input((n, c1, h, w), seed=1, **options)
    up = random_input((n, c2, h, w), seed=2, **options) if c2 else None
    weight = random_input((c_out, c1 + c2, 3, 3), seed=3, **options)
    y, statistics = ops.conv(x, weight, up=up)
    assert_within(y, *conv3x3_expected(x, weight, up=up))
    return y, statistics


SHAPES = ((2, 3, 0, 17, 9, 11), (1, 32, 16, 40, 8, 8), (3, 48, 0, 72, 5, 3), (2, 1, 0, 1, 1, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("any_target")
def test_statistics_of_a_convolution(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    y, statistics = convolve(OPS, shape, dtype)
    for groups in {1, shape[0]}:
        check_statistics(OPS, y, statistics, groups)


def constant_mean(ops: Any, mean: float, height: int = 48) -> tuple[Tensor, Any]:
    """A float32 convolution whose output is `mean` plus noise of deviation 1: the weight's centre tap carries it."""
    noise = random_input((2, 1, height, 17), device=DEVICE)
    x = torch.cat([torch.ones_like(noise), noise], dim=1)
    weight = torch.zeros(3, 2, 3, 3, device=DEVICE)
    weight[:, 0, 1, 1], weight[:, 1, 1, 1] = mean, 1.0
    return ops.conv(x, weight)


def check_large_mean(ops: Any) -> None:
    y, statistics = constant_mean(ops, 1e4)
    _, invstd = ops.finish(statistics, 1, eps=0.0)
    variance = y.double().var((0, 2, 3), correction=0)
    assert_within(invstd[0].double() ** -2, variance, 1e-3 * variance)
    naive = y.square().mean((0, 2, 3)) - y.mean((0, 2, 3)).square()
    assert ((naive - variance).abs() > 0.1 * variance).any(), "the naive formula would have done"


@pytest.mark.usefixtures("any_target")
def test_variance_beside_a_large_mean() -> None:
    check_large_mean(OPS)


def many_tiles(ops: Any, tiles: int, groups: int) -> tuple[Tensor, Any]:
    """Statistics of `tiles` tiles of four values in each of two channels, and the values [groups, 4 * tiles, 2]."""
    values = random_input((tiles, 4, 2), seed=4, device=DEVICE) + 3
    count = torch.full((tiles,), 4.0, device=DEVICE)
    partial = torch.stack([values.mean(1), values.var(1, correction=0) * 4])
    return values.reshape(groups, -1, 2), ops.Statistics(count, partial)


def check_merging(ops: Any) -> None:
    """More tiles than one round merges, in parts that do not come out even."""
    for tiles, groups in ((700, 1), (1030, 2), (40, 4)):
        values, statistics = many_tiles(ops, tiles, groups)
        mean, invstd = ops.finish(statistics, groups, eps=EPS)
        true = values.double()
        assert_within(mean, true.mean(1), 64 * U * true.abs().mean(1))
        expected = (true.var(1, correction=0) + EPS).rsqrt()
        assert_within(invstd, expected, 128 * U * expected)


def test_merging_in_two_rounds() -> None:
    check_merging(OPS)


def test_statistics_of_an_image_do_not_depend_on_the_others() -> None:
    n, c, h, w = 3, 17, 19, 9
    x = random_input((n, c, h, w), dtype=torch.bfloat16, device=DEVICE)
    weight = random_input((5, c, 3, 3), dtype=torch.bfloat16, seed=1, device=DEVICE)
    together = OPS.finish(OPS.conv(x, weight)[1], n, eps=EPS)
    alone = OPS.finish(OPS.conv(x[1:2], weight)[1], 1, eps=EPS)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[1:2], b)


# --- normalisation, and the way back ---


def make(n: int, c: int, h: int, w: int, dtype: torch.dtype, groups: int, affine: bool = True) -> tuple[Tensor, dict]:
    """raw and what the norm is given: any numbers will do."""
    raw = random_input((n, c, h, w), dtype=dtype, device=DEVICE)
    mean = random_input((groups, c), seed=1, device=DEVICE)
    invstd = random_input((groups, c), seed=2, device=DEVICE).abs() + 0.1
    gamma, beta = (random_input((c,), dtype=dtype, seed=i, device=DEVICE) if affine else None for i in (3, 4))
    return raw, {"mean": mean, "invstd": invstd, "gamma": gamma, "beta": beta}


def in_double(given: dict, n: int) -> tuple[Tensor, Tensor, Any, Any]:
    """mean and invstd [N or 1, C, 1, 1], gamma and beta [C, 1, 1], or 1 and 0."""
    mean, invstd = (given[key].double()[:, :, None, None] for key in ("mean", "invstd"))
    if given["gamma"] is None:
        return mean, invstd, mean.new_ones(1), mean.new_zeros(1)
    gamma, beta = (given[key].double()[:, None, None] for key in ("gamma", "beta"))
    return mean, invstd, gamma, beta


def activated(v: Tensor, slope: float | None) -> Tensor:
    return v if slope is None else torch.where(v <= 0, v * slope if slope else 0.0, v)


def check_normalise(ops: Any, raw: Tensor, given: dict, slope: float | None) -> Tensor:
    """y and its maxima; returns y."""
    pool = min(raw.shape[2:]) >= 2
    y, pooled = ops.normalise(raw, ops.Affine(**given), slope, pool=pool)
    assert y.dtype == raw.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    mean, invstd, gamma, beta = in_double(given, raw.shape[0])
    value = activated((raw.double() - mean) * invstd * gamma + beta, slope)
    # A subtraction, two products and a sum, each rounded once.
    error = 4 * U * ((raw.double().abs() + mean.abs()) * invstd * gamma.abs() + beta.abs())
    assert_within(y, value, stored(value, error, raw.dtype))
    if pool and raw.numel():
        assert torch.equal(pooled, F.max_pool2d(y, 2))
    return y


def check_grad(ops: Any, raw: Tensor, given: dict, slope: float | None, which: str, *, statistics_given: bool) -> None:
    """The gradients of raw, gamma and beta, from y as the forward kernel stored it."""
    y, _ = ops.normalise(raw, ops.Affine(**given), slope)
    pooled_shape = (*raw.shape[:2], raw.shape[2] // 2, raw.shape[3] // 2)
    grad_y = random_input(raw.shape, dtype=raw.dtype, seed=7, device=DEVICE) if which != "pooled" else None
    grad_pooled = random_input(pooled_shape, dtype=raw.dtype, seed=8, device=DEVICE) if which != "y" else None
    actual = ops.grad(raw, grad_y, grad_pooled, ops.Affine(**given), slope, statistics_given=statistics_given)

    g = torch.zeros_like(raw, dtype=torch.float64) if grad_y is None else grad_y.double()
    if grad_pooled is not None:
        leaf = y.double().requires_grad_()
        g = g + torch.autograd.grad(F.max_pool2d(leaf, 2), leaf, grad_pooled.double())[0]
    if slope is not None:
        g = torch.where(y > 0, g, g * slope)
    mean, invstd, gamma, _ = in_double(given, raw.shape[0])
    normal = (raw.double() - mean) * invstd
    normal_size = (raw.double().abs() + mean.abs()) * invstd
    over = (0, 2, 3) if mean.shape[0] == 1 else (2, 3)
    m = raw.numel() // (raw.shape[1] * mean.shape[0])
    # g is rounded twice, normal as well, and a sum of m of them grows errors like a random walk.
    walk = (6 * m**0.5 + 6) * U
    sums = [g.sum(over, keepdim=True), (g * normal).sum(over, keepdim=True)]
    errors = [walk * g.abs().sum(over, keepdim=True), walk * (g.abs() * normal_size).sum(over, keepdim=True)]
    value, error = g, 2 * U * g.abs()
    if not statistics_given:
        value = g - (sums[0] + normal * sums[1]) / m
        terms = (sums[0].abs() + normal_size * sums[1].abs()) / m
        error = 3 * U * g.abs() + 6 * U * terms + (errors[0] + normal_size * errors[1]) / m
    scale = invstd * gamma
    assert actual[0].dtype == raw.dtype
    assert_within(
        actual[0], value * scale, stored(value * scale, error * scale.abs() + 2 * U * (value * scale).abs(), raw.dtype)
    )
    for got, total, slack in zip(actual[1:], sums[::-1], errors[::-1], strict=True):
        assert_within(got, total.sum(0).flatten(), slack.sum(0).flatten() + 4 * U * total.abs().sum(0).flatten())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slope", [None, 0.0, 0.1])
@pytest.mark.parametrize("groups", [1, 2])
def test_normalise_and_back(dtype: torch.dtype, slope: float | None, groups: int) -> None:
    raw, given = make(2, 5, 5, 7, dtype, groups)
    check_normalise(OPS, raw, given, slope)
    for which in ("both", "y", "pooled"):
        check_grad(OPS, raw, given, slope, which, statistics_given=which == "y")


@settings(max_examples=12, derandomize=True, deadline=None)
@given(
    shape=st.tuples(*(st.integers(low, high) for low, high in ((1, 3), (1, 17), (1, 33), (1, 33)))),
    dtype=st.sampled_from(DTYPES),
    slope=st.sampled_from([None, 0.0, 0.2]),
    per_image=st.booleans(),
    affine=st.booleans(),
    statistics_given=st.booleans(),
)
def test_any_shape(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    slope: float | None,
    per_image: bool,
    affine: bool,
    statistics_given: bool,
) -> None:
    raw, given = make(*shape, dtype, shape[0] if per_image else 1, affine)
    check_normalise(OPS, raw, given, slope)
    which = "both" if min(shape[2:]) >= 2 else "y"
    check_grad(OPS, raw, given, slope, which, statistics_given=statistics_given)


def test_gradients_that_nobody_wants_are_none() -> None:
    raw, given = make(2, 5, 4, 4, torch.float32, 1)
    options = {"statistics_given": False, "wants_affine": False}
    grad_raw, grad_gamma, grad_beta = OPS.grad(raw, raw, None, OPS.Affine(**given), 0.0, **options)
    assert grad_gamma is grad_beta is None
    full, _, _ = OPS.grad(raw, raw, None, OPS.Affine(**given), 0.0, statistics_given=False)
    assert torch.equal(grad_raw, full)
    assert OPS.grad(raw, raw, None, OPS.Affine(**given), 0.0, statistics_given=False, wants_raw=False)[0] is None


def test_the_same_bits_again_and_for_an_image_alone() -> None:
    raw, given = make(3, 17, 11, 9, torch.bfloat16, 3)
    grad = random_input(raw.shape, dtype=raw.dtype, seed=9, device=DEVICE)
    first, second = (OPS.grad(raw, grad, None, OPS.Affine(**given), 0.0, statistics_given=False) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    one = {**given, "mean": given["mean"][1:2], "invstd": given["invstd"][1:2]}
    alone = OPS.grad(raw[1:2], grad[1:2], None, OPS.Affine(**one), 0.0, statistics_given=False)
    assert torch.equal(alone[0], first[0][1:2])


def test_nan_stays() -> None:
    raw, given = make(1, 2, 4, 4, torch.float32, 1)
    raw[0, 0, 1, 1] = float("nan")
    y, pooled = OPS.normalise(raw, OPS.Affine(**given), 0.0, pool=True)
    assert y.isnan().nonzero().tolist() == [[0, 0, 1, 1]]
    assert pooled.isnan().nonzero().tolist() == [[0, 0, 0, 0]]
    y, statistics = OPS.conv(raw, random_integers((3, 2, 3, 3), device=DEVICE))
    mean, invstd = OPS.finish(statistics, 1, eps=EPS)
    assert mean.isnan().all()
    assert invstd.isnan().all()


# --- injected faults ---


def parity_suite(ops: Any) -> None:
    """A short run over everything the kernels do."""
    y, statistics = convolve(ops, (2, 3, 0, 17, 9, 11), torch.float32)
    check_statistics(ops, y, statistics, 1)
    check_statistics(ops, y, statistics, 2)
    check_large_mean(ops)
    check_merging(ops)
    for groups in (1, 2):
        raw, given = make(2, 5, 21, 17, torch.float32, groups)
        check_normalise(ops, raw, given, 0.1)
        check_grad(ops, raw, given, 0.1, "both", statistics_given=False)
        check_grad(ops, raw, given, 0.0, "y", statistics_given=True)


# A file of the kernels package, a fragment of it, and its mutation.
BUGS = {
    "deviation_about_zero": ("epilogue", "v - tl.expand_dims(mean, 1 - AXIS)", "v"),
    "count_of_the_whole_tile": (
        "epilogue",
        "tl.sum(inside.to(tl.float32), 1)",
        "tl.sum(1.0 + 0 * inside.to(tl.float32), 1)",
    ),
    "padding_counts": ("epilogue", "tl.where(inside, v - ", "tl.where(inside | True, v - "),
    "step_between_means_lost": ("norm", "m2 += block_m2 + step", "m2 += block_m2 + 0 * step"),
    "no_pivot": ("norm", "means - block_mean[None, :], 0.0", "means - pivot[None, :], 0.0"),
    "last_part_of_a_group_lost": (
        "norm",
        "tl.minimum(first + per_split, (out // splits + 1) * per_group)",
        "first + 1",
    ),
    "biased_running_variance": ("norm", "m2 / (n - 1.0)", "m2 / n"),
    "first_image_for_all": ("norm", "at = image[:, None] * C + at", "at = 0 * image[:, None] + at"),
    "beta_twice": ("norm", "normal * gamma + beta", "normal * gamma + beta + beta"),
    "sum_of_g_lost": ("norm_grad", "(sum_g + normal * sum_gn)", "(normal * sum_gn)"),
    "sum_of_g_normal_lost": ("norm_grad", "(sum_g + normal * sum_gn)", "(sum_g)"),
    "gamma_lost": ("norm_grad", "scale = invstd * gamma", "scale = invstd + 0 * gamma"),
    "sums_of_the_first_image": ("norm_grad", "at = image[:, None] * (2 * C) + at", "at = 0 * image[:, None] + at"),
    "last_part_lost": (
        "norm_grad",
        "last = tl.minimum(first + per_split, windows)",
        "last = tl.minimum(first + 1, windows)",
    ),
    "pool_routed_to_the_first": ("norm_grad", "tl.where(winner == 3, routed", "tl.where(winner == 0, routed"),
}


def test_parity_suite_passes_on_the_kernels_as_they_are() -> None:
    parity_suite(OPS)


@pytest.mark.parametrize("bug", BUGS)
def test_injected_fault_is_caught(bug: str, tmp_path: Path) -> None:
    with kernels_with(BUGS[bug], tmp_path) as package, pytest.raises(AssertionError):
        parity_suite(load_ops(package))
