"""The error budgets: tight enough to catch small mistakes, wide enough for correct arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.testing import (
    LAYOUTS,
    Expected,
    assert_within,
    bias_grad_expected,
    conv1x1_bias_grad_expected,
    conv1x1_expected,
    conv1x1_input_grad_expected,
    conv1x1_weight_grad_expected,
    conv3x3_activation_grad_expected,
    conv3x3_expected,
    conv3x3_input_grad_expected,
    conv3x3_weight_grad_expected,
    conv_tolerance,
    conv_transpose2x2_expected,
    conv_transpose2x2_input_grad_expected,
    conv_transpose2x2_weight_grad_expected,
    e4m3_sums_expected,
    in_layout,
    random_cotangent,
    random_input,
    random_integers,
    segmentation_sums_expected,
    segmentation_sums_grad_expected,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    make = {"dtype": dtype}
    x, weight = random_input((2, 16, 9, 7), seed=1, **make), random_input((8, 16, 3, 3), seed=2, **make)
    return x, weight, random_input((8,), seed=3, **make)


def correct(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As a kernel computes it: float32 sums, rounded once."""
    return F.conv2d(x.float(), weight.float(), None if bias is None else bias.float(), padding=1).to(x.dtype)


def one_tap_lost(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    weight = weight.clone()
    weight[3, 5, 2, 2] = 0
    return correct(x, weight, bias)


def bias_rounded_first(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return correct(x, weight, None) + bias[:, None, None]


def summed_in_sixteen_bits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    halves = [F.conv2d(x.float()[:, i::2], weight.float()[:, i::2], padding=1) for i in (0, 1)]
    return (halves[0].bfloat16().float() + halves[1] + bias.float()[:, None, None]).to(x.dtype)


def one_pixel_shifted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = correct(x, weight, bias)
    y[1, 4, 8, 6] = y[1, 4, 8, 5]
    return y


def last_channel_twice(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return correct(torch.cat([x, x[:, -1:] / 64], 1), torch.cat([weight, weight[:, -1:]], 1), bias)


def stored_toward_zero(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The bits below bfloat16 cut off, as Triton's interpreter does; for wider dtypes a few bits below theirs."""
    y = F.conv2d(x.float(), weight.float(), bias.float(), padding=1)
    kept = {torch.bfloat16: 16, torch.float16: 14, torch.float32: 11}[x.dtype]
    return (y.view(torch.int32) >> kept << kept).view(torch.float32).to(x.dtype)


MISTAKES = (one_tap_lost, summed_in_sixteen_bits, one_pixel_shifted, last_channel_twice, stored_toward_zero)


def outside() -> Any:
    return pytest.raises(AssertionError, match="outside the tolerance")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_correct_convolutions_are_within_and_small_mistakes_outside(dtype: torch.dtype) -> None:
    x, weight, bias = problem(dtype)
    expected = conv3x3_expected(x, weight, bias)
    y = correct(x, weight, bias)
    assert_within(y, *expected)
    assert_within(F.max_pool2d(F.relu(y), 2), *conv3x3_expected(x, weight, bias, negative_slope=0.0).pool())
    for mistake in MISTAKES:
        with outside():
            assert_within(mistake(x, weight, bias), *expected)
    if dtype == torch.bfloat16:
        with outside():
            assert_within(bias_rounded_first(x, weight, bias * 8), *conv3x3_expected(x, weight, bias * 8))

    leaf, parameter = x.float().requires_grad_(), weight.float().requires_grad_()
    grad = random_cotangent(y)
    F.conv2d(leaf, parameter, padding=1).backward(grad.float())
    assert_within(leaf.grad.to(dtype), *conv3x3_input_grad_expected(grad, weight))
    assert_within(parameter.grad.to(dtype), *conv3x3_weight_grad_expected(grad, x))
    assert_within(grad.float().sum((0, 2, 3)).to(dtype), *bias_grad_expected(grad))


def test_tf32_is_within_its_own_budget_only() -> None:
    x, weight, bias = problem(torch.float32)

    def to_tf32(v: Tensor) -> Tensor:
        return (v.view(torch.int32) >> 13 << 13).view(torch.float32)

    y = correct(to_tf32(x), to_tf32(weight), bias)
    assert_within(y, *conv3x3_expected(x, weight, bias, allow_tf32=True))
    with pytest.raises(AssertionError):
        assert_within(y, *conv3x3_expected(x, weight, bias))


def hopper_sums(x: Tensor, weight: Tensor, step: int) -> Tensor:
    """x [N, C, 1, 1] by the centre of weight [O, C, 3, 3] as sm_90 sums e4m3 products: 32 by 32, aligned to the largest
    exponent, cut off 13 bits below it; after `step` of them in float32.
    """

    def exponent(t: Tensor) -> Tensor:
        return t.abs().log2().floor()  # -inf of 0

    def truncated(t: Tensor, largest: Tensor) -> Tensor:
        grain = torch.exp2(largest.clamp(min=-126) - 13)
        return (t / grain).trunc() * grain

    a, b = x[:, None, :, 0, 0].double(), weight[None, :, :, 1, 1].double()
    products = a * b
    exponents = torch.where(products == 0, -math.inf, sum(exponent(t).clamp(min=-6) for t in (a, b)))
    total = torch.zeros(products.shape[:2], dtype=torch.float32)
    for first in range(0, products.shape[2], step):
        partial = torch.zeros_like(products[..., 0])
        for k in range(first, first + step, 32):
            largest = torch.maximum(exponents[..., k : k + 32].amax(2), exponent(partial))
            terms = torch.cat([partial[..., None], products[..., k : k + 32]], 2)
            partial = truncated(terms, largest[..., None]).sum(2)
            partial = truncated(partial, exponent(partial))
        total += partial.float()
    return total[..., None, None]


def e4m3_problem(name: str) -> tuple[Tensor, Tensor]:
    """adversarial: of one product after which all others are cut off; subnormal: that one's exponent above its size."""
    x, weight = torch.ones(4, 1024, 1, 1), torch.ones(8, 1024, 3, 3)
    if name == "random":
        x, weight = random_input(x.shape, scale=30.0, seed=1), random_input(weight.shape, scale=30.0, seed=2)
    elif name == "adversarial":
        x[:, 0], weight[:, 0], weight[:, 1:] = 256.0, 256.0, 7.5
    else:
        x[:, 0], weight[:, 0] = 2.0**-9, 256.0
        x[:, 1:], weight[:, 1:] = 2.0**-6, 15 * 2.0**-10
    return x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("name", ["random", "adversarial", "subnormal"])
def test_sums_of_e4m3_are_within_where_float32_adds_them_up_step_by_step(name: str) -> None:
    x, weight = e4m3_problem(name)
    for step in (32, 128):
        assert_within(hopper_sums(x, weight, step), *e4m3_sums_expected(x, weight, step=step))
    if name == "adversarial":
        for step, within in ((128, 1024), (None, 128)):
            with pytest.raises(AssertionError, match="32 of 32 elements are outside the tolerance"):
                assert_within(hopper_sums(x, weight, within), *e4m3_sums_expected(x, weight, step=step))


def test_tolerance_by_hand() -> None:
    # K = 4, S = 8, reference 2: E = 6 * 2 * 2^-24 * 8 in float32, and the store adds half a unit in the last place.
    reference, magnitude = torch.tensor([2.0], dtype=torch.float64), torch.tensor([8.0], dtype=torch.float64)
    error = 96 * 2.0**-24
    for dtype, extra in ((torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        floor = 2.0**-25 if dtype == torch.float16 else 0.0
        expected = error + extra * (2 + error) + floor
        assert conv_tolerance(reference, magnitude, 4, dtype).item() == pytest.approx(expected, rel=1e-12)
    tensor_cores = conv_tolerance(reference, magnitude, 4, torch.float32, tensor_cores=True).item()
    assert tensor_cores == pytest.approx(2 * error + 2.0**-24 * (2 + 2 * error), rel=1e-12)


def test_assert_within_names_the_worst_element() -> None:
    reference = torch.zeros(2, 3, dtype=torch.float64)
    actual = reference.clone()
    actual[0, 1], actual[1, 2] = 0.5, -2.0
    with pytest.raises(AssertionError, match=r"2 of 6 .* worst is \(1, 2\): expected 0.0, got -2.0, off by 2.000e\+00"):
        assert_within(actual, reference, 0.25)
    assert_within(actual, reference, 2.0)


@pytest.mark.parametrize(
    ("actual", "reference", "fails"),
    [
        (math.nan, math.nan, False),
        (math.inf, math.inf, False),
        (math.nan, 0.0, True),
        (0.0, math.nan, True),
        (math.inf, -math.inf, True),
        (1e300, math.inf, True),
        (-0.0, 0.0, False),
        (1e-300, 0.0, True),
    ],
)
def test_assert_within_of_special_values_and_zero_tolerance(actual: float, reference: float, fails: bool) -> None:
    values = [torch.tensor([1.0, v], dtype=torch.float64) for v in (actual, reference)]
    if fails:
        with pytest.raises(AssertionError, match=r"worst is \(1,\)"):
            assert_within(*values, 0.0)
    else:
        assert_within(*values, 0.0)


def test_assert_within_compares_shapes_and_allows_empty() -> None:
    with pytest.raises(AssertionError, match=r"expected \(2,\), got \(1,\)"):
        assert_within(torch.zeros(1), torch.zeros(2), 1.0)
    assert_within(torch.zeros(0, 3), torch.zeros(0, 3), 0.0)


def test_pooling_takes_the_worst_tolerance_of_a_window() -> None:
    value = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], dtype=torch.float64)
    pooled = Expected(value, torch.tensor([[[[0.1, 0.7], [0.2, 0.3]]]], dtype=torch.float64)).pool()
    assert (pooled.value.item(), pooled.tolerance.item()) == (4.0, 0.7)


def test_activation_grad_of_ties_and_zeros() -> None:
    y = torch.tensor([[[[0.0, 2.0], [2.0, -1.0]]]])
    grad_y, grad_pooled = torch.full_like(y, 3.0), torch.full((1, 1, 1, 1), 10.0)
    for slope, expected in ((None, [3, 13, 3, 3]), (0.0, [0, 13, 3, 0]), (0.5, [1.5, 13, 3, 1.5])):
        value, _ = conv3x3_activation_grad_expected(y, grad_y, grad_pooled, slope)
        assert value.flatten().tolist() == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    x = random_input((3, 5, 4, 6), dtype=torch.float16)
    other = in_layout(x, layout)
    assert torch.equal(other, x[:1].expand_as(x) if layout == "expanded" else x)
    facts = {
        "contiguous": other.is_contiguous(),
        "channels_last": other.is_contiguous(memory_format=torch.channels_last),
        "sliced": 1 not in other.stride(),
        "expanded": other.stride(0) == 0,
        "unaligned": other.data_ptr() % 16 != 0,
    }
    assert facts[layout]
    with pytest.raises(ValueError, match=r"one of contiguous, .* got 'blocked'"):
        in_layout(x, "blocked")


def test_inputs_are_reproducible_and_vary() -> None:
    assert torch.equal(random_input((4, 4)), random_input((4, 4)))
    assert not torch.equal(random_input((4, 4)), random_input((4, 4), seed=1))
    cotangent = random_cotangent(torch.zeros(8, 8, dtype=torch.bfloat16))
    assert cotangent.dtype == torch.bfloat16
    assert cotangent.unique().numel() > 32
    integers = random_integers((1000,), largest=5)
    assert integers.unique().tolist() == list(range(-5, 6))


def float32_sums(logits: Tensor, target: Tensor, softmax: bool) -> Tensor:
    """Dice and cross entropy in float32. The gradient of torch's sigmoid, p (1 - p), would not be within: near p = 1
    the difference keeps few of its digits.
    """
    log_p = logits.log_softmax(1) if softmax else F.logsigmoid(logits)
    p = logits.softmax(1) if softmax else log_p.exp()
    negative = () if softmax else (-(1 - target) * F.logsigmoid(-logits),)
    return torch.stack([term.sum((2, 3)) for term in (p * target, p, target, -target * log_p, *negative)])


@pytest.mark.parametrize("softmax", [False, True])
def test_sums_of_a_loss_in_float32_are_within_and_their_mistakes_outside(softmax: bool) -> None:
    logits = random_input((2, 3, 31, 33), layout="contiguous", scale=3.0)
    target = random_input((2, 3, 31, 33), layout="contiguous", seed=1).sigmoid()
    options = {"softmax": softmax, "squared": False}
    expected = segmentation_sums_expected(logits, target, None, entropy=True, **options)
    leaf = logits.clone().requires_grad_()
    sums = float32_sums(leaf, target, softmax)
    assert_within(sums, *expected)
    cotangent = random_cotangent(sums)
    (grad,) = torch.autograd.grad(sums, leaf, cotangent)
    expected_grad = segmentation_sums_grad_expected(cotangent, logits, target, None, **options)
    assert_within(grad, *expected_grad)

    shifted = target.clone()
    shifted[1, 2, 30, 31] = target[1, 2, 30, 32]
    mistakes = (
        float32_sums(logits, shifted, softmax),  # One pixel of a thousand takes its neighbour's target.
        float32_sums(logits.bfloat16().float(), target, softmax),
        sums * (1 + 2.0**-15),
        sums.bfloat16().float(),
    )
    for mistake in mistakes:
        with outside():
            assert_within(mistake, *expected)
    with outside():
        assert_within(grad * (1 + 2.0**-14), *expected_grad)


def test_sums_of_class_indices_are_those_of_their_one_hot_form_where_the_mask_counts() -> None:
    logits = random_input((2, 3, 5, 4), scale=2.0)
    labels = torch.arange(40).reshape(2, 1, 5, 4) % 3
    one_hot = F.one_hot(labels[:, 0], 3).movedim(-1, 1)
    mask = random_input((2, 1, 5, 4), seed=1) > 0
    options = {"softmax": True, "squared": True}
    by_values = segmentation_sums_expected(logits, one_hot, mask, entropy=True, **options)
    by_labels = segmentation_sums_expected(logits, labels.where(mask, 255), mask, entropy=True, **options)
    assert_within(by_labels.value, by_values.value, 0.0)
    assert_within(by_labels.tolerance, by_values.tolerance, 0.0)
    cropped = segmentation_sums_expected(logits[..., :2], one_hot[..., :2], None, entropy=True, **options)
    halves = segmentation_sums_expected(
        logits, one_hot, torch.arange(4).expand(2, 1, 5, 4) < 2, entropy=True, **options
    )
    assert_within(halves.value, cropped.value, 1e-14 * cropped.value.abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_correct_transposed_convolutions_are_within_and_mistakes_outside(dtype: torch.dtype) -> None:
    x, bias = random_input((2, 16, 5, 7), dtype=dtype, seed=1), random_input((8,), dtype=dtype, seed=3)
    weight = random_input((16, 8, 2, 2), dtype=dtype, seed=2)
    leaf, parameter = x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    y = F.conv_transpose2d(leaf, parameter, bias.float(), stride=2)
    expected = conv_transpose2x2_expected(x, weight, bias)
    assert_within(y.to(dtype), *expected)
    grad = random_cotangent(y).to(dtype)
    y.backward(grad.float())
    assert_within(leaf.grad.to(dtype), *conv_transpose2x2_input_grad_expected(grad, weight))
    assert_within(parameter.grad.to(dtype), *conv_transpose2x2_weight_grad_expected(grad, x))
    with outside():
        assert_within(y.to(dtype).roll(1, dims=3), *expected)
    with outside():
        assert_within(F.conv_transpose2d(leaf, parameter[:, :, [0, 0]], bias.float(), stride=2).to(dtype), *expected)


def activate(z: Tensor, activation: str | None) -> Tensor:
    return z if activation is None else z.sigmoid() if activation == "sigmoid" else z.softmax(1)


@pytest.mark.parametrize("activation", [None, "sigmoid", "softmax"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_correct_heads_are_within_and_mistakes_outside(dtype: torch.dtype, activation: str | None) -> None:
    x, bias = random_input((2, 16, 5, 7), dtype=dtype, seed=1), random_input((4,), dtype=dtype, seed=3)
    weight = random_input((4, 16, 1, 1), dtype=dtype, seed=2)
    wide, parameter = x.float(), weight.float()
    y = activate(F.conv2d(wide, parameter, bias.float()), activation)
    expected = conv1x1_expected(x, weight, bias, activation=activation)
    assert_within(y.to(dtype), *expected)
    without_last_channel = F.conv2d(wide[:, :-1], parameter[:, :-1], bias.float())
    with outside():
        assert_within(activate(without_last_channel, activation).to(dtype), *expected)

    # The gradient is of y as it is stored.
    p, grad = y.to(dtype), random_cotangent(y).to(dtype)
    g = grad.float()
    if activation == "sigmoid":
        g = g * p.float() * (1 - p.float())
    if activation == "softmax":
        g = p.float() * (g - (g * p.float()).sum(1, keepdim=True))
    rounded = g.to(dtype).float()
    given = {"y": p, "activation": activation}
    gx, gw = F.conv_transpose2d(rounded, weight.float()), torch.einsum("nohw,nchw->oc", rounded, x.float())
    assert_within(gx.to(dtype), *conv1x1_input_grad_expected(grad, weight, **given))
    assert_within(gw[..., None, None].to(dtype), *conv1x1_weight_grad_expected(grad, x, **given))
    bias_expected = conv1x1_bias_grad_expected(grad, **given)
    assert_within(g.sum((0, 2, 3)).to(dtype), *bias_expected)
    with outside():
        assert_within(g[:, :, :-1].sum((0, 2, 3)).to(dtype), *bias_expected)
