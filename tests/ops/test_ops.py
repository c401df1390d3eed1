"""Every public op against the torch composition it stands for: values, gradients, strides, autocast, compilation."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight
from torch.utils._python_dispatch import TorchDispatchMode

from fastunet import ops
from fastunet.dispatch import winograd_wins
from fastunet.reference import functional as reference
from fastunet.testing import assert_within, conv_tolerance, random_input


@dataclass(frozen=True)
class Case:
    """One op: its name, the shapes of its differentiable tensors and the further arguments."""

    op: str
    shapes: tuple[tuple[int, ...] | None, ...]
    options: dict
    # Positions of running_mean and running_var, which an op may change in place.
    buffers: int = 0

    def __str__(self) -> str:
        return self.op + "".join(f",{k}" if k == "norm" else f",{k}={v}" for k, v in self.options.items())


X, SKIP, UP, CHANNELS = (2, 3, 7, 6), (2, 4, 7, 6), (2, 2, 7, 6), (5,)
W3, W3_CAT = (5, 3, 3, 3), (5, 6, 3, 3)
TRAIN = {"training": True, "momentum": 0.3, "eps": 1e-3}
EVAL = {**TRAIN, "training": False}
FORMS = {"{}": (X, W3), "{}_pool": (X, W3), "concat_{}": (SKIP, UP, W3_CAT)}
# By op, its parameters and options.
VARIANTS: dict[str, list[tuple[tuple, dict]]] = {
    "conv3x3_bias_relu": [
        *(((CHANNELS,), {}), ((CHANNELS,), {"stride": 2})),
        *(((None,), {"relu": False}), ((CHANNELS,), {"negative_slope": 0.25})),
    ],
    "conv3x3_batch_norm_relu": [
        ((CHANNELS, CHANNELS), TRAIN),
        ((CHANNELS, CHANNELS), EVAL),
        ((CHANNELS, CHANNELS), {**EVAL, "stride": 2}),
        ((CHANNELS, CHANNELS), {**TRAIN, "stride": 2, "negative_slope": 0.25}),
        ((None, None), {**TRAIN, "negative_slope": 0.25}),
    ],
    "conv3x3_instance_norm_relu": [
        *(((CHANNELS, CHANNELS), {}), ((CHANNELS, CHANNELS), {"stride": 2})),
        ((None, None), {"relu": False}),
    ],
}
CASES = [
    *(
        Case(form.format(op), (*inputs, *parameters), options, buffers=2 if "batch_norm" in op else 0)
        for op, variants in VARIANTS.items()
        for form, inputs in FORMS.items()
        for parameters, options in variants
    ),
    Case("max_pool2x2", (X,), {}),
    Case("conv_transpose2x2", (X, (3, 5, 2, 2), CHANNELS), {}),
    Case("conv_transpose2x2", (X, (3, 5, 2, 2), None), {}),
    Case("conv1x1", (X, (5, 3, 1, 1), CHANNELS), {}),
    Case("conv1x1", (X, (5, 3, 1, 1), None), {"activation": "sigmoid"}),
    Case("conv1x1", (X, (5, 3, 1, 1), CHANNELS), {"activation": "softmax"}),
    Case("segmentation_sums", (X, X), {"activation": "sigmoid", "entropy": True}),
    Case("segmentation_sums", (X, X), {"activation": "softmax", "entropy": True, "squared": True}),
    Case("segmentation_sums", (X, X), {"activation": "softmax"}),
    Case("sigmoid_dice_loss", (X, X), {}),
    Case("sigmoid_dice_loss", (X, X), {"squared": True, "batch": True, "reduction": "none", "smooth": 0.1}),
    Case("double_conv3x3_bias_relu", (X, None, W3, (4, 5, 3, 3), CHANNELS, (4,)), {"pool": True}),
    Case("double_conv3x3_bias_relu", (SKIP, UP, W3_CAT, (4, 5, 3, 3), CHANNELS, None), {"negative_slope": 0.25}),
]
NORM = tuple(torch.linspace(0.5, 1.5, 5, dtype=torch.float64) + i for i in range(3))
LOW, UP_WEIGHT = (2, 3, 3, 3), (3, 2, 2, 2)
# Ops without a gradient.
INFERENCE = [
    Case("conv3x3_relu_conv1x1", (X, W3, CHANNELS, (2, 5, 1, 1), (2,)), {"negative_slope": 0.1}),
    Case("conv3x3_relu_conv1x1", (X, W3, CHANNELS, (2, 5, 1, 1), None), {"norm": (*NORM, 1e-3), "sigmoid": True}),
    *(
        Case("conv_transpose2x2_concat_conv3x3_relu", (X, LOW, UP_WEIGHT, up_bias, (5, 5, 3, 3), bias), options)
        for up_bias, bias, options in (
            (None, None, {"norm": (*NORM[:2], None, 1e-3)}),
            ((2,), CHANNELS, {"negative_slope": 0.1}),
            ((2,), CHANNELS, {"norm": (*NORM, 1e-3), "up_first": True}),
        )
    ),
    Case("conv_transpose2x2_concat_conv3x3_relu", (X, LOW, None, None, (5, 6, 3, 3), CHANNELS), {}),
]


def case_of(op: str, **options: Any) -> Case:
    """The first of its cases with these options."""
    return next(c for c in CASES if c.op == op and options.items() <= c.options.items())


# One case of each op and stride, for what no argument else changes, and one of each way through the registered ops.
EACH_OP = [*{(case.op, case.options.get("stride")): case for case in CASES}.values()]
REGISTERED = [
    case_of("conv3x3_bias_relu_pool", negative_slope=0.25),
    case_of("concat_conv3x3_bias_relu"),
    case_of("conv3x3_batch_norm_relu_pool", training=True),
    case_of("concat_conv3x3_batch_norm_relu", training=False),
    case_of("concat_conv3x3_instance_norm_relu"),
    case_of("conv3x3_bias_relu_pool", stride=2),
    case_of("concat_conv3x3_batch_norm_relu", training=True, stride=2),
    case_of("conv3x3_instance_norm_relu", stride=2),
    case_of("max_pool2x2"),
    case_of("conv_transpose2x2"),
    case_of("conv1x1", activation="softmax"),
    case_of("segmentation_sums", entropy=True),
    INFERENCE[1],
    INFERENCE[-1],
]
# Ops of logits and a target from 0 to 1, which answer in float32.
SUMMED = ("segmentation_sums", "sigmoid_dice_loss")
every_format = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)


class Dispatched(TorchDispatchMode):
    """Has every call go through the dispatcher, to the registered op and its own gradient: a plain step with gradients
    that is left to ATen is torch's own.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def make_tensors(case: Case, dtype: torch.dtype, memory_format: torch.memory_format) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    tensors: list[Tensor | None] = []
    for shape in case.shapes:
        t = None if shape is None else torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        tensors.append(t.contiguous(memory_format=memory_format) if t is not None and t.dim() == 4 else t)
    if case.op in SUMMED:
        tensors[1] = tensors[1].sigmoid()
    return tensors


def make_leaves(case: Case, dtype: torch.dtype, memory_format: torch.memory_format) -> list[Tensor | None]:
    return [t if t is None else t.requires_grad_() for t in make_tensors(case, dtype, memory_format)]


def make_buffers(case: Case, dtype: torch.dtype) -> list[Tensor]:
    return [torch.linspace(0.5, 1.5, 5, dtype=dtype) for _ in range(case.buffers)]


def call(op: Callable, case: Case, tensors: list[Tensor | None], buffers: list[Tensor]) -> tuple[Tensor, ...]:
    options = dict(case.options)
    if "norm" in options:
        options["norm"] = tuple(o.to(tensors[0]) if isinstance(o, Tensor) else o for o in options["norm"])
    if case.op == "double_conv3x3_bias_relu":
        tensors = [*tensors[:2], tuple(tensors[2:4]), tuple(tensors[4:])]
    result = op(*tensors, *buffers, **options)
    return result if isinstance(result, tuple) else (result,)


def grads_of(outputs: tuple[Tensor, ...], tensors: list[Tensor | None]) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    return list(torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True))


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("case", [*CASES, *INFERENCE], ids=str)
@every_format
@pytest.mark.parametrize("dispatched", [False, True])
def test_equals_the_reference(case: Case, memory_format: torch.memory_format, dispatched: bool) -> None:
    results = []
    for namespace in (ops, reference):
        tensors = make_leaves(case, torch.float64, memory_format)
        buffers = make_buffers(case, torch.float64)
        with Dispatched() if dispatched and namespace is ops else nullcontext():
            outputs = call(getattr(namespace, case.op), case, tensors, buffers)
            # Of all outputs, and of each alone.
            used = [] if case in INFERENCE else [outputs, *((y,) for y in outputs if len(outputs) > 1)]
            results.append((outputs, [grad for of in used for grad in grads_of(of, tensors)], buffers))
    (outputs, grads, buffers), (expected, expected_grads, expected_buffers) = results
    for i, (a, b) in enumerate(zip(outputs, expected, strict=True)):
        assert_close(a, b, f"output {i}")
        # torch's instance norm and softmax answer contiguous whatever they get; the ops keep the format, as
        # convolutions do.
        keeps = a.dim() == 4 and ("instance_norm" in case.op or case.options.get("activation") == "softmax")
        like = b.contiguous(memory_format=memory_format) if keeps else b
        assert a.stride() == like.stride(), f"output {i}: strides {a.stride()}, expected {like.stride()}"
    for i, (a, b) in enumerate(zip(grads, expected_grads, strict=True)):
        assert_close(a, b, f"gradient {i}")
    for a, b in zip(buffers, expected_buffers, strict=True):
        assert_close(a, b, "running statistics")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_combination_of_requires_grad(case: Case) -> None:
    present = [i for i, shape in enumerate(case.shapes) if shape is not None]
    full: dict[int, Tensor] = {}
    for mask in sorted(itertools.product((True, False), repeat=len(present)), reverse=True):
        if not any(mask):
            continue
        tensors = make_tensors(case, torch.float64, torch.channels_last)
        chosen = [i for i, needs_grad in zip(present, mask, strict=True) if needs_grad]
        for i in chosen:
            tensors[i].requires_grad_()
        with Dispatched():
            outputs = call(getattr(ops, case.op), case, tensors, make_buffers(case, torch.float64))
            grads = grads_of(outputs, tensors)
        for i, grad in zip(chosen, grads, strict=True):
            assert_close(grad, full.setdefault(i, grad), f"gradient {i} with {mask}")


def flat_arguments(case: Case, dtype: torch.dtype, memory_format: torch.memory_format, requires_grad: bool) -> tuple:
    """The registered op behind a public one and the arguments it got, caught at the dispatcher."""
    caught: list[tuple] = []

    class Catch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastunet" and not func.name().endswith("_backward"):
                caught.append((func, args))
            return func(*args, **(kwargs or {}))

    tensors = make_tensors(case, dtype, memory_format)
    with Catch():
        call(getattr(ops, case.op), case, tensors, make_buffers(case, dtype))
    ((func, args),) = caught
    if requires_grad:
        args = tuple(a.requires_grad_() if isinstance(a, Tensor) and any(a is t for t in tensors) else a for a in args)
    return func, args


@pytest.mark.parametrize("case", REGISTERED, ids=str)
def test_opcheck(case: Case) -> None:
    for memory_format, requires_grad in ((torch.contiguous_format, False), (torch.channels_last, True)):
        func, args = flat_arguments(case, torch.float32, memory_format, requires_grad)
        # Asking an op for inference for a gradient raises, which is no mistake of its registration.
        without = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(func, args, test_utils=without if requires_grad and case in INFERENCE else "ALL")


BY_INDUCTOR = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"),
]


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        *((case, "aot_eager") for case in (*REGISTERED, case_of("double_conv3x3_bias_relu"))),
        *(pytest.param(case, "inductor", marks=BY_INDUCTOR) for case in CASES),
    ],
    ids=str,
)
def test_compiles_without_a_break(case: Case, backend: str) -> None:
    torch._dynamo.reset()
    op, runs = getattr(ops, case.op), []
    for run in (op, torch.compile(op, fullgraph=True, backend=backend)):
        tensors = make_leaves(case, torch.float32, torch.channels_last)
        buffers = make_buffers(case, torch.float32)
        with torch.set_grad_enabled(case not in INFERENCE):
            outputs = call(run, case, tensors, buffers)
        runs.append([*outputs, *([] if case in INFERENCE else grads_of(outputs, tensors)), *buffers])
    for eager, compiled in zip(*runs, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [*CASES, *INFERENCE], ids=str)
def test_autocast_as_torch(case: Case) -> None:
    results = []
    for op in (getattr(ops, case.op), getattr(reference, case.op)):
        tensors = make_leaves(case, torch.float32, torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = call(op, case, tensors, make_buffers(case, torch.float32))
        results.append((outputs, [] if case in INFERENCE else grads_of(outputs, tensors)))
    (outputs, grads), (expected, expected_grads) = results
    for a, b in zip(outputs, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.02)
    for a, b in zip(grads, expected_grads, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.03 * b.norm() + 1e-3


@pytest.mark.parametrize("case", EACH_OP, ids=str)
def test_second_derivative_is_torchs_or_refused(case: Case) -> None:
    """On ATen a step with gradients is torch's own; a backward of ours, here of losses and instance norms, has none."""
    seconds = []
    for op in (getattr(ops, case.op), getattr(reference, case.op)):
        tensors = make_tensors(case, torch.float64, torch.contiguous_format)
        x = tensors[0].requires_grad_()
        outputs = call(op, case, tensors, make_buffers(case, torch.float64))
        cotangents = [torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y).requires_grad_() for y in outputs]
        (grad,) = torch.autograd.grad(outputs, x, cotangents, create_graph=True)
        if (case.op in SUMMED or "instance_norm" in case.op) and op is getattr(ops, case.op):
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(grad.square().sum(), x)
            return
        seconds.append(torch.autograd.grad(grad.square().sum(), [x, *cotangents], allow_unused=True))
    for a, b in zip(*seconds, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, "second derivative")


@pytest.mark.parametrize("case", EACH_OP, ids=str)
def test_result_dtype(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors = make_tensors(case, dtype, torch.channels_last)
        for y in call(getattr(ops, case.op), case, tensors, make_buffers(case, dtype)):
            assert y.dtype == (torch.float32 if case.op in SUMMED else dtype)


@pytest.mark.parametrize("case", INFERENCE, ids=str)
def test_an_op_for_inference_has_no_gradient_and_says_so(case: Case) -> None:
    (y,) = call(getattr(ops, case.op), case, make_leaves(case, torch.float64, torch.channels_last), [])
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        y.backward(torch.ones_like(y))


def test_an_input_changed_before_backward_raises() -> None:
    x, w = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3, requires_grad=True)
    with Dispatched():
        y = ops.conv3x3_bias_relu(x, w)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.randn_like(y))


@pytest.mark.parametrize("shape", [(2, 1, 6, 5), (2, 3, 1, 1), (1, 1, 1, 1), (2, 4, 6, 5)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice of channels_last"])
def test_memory_format_is_that_of_torchs_convolution(shape: tuple[int, ...], layout: str) -> None:
    """Of an image of one channel, which is contiguous either way, the strides tell."""
    x, w = torch.randn(shape), torch.randn(4, shape[1], 3, 3)
    if layout != "contiguous":
        x = x.to(memory_format=torch.channels_last)
    if layout == "slice of channels_last":
        x = F.pad(x, (0, 2)).contiguous(memory_format=torch.channels_last)[..., : shape[3]]
    expected = F.conv2d(x, w, padding=1)
    for grad in (False, True):
        y = ops.conv3x3_bias_relu(x, w.requires_grad_(grad), relu=False)
        # Nothing is ever a stride away along a side of one.
        strides = zip(y.stride(), expected.stride(), y.shape, strict=True)
        assert all(actual == stride for actual, stride, side in strides if side > 1)


def test_statistics_may_be_changed_before_a_backward_that_does_not_read_them() -> None:
    """In training the batch's own count. On ATen torch's own batch norm holds on to the running ones all the same."""
    x, w, gamma = (torch.randn(shape) for shape in ((1, 128, 64, 32), (128, 128, 3, 3), (128,)))
    assert winograd_wins(x, w)
    grads = []
    for changed in (True, False):
        weight, mean, var = w.clone().requires_grad_(), torch.zeros(128), torch.ones(128)
        y = ops.conv3x3_batch_norm_relu(x, weight, gamma, gamma, mean, var, training=True)
        if changed:
            mean.add_(1)
            var.mul_(2)
        y.backward(y.detach().roll(1, 0))
        grads.append(weight.grad)
    assert torch.equal(*grads)


def test_max_pool_gradient_of_ties_and_nan() -> None:
    x = torch.tensor([[1.0, 1.0, float("nan"), 3.0, 9.0], [1.0, 0.0, float("nan"), 2.0, 9.0]]).reshape(1, 1, 2, 5)
    grads = []
    for op in (ops.max_pool2x2, lambda t: F.max_pool2d(t, 2)):
        t = x.clone().requires_grad_()
        with Dispatched():
            grads.append(torch.autograd.grad(op(t), t, torch.tensor([[[[2.0, 3.0]]]]))[0])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("indices", "chunk"), [(False, 1 << 17), (True, 1 << 17), (False, 1)])
def test_masked_sums_of_values_and_indices(
    activation: str, indices: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all images at once, and of one after the other."""
    monkeypatch.setitem(ops.segmentation_sums.__globals__, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(X, generator=generator, dtype=torch.float64)
    mask = torch.randint(0, 2, (2, 1, 7, 6), generator=generator)
    target = torch.rand(X, generator=generator, dtype=torch.float64)
    if indices:
        target = torch.where(mask == 0, 255, torch.randint(0, 3, mask.shape, generator=generator)).to(torch.uint8)
    results = []
    for op in (ops.segmentation_sums, reference.segmentation_sums):
        leaves = [logits.clone().requires_grad_()] + ([] if indices else [target.clone().requires_grad_()])
        sums = op(leaves[0], *(leaves[1:] or [target]), mask, activation=activation, squared=True, entropy=True)
        cotangent = torch.randn(sums.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append((sums, *torch.autograd.grad(sums, leaves, cotangent)))
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert_close(a, b, f"result {i}")
    flags = (activation == "softmax", True, True)
    torch.library.opcheck(torch.ops.fastunet.segmentation_sums.default, (leaves[0], target, mask, *flags))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weight_gradient_of_a_small_image(dtype: torch.dtype) -> None:
    """Where a matrix product takes the place of oneDNN's gradient: within the bounds of a sum over the pixels."""
    x, weight = random_input((2, 344, 5, 6), dtype=dtype), random_input((344, 344, 3, 3), dtype=dtype)
    grad = random_input((2, 344, 5, 6), dtype=dtype, seed=1)
    for format in (torch.contiguous_format, torch.channels_last):
        leaf = weight.contiguous(memory_format=format).requires_grad_()
        y = ops.conv3x3_bias_relu(x.contiguous(memory_format=format), leaf, relu=False)
        (actual,) = torch.autograd.grad(y, leaf, grad)
        exact = conv2d_weight(x.double(), weight.shape, grad.double(), padding=1)
        size = conv2d_weight(x.double().abs(), weight.shape, grad.double().abs(), padding=1)
        assert_within(actual, exact, conv_tolerance(exact, size, terms=60, dtype=dtype))
        assert actual.stride() == leaf.stride()
