"""The ops on their Triton kernels, in the cases of test_ops.py and a few of their own: values, gradients and memory
formats, what is infinite or no number, and which kernels run.

Channels and pixels that only fill a kernel's block are multiplied by zeros: zero times infinity is NaN, which no sum is
to meet.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from fastunet.kernels import gpu
from kernel_device import DEVICE, HOPPER, INTERPRETED, MARK, kernel_names, on
from test_ops import (
    CASES,
    INFERENCE,
    SUMMED,
    Case,
    X,
    call,
    case_of,
    flat_arguments,
    make_buffers,
    make_tensors,
)
from torch import Tensor
from unet_pair import moved

import fastunet
from fastunet import dispatch, ops
from fastunet.reference import functional as reference
from fastunet.testing import assert_within, random_cotangent

pytestmark = [MARK, pytest.mark.usefixtures("ieee", "nan_in_fresh_memory", "forced")]

Tensors = list[Tensor | None]
NCHW, NHWC = torch.contiguous_format, torch.channels_last
FOR_INFERENCE = [case.op for case in INFERENCE]
BY_POINTERS = [*CASES, *INFERENCE]
# More channels than a program holds for a softmax.
WIDE_SOFTMAX = Case("conv1x1", ((1, 2, 2, 3), (257, 2, 1, 1), (257,)), {"activation": "softmax"})
# 40 channels of a block of 64, by boxes.
X16, SKIP16, UP16, WIDE, PLANES = (1, 16, 9, 10), (1, 32, 9, 10), (1, 16, 9, 10), (40, 16, 3, 3), (40,)
BY_DESCRIPTORS = [
    Case("conv3x3_bias_relu_pool", (X16, WIDE, PLANES), {}),
    Case("concat_conv3x3_bias_relu", (SKIP16, UP16, (40, 48, 3, 3), None), {"negative_slope": 0.1}),
    Case("conv3x3_instance_norm_relu", (X16, WIDE, PLANES, PLANES), {}),
    Case("conv_transpose2x2", (X16, (16, 40, 2, 2), PLANES), {}),
    Case("conv3x3_relu_conv1x1", (X16, WIDE, PLANES, (3, 40, 1, 1), (3,)), {}),
]
if INTERPRETED:  # Two steps elsewhere.
    low, up = (1, 16, 4, 5), (16, 16, 2, 2)
    BY_DESCRIPTORS.append(
        Case("conv_transpose2x2_concat_conv3x3_relu", (SKIP16, low, up, (16,), (40, 48, 3, 3), PLANES), {})
    )


class Results(NamedTuple):
    """Of one call; of grads those that were asked for."""

    outputs: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]
    buffers: list[Tensor]

    @property
    def all(self) -> list[Tensor]:
        return [*self.outputs, *self.grads, *self.buffers]


def is_weight(t: Tensor) -> bool:
    return t.dim() == 4 and t.shape[2:] in ((1, 1), (2, 2), (3, 3))


def integers_of(case: Case, formats: Sequence[torch.memory_format] = (NHWC, NHWC)) -> Tensors:
    """Small integers, whose sums of products have no rounding; but targets lie between 0 and 1. formats: of images, of
    weights.
    """
    tensors: Tensors = []
    for i, t in enumerate(make_tensors(case, torch.float32, NHWC)):
        if t is not None and not (case.op in SUMMED and i == 1):
            t = t.mul(2).round()
        if t is not None and t.dim() == 4:
            t = t.contiguous(memory_format=formats[is_weight(t)])
        tensors.append(t)
    return tensors


def nonfinite_of(case: Case, dtype: torch.dtype) -> Tensors:
    """An infinity and a NaN, in one pixel each. Parameters are positive: infinities are not to meet their opposites."""
    x, *others = make_tensors(case, dtype, NHWC)
    assert x is not None
    x[0, 0, 3, 3], x[-1, 1, 0, 0] = math.inf, math.nan
    return [x, *(None if t is None else t.abs() for t in others)]


def run(
    case: Case,
    tensors: Tensors,
    needs_grad: Sequence[bool] | None = None,
    *,
    exact: bool = False,
    backward_on: str | None = None,
) -> Results:
    """What an op gives of tensors, by default with the gradients of all; exact: the composition in float64."""
    present = [t for t in tensors if t is not None]
    dtype = torch.float64 if exact else present[0].dtype
    given = [None if t is None else t.detach().to(DEVICE, dtype) for t in tensors]
    leaves = [t for t in given if t is not None]
    needs_grad = needs_grad or [needs_grad is None and case.op not in FOR_INFERENCE] * len(leaves)
    for t, is_needed in zip(leaves, needs_grad, strict=True):
        t.requires_grad_(is_needed)
    buffers = [b.to(DEVICE) for b in make_buffers(case, dtype)]
    op, backend = getattr(reference if exact else ops, case.op), "aten" if exact else dispatch.selected_backend()
    with fastunet.backend(backend):
        outputs = call(op, case, given, buffers)
    if not any(needs_grad):
        return Results(outputs, (), buffers)
    cotangents = [random_cotangent(y) for y in outputs]
    if all(t.isfinite().all() for t in present):  # Halves of integers, of which none is zero.
        cotangents = [t.mul(4).round().add(0.5) for t in cotangents]
    with fastunet.backend(backward_on or backend):
        grads = torch.autograd.grad(outputs, [t for t in leaves if t.requires_grad], cotangents)
    return Results(outputs, grads, buffers)


def assert_close(case: Case, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Of sums of integers nothing is rounded. Else the relative error is below 1e-5, a hundred roundings of float32: in
    the 2-norm, of losses in each value.
    """
    is_rounded = "norm" in case.op or "activation" in case.options or case.op in (*SUMMED, *FOR_INFERENCE)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if not is_rounded:
            assert_within(a, b, 0)
        elif case.op in SUMMED:
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)
        else:
            assert a.shape == b.shape
            error = float((a.detach().double() - b.detach()).norm() / b.detach().norm())
            assert error < 1e-5, f"result {i}: relative error {error:.1e}"


FORMATS = ((NCHW, NCHW), (NHWC, NHWC), (NHWC, NCHW))


@pytest.mark.parametrize(
    ("case", "formats"),
    [(case, FORMATS[i % 3]) for i, case in enumerate((*BY_POINTERS, WIDE_SOFTMAX))],
    ids=lambda value: str(value) if isinstance(value, Case) else "",
)
def test_as_the_reference_in_the_inputs_format(case: Case, formats: tuple[torch.memory_format, ...]) -> None:
    """The cases of an op differ in their formats too."""
    tensors = integers_of(case, formats)
    actual = run(case, tensors)
    assert_close(case, actual.all, run(case, tensors, exact=True).all)
    assert all(y.is_contiguous(memory_format=formats[0]) for y in actual.outputs if y.dim() == 4)
    for t, grad in zip((t for t in tensors if t is not None), actual.grads, strict=False):
        assert grad.stride() == t.stride()


CONCATENATED = "concat_conv3x3_batch_norm_relu"


@pytest.mark.parametrize(
    "case",
    [
        case_of("concat_conv3x3_bias_relu"),
        case_of(CONCATENATED, training=True),
        case_of(CONCATENATED, training=False),
        case_of("conv_transpose2x2"),
        case_of("conv1x1"),
        case_of("segmentation_sums"),
    ],
    ids=str,
)
def test_every_combination_of_requires_grad(case: Case) -> None:
    tensors = integers_of(case)
    present = [t for t in tensors if t is not None]
    full = run(case, tensors)
    for needs_grad in itertools.product((True, False), repeat=len(present)):
        if len(present) == 5 and sum(needs_grad) in (2, 3):  # All, none, one, or all but one.
            continue
        outputs, grads, buffers = run(case, tensors, needs_grad)
        expected = [grad for grad, is_needed in zip(full.grads, needs_grad, strict=True) if is_needed]
        assert_close(case, [*outputs, *grads, *buffers], [*full.outputs, *expected, *full.buffers])


def assert_same_states(case: Case, dtype: torch.dtype) -> None:
    tensors = nonfinite_of(case, dtype)
    results = (run(case, tensors, exact=exact) for exact in (False, True))
    for i, (actual, expected) in enumerate(zip(*(each.outputs + each.grads for each in results), strict=True)):
        for state in (torch.isnan, torch.isposinf, torch.isneginf):
            wrong = (state(actual) != state(expected)).nonzero().tolist()
            assert not wrong, f"result {i}: {state.__name__} differs at {wrong[:5]} and {len(wrong[5:])} more"


@pytest.mark.parametrize("case", BY_POINTERS, ids=str)
def test_an_infinity_and_a_nan_reach_what_they_do_in_torch_by_pointers(case: Case) -> None:
    assert_same_states(case, torch.float32)


@pytest.mark.parametrize("case", BY_DESCRIPTORS, ids=str)
def test_an_infinity_and_a_nan_reach_what_they_do_in_torch_by_descriptors(case: Case) -> None:
    with on(HOPPER):
        assert_same_states(case, torch.float16)


def test_statistics_of_values_whose_squares_overflow() -> None:
    """They are taken about the mean, which rows beyond the last tile, and those before the first, are not near to."""
    x = 1e20 * (1 + torch.arange(2 * 9 * 7, device=DEVICE).reshape(2, 1, 9, 7) / 4096)
    weight = torch.zeros(1, 1, 3, 3, device=DEVICE)
    weight[..., 1, 1] = 1
    statistics = torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    y = ops.conv3x3_batch_norm_relu(x, weight, None, None, *statistics, training=True, momentum=1.0, relu=False)
    expected = ((x.double() - x.double().mean()) / x.double().std(correction=0)).cpu()
    torch.testing.assert_close(y.double().cpu(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(statistics[1].double().cpu(), x.double().var()[None].cpu(), rtol=1e-4, atol=0)


# --- which kernels run, and what dispatch and autograd make of them ---

CONV_GRADS = ["conv3x3_input_grad_kernel", "conv3x3_weight_grad_kernel", "sum_rows_kernel"]
# Of two inputs by one launch, and of each one's share of the weight.
STRIDED = ["conv3x3_strided_input_grad_kernel", *CONV_GRADS[1:] * 2]
PIXEL_SUMS = ["pixel_weight_grad_kernel", "sum_rows_kernel"]
TRANSPOSE = ["conv_transpose2x2_kernel", "conv_transpose2x2_input_grad_kernel"]
HEAD = ["conv1x1_kernel", "conv1x1_input_grad_kernel"]
LOSS = ["segmentation_sums_kernel", "sum_rows_kernel", "segmentation_sums_grad_kernel"]
BATCH = "conv3x3_batch_norm_relu_pool"
STATISTICS = ["conv3x3_kernel", "finish_statistics_kernel", "normalise_kernel", "norm_sums_kernel", "sum_rows_kernel"]
ALL, NONE, IMAGE, WEIGHT = (True,) * 3, (False,) * 3, (True, False, False), (False, True, False)


@pytest.mark.parametrize(
    ("case", "needs_grad", "names"),
    [
        (case_of("conv3x3_bias_relu_pool"), ALL, ["conv3x3_kernel", "norm_grad_kernel", *CONV_GRADS]),
        (case_of(BATCH, training=True), (*ALL, True), [*STATISTICS, "norm_grad_kernel", *CONV_GRADS]),
        (case_of(BATCH, training=False), (*NONE, False), ["conv3x3_kernel"]),
        (
            case_of("concat_conv3x3_bias_relu", stride=2),
            (True,) * 4,
            ["conv3x3_kernel", "norm_grad_kernel", *STRIDED],
        ),
        (case_of("max_pool2x2"), (True,), ["max_pool2x2_kernel", "norm_grad_kernel"]),
        *(
            (case_of(op), needs_grad, names)
            for op, (forward, backward) in {"conv_transpose2x2": TRANSPOSE, "conv1x1": HEAD}.items()
            for needs_grad, names in (
                (ALL, [forward, backward, *PIXEL_SUMS, "sum_rows_kernel"]),  # Of the weight and of the bias.
                (NONE, [forward]),
                (IMAGE, [forward, backward]),
                (WEIGHT, [forward, *PIXEL_SUMS]),
            )
        ),
        (case_of("segmentation_sums"), (True, False), LOSS),
    ],
    ids=lambda value: str(value) if isinstance(value, Case) else "",
)
def test_the_kernels_that_are_needed_run_and_no_others(
    case: Case, needs_grad: tuple[bool, ...], names: list[str]
) -> None:
    with gpu.recording() as launches:
        run(case, integers_of(case), needs_grad)
    assert kernel_names(launches) == names


NORMS = [case_of(BATCH, training=True), case_of(BATCH, training=False), case_of("conv3x3_instance_norm_relu_pool")]
every_norm = pytest.mark.parametrize("case", NORMS, ids=str)


@every_norm
def test_backend_changed_between_forward_and_backward(case: Case) -> None:
    tensors = integers_of(case)
    expected = run(case, tensors, exact=True).all
    assert_close(case, run(case, tensors, backward_on="aten").all, expected)
    with fastunet.backend("aten"):
        assert_close(case, run(case, tensors, backward_on="triton").all, expected)


@every_norm
def test_what_is_kept_for_backward_is_raw_alone(case: Case) -> None:
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        run(case, integers_of(case))
    assert [shape for shape in saved if len(shape) == 4 and shape[2:] != (3, 3)] == [X, (X[0], 5, *X[2:])]


def test_a_change_of_a_contiguous_weight_is_seen() -> None:
    """In inference the kernels read a channels_last copy of it, which is kept."""
    case = case_of("conv3x3_bias_relu")
    x, weight, bias = (t.to(DEVICE) for t in integers_of(case, (NHWC, NCHW)) if t is not None)
    for _ in range(2):
        expected = reference.conv3x3_bias_relu(*(t.double() for t in (x, weight, bias)))
        assert_within(ops.conv3x3_bias_relu(x, weight, bias), expected, 0)
        weight.data.neg_()


@pytest.mark.parametrize(
    ("case", "requires_grad"),
    [
        (case_of("conv3x3_bias_relu_pool", negative_slope=0.25), True),
        (case_of("concat_conv3x3_batch_norm_relu", training=False), False),
        (case_of(BATCH, training=True), True),
        (case_of("conv_transpose2x2"), True),
        (case_of("conv1x1", activation="softmax"), False),
        (case_of("segmentation_sums", activation="sigmoid"), True),
        (case_of("segmentation_sums", activation="softmax", entropy=True), True),
    ],
    ids=str,
)
def test_opcheck(case: Case, requires_grad: bool) -> None:
    op, arguments = flat_arguments(case, torch.float32, NHWC if requires_grad else NCHW, requires_grad)
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize(
    ("options", "training"),
    [
        ({"norm": "batch"}, True),
        ({"norm": "instance"}, True),
        ({"norm": "batch"}, False),
        ({"norm": "batch", "head": "sigmoid"}, False),
        ({"norm": None, "head": "softmax"}, True),
        ({"norm": None, "head": "sigmoid", "out_channels": 9}, False),  # More classes than fit beside a convolution.
    ],
    ids=str,
)
def test_a_net_is_its_reference_model(options: dict[str, Any], training: bool) -> None:
    """Gradients, running statistics, and without gradients the last convolution and the head in one."""
    torch.manual_seed(0)
    model = moved(fastunet.UNet(**{"in_channels": 1, "out_channels": 3, "features": (3, 5), **options})).to(DEVICE)
    exact = model.train(training).to_reference().double()
    x = torch.randn(2, 1, 5, 6, device=DEVICE)
    if not training:
        with torch.no_grad():
            assert fastunet.explain(model, x).rows[-1].op == "conv3x3_relu_conv1x1"
            torch.testing.assert_close(model(x).double(), exact(x.double()), rtol=1e-5, atol=1e-5)
    assert fastunet.explain(model, x).rows[0].implementation == "triton"
    y, expected = model(x), exact(x.double())
    # Seven layers deep, each with an error of about 2^-24 of what it sums; a norm multiplies them.
    limit = 1e-5 if options["norm"] is None else 1e-4
    torch.testing.assert_close(y.double(), expected, rtol=limit, atol=limit)
    cotangent = random_cotangent(y)
    y.backward(cotangent)
    expected.backward(cotangent.double())
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (p.grad.double() - q.grad).norm() <= limit * q.grad.norm(), name
    for (name, b), c in zip(model.named_buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(b.double(), c.double(), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_mixed_precision_keeps_parameters_in_float32(norm: str) -> None:
    leaves = [torch.randn(s, device=DEVICE).requires_grad_() for s in ((2, 8, 6, 6), (16, 8, 3, 3), (16,), (16,))]
    buffers = [torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE)] if norm == "batch" else []
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = getattr(ops, f"conv3x3_{norm}_norm_relu")(*leaves, *buffers, **({"training": True} if buffers else {}))
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y, leaves, torch.randn_like(y))
    assert [g.dtype for g in grads] == [torch.float32] * 4
    assert not buffers or buffers[0].any()


@pytest.mark.skipif(not INTERPRETED, reason="on CUDA torch's softmax answers in float32 under autocast")
def test_sixteen_bit_softmax_under_autocast_is_torchs() -> None:
    x, weight = torch.randn(1, 3, 4, 4), torch.randn(4, 3, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16), gpu.recording() as launches:
        y = ops.conv1x1(x, weight, activation="softmax")
        expected = ops.conv1x1(x, weight).softmax(dim=1)
    assert torch.equal(y, expected)
    assert kernel_names(launches) == ["conv1x1_kernel"] * 2
