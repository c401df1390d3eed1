"""max_pool2x2, conv_transpose2x2 and conv1x1 on their Triton kernels, in the interpreter: dispatch and autograd."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from fastunet.kernels import gpu
from kernel_device import INTERPRETED, kernel_names
from torch import Tensor

import fastunet
from fastunet import ops
from fastunet.reference import functional as reference
from fastunet.testing import random_cotangent

pytestmark = pytest.mark.interpreter
if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1, set before triton is imported", allow_module_level=True)


class Case(NamedTuple):
    """An op, the shapes of its tensors, options, and how far float32 may be off: 0 where integers are exact."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    options: Mapping[str, Any] = MappingProxyType({})
    tolerance: float = 0.0


X = (2, 3, 5, 6)
CASES = {
    "pool": Case("max_pool2x2", (X,)),
    "transpose": Case("conv_transpose2x2", (X, (3, 5, 2, 2), (5,))),
    "logits": Case("conv1x1", (X, (4, 3, 1, 1), (4,))),
    # Gradients are sums of 60 products below 40, each operand of them with a relative error of a few 2^-24.
    "sigmoid": Case("conv1x1", (X, (4, 3, 1, 1), (4,)), {"activation": "sigmoid"}, 1e-4),
    "softmax": Case("conv1x1", (X, (4, 3, 1, 1), (4,)), {"activation": "softmax"}, 1e-4),
    "wide_softmax": Case("conv1x1", ((1, 2, 2, 3), (257, 2, 1, 1), (257,)), {"activation": "softmax"}, 1e-4),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
every_format = pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)


@pytest.fixture(autouse=True)
def forced():
    with fastunet.backend("triton"):
        yield


def integers(*shape: int, low: int = -3, high: int = 4) -> Tensor:
    return torch.randint(low, high, shape).float()


def run(op: Callable, case: Case, needs_grad: tuple[bool, ...], memory_format: torch.memory_format) -> list[Tensor]:
    """The output, then the gradients of the inputs that need them."""
    torch.manual_seed(0)
    tensors = [integers(*shape) for shape in case.shapes]
    tensors = [t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for t in tensors]
    for t, want in zip(tensors, needs_grad, strict=True):
        t.requires_grad_(want)
    y = op(*tensors, **case.options)
    leaves = [t for t in tensors if t.requires_grad]
    return [y, *(torch.autograd.grad(y, leaves, integers(*y.shape)) if leaves else ())]


def assert_same(case: Case, needs_grad: tuple[bool, ...], memory_format: torch.memory_format) -> list[Tensor]:
    actual = run(getattr(ops, case.op), case, needs_grad, memory_format)
    expected = run(getattr(reference, case.op), case, needs_grad, memory_format)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=case.tolerance, msg=lambda m, i=i: f"result {i}: {m}")
    return actual


@every_case
@every_format
def test_values_and_gradients_are_the_references_in_the_inputs_format(case: Case, memory_format) -> None:
    for result in assert_same(case, (True,) * len(case.shapes), memory_format):
        assert result.dim() != 4 or result.is_contiguous(memory_format=memory_format)


@every_case
def test_every_combination_of_requires_grad(case: Case) -> None:
    for needs_grad in itertools.product((True, False), repeat=len(case.shapes)):
        assert_same(case, needs_grad, torch.channels_last)


@every_format
@pytest.mark.parametrize("case", [case for case in CASES.values() if case.shapes[0] == X], ids=lambda c: str(c.op))
def test_opcheck(case: Case, memory_format) -> None:
    tensors = [torch.randn(shape) for shape in case.shapes]
    tensors = [t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for t in tensors]
    op = getattr(torch.ops.fastunet, case.op).default
    arguments = [t.requires_grad_() for t in tensors]
    if case.op == "conv1x1":
        arguments.append(case.options.get("activation"))
    if case.op == "conv_transpose2x2":
        arguments.append(False)
    torch.library.opcheck(op, tuple(arguments))


KERNELS = {
    "max_pool2x2": ["max_pool2x2_kernel", "activation_grad_kernel"],
    "conv_transpose2x2": ["conv_transpose2x2_kernel", "conv_transpose2x2_input_grad_kernel"],
    "conv1x1": ["conv1x1_kernel", "conv1x1_input_grad_kernel"],
}
SUMS = ["pixel_weight_grad_kernel", "sum_rows_kernel"]


@every_case
def test_the_kernels_that_are_needed_ran_and_no_others(case: Case) -> None:
    """The other tests would pass on ATen as well."""
    forward, backward = KERNELS[case.op]
    op, parameters = getattr(ops, case.op), len(case.shapes) - 1
    sums = [*SUMS, "sum_rows_kernel"] if parameters else []  # Of the weight and of the bias.
    for needs_grad, expected in (
        ((True,) * (1 + parameters), [forward, backward, *sums]),
        ((True,) + (False,) * parameters, [forward, backward]),
        ((False,) * (1 + parameters), [forward]),
        ((False, True, False)[: 1 + parameters], [forward, *(SUMS if parameters else [])]),
    ):
        with gpu.recording() as launches:
            run(op, case, needs_grad, torch.channels_last)
        assert kernel_names(launches) == expected, needs_grad


@every_format
@every_case
def test_empty_batch(case: Case, memory_format) -> None:
    tensors = [torch.randn((0, *s[1:]) if i == 0 else s) for i, s in enumerate(case.shapes)]
    tensors[0] = tensors[0].contiguous(memory_format=memory_format)
    y = getattr(ops, case.op)(*(t.requires_grad_() for t in tensors), **case.options)
    assert y.shape[0] == 0
    grad_x, *others = torch.autograd.grad(y, tensors, torch.empty_like(y))
    assert grad_x.shape == tensors[0].shape
    assert not any(other.any() for other in others)


def test_sixteen_bit_softmax_under_autocast_is_torchs() -> None:
    x, weight = torch.randn(1, 3, 4, 4), torch.randn(4, 3, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16), gpu.recording() as launches:
        y = ops.conv1x1(x, weight, activation="softmax")
        expected = ops.conv1x1(x, weight).softmax(dim=1)
    assert torch.equal(y, expected)
    assert kernel_names(launches) == ["conv1x1_kernel"] * 2


def test_a_training_step_of_the_unet() -> None:
    torch.manual_seed(0)
    model = fastunet.UNet(1, 3, features=(3, 5), norm=None, head="softmax")
    rows = fastunet.explain(model, torch.zeros(2, 1, 5, 6)).rows
    assert {row.implementation for row in rows if row.op in KERNELS} == {"triton"}
    exact = model.to_reference().double()
    x = torch.randn(2, 1, 5, 6)
    y, expected = model(x), exact(x.double())
    # Seven layers deep, each with an error of about 2^-24 of what it sums.
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    cotangent = random_cotangent(y)
    with gpu.recording() as launches:
        y.backward(cotangent)
    expected.backward(cotangent.double())
    assert {"conv_transpose2x2_input_grad_kernel", "conv1x1_input_grad_kernel", *SUMS} <= {*kernel_names(launches)}
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        error = (p.grad.double() - q.grad).norm() / q.grad.norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"
