"""The ops on their Triton kernels: what dispatch, autograd and the UNet make of the launchers."""

from __future__ import annotations

import itertools

import pytest
import torch
from fastunet.kernels import gpu
from kernel_device import DEVICE, MARK, kernel_names

import fastunet
from fastunet import ops
from fastunet.ops.conv3x3 import ConvArgs
from fastunet.reference import functional as reference

pytestmark = [MARK, pytest.mark.usefixtures("ieee")]

FORMS = {
    "conv3x3_bias_relu": ((2, 3, 5, 6), (4, 3, 3, 3)),
    "conv3x3_bias_relu_pool": ((2, 3, 5, 6), (4, 3, 3, 3)),
    "concat_conv3x3_bias_relu": ((2, 3, 5, 6), (2, 2, 5, 6), (4, 5, 3, 3)),
}
NCHW, NHWC = torch.contiguous_format, torch.channels_last
every_form = pytest.mark.parametrize("op", FORMS)


@pytest.fixture(autouse=True)
def forced():
    with fastunet.backend("triton"):
        yield


def integers(*shape: int, low: int = -3, high: int = 4) -> torch.Tensor:
    """Small integers: every product and sum is exact in float32, so results must agree to the bit."""
    return torch.randint(low, high, shape).float().to(DEVICE)


def run(
    op,
    shapes,
    needs_grad: tuple[bool, ...],
    memory_format: torch.memory_format,
    dtype=torch.float32,
    weight_format: torch.memory_format | None = None,
    **options,
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    tensors = [integers(*shape).to(dtype) for shape in (*shapes, shapes[-1][:1])]
    tensors = [t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for t in tensors]
    if weight_format is not None:
        tensors[-2] = tensors[-2].contiguous(memory_format=weight_format)
    for t, want in zip(tensors, needs_grad, strict=True):
        t.requires_grad_(want)
    outputs = op(*tensors, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not any(needs_grad):
        return [*outputs]
    leaves = [t for t in tensors if t.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, leaves, [integers(*y.shape).to(dtype) for y in outputs])]


def run_reference(op: str, *args, **options) -> list[torch.Tensor]:
    """In float64: cuDNN may take an algorithm for float32 that is not exact on integers."""
    return [t.float() for t in run(getattr(reference, op), *args, dtype=torch.float64, **options)]


FORMATS = [(NCHW, NCHW), (NHWC, NHWC), (NHWC, NCHW)]
ACTIVATIONS: list[dict] = [{}, {"relu": False}, {"negative_slope": 0.5}]


@every_form
@pytest.mark.parametrize("number", range(3), ids=["nchw", "nhwc", "nhwc images"])
def test_values_and_gradients_are_the_references_in_the_inputs_format(op: str, number: int) -> None:
    """Each op in each format, and with each activation."""
    formats, options = FORMATS[number], ACTIVATIONS[(number + list(FORMS).index(op)) % 3]
    shapes, (format, weight_format) = FORMS[op], formats
    needs_grad = (True,) * (len(shapes) + 1)
    actual = run(getattr(ops, op), shapes, needs_grad, format, weight_format=weight_format, **options)
    expected = run_reference(op, shapes, needs_grad, format, **options)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda m, i=i: f"result {i}: {m}")
        of_result = weight_format if i == len(actual) - 2 else format
        assert a.dim() != 4 or a.is_contiguous(memory_format=of_result)


@every_form
def test_a_change_of_a_contiguous_weight_is_seen(op: str) -> None:
    """In inference the kernels read a channels_last copy of it, which is kept."""
    *images, weight = (integers(*shape) for shape in FORMS[op])
    images = [image.contiguous(memory_format=NHWC) for image in images]
    for _ in range(2):
        results = (getattr(module, op)(*images, weight) for module in (ops, reference))
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        weight.data.neg_()


@every_form
def test_every_combination_of_requires_grad(op: str) -> None:
    shapes = FORMS[op]
    for needs_grad in itertools.product((True, False), repeat=len(shapes) + 1):
        actual = run(getattr(ops, op), shapes, needs_grad, torch.channels_last)
        expected = run_reference(op, shapes, needs_grad, torch.channels_last)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("concat", [False, True])
def test_opcheck(pool: bool, concat: bool) -> None:
    x, up = (torch.randn(1, 2, 4, 4, device=DEVICE, requires_grad=True) for _ in range(2))
    weight = torch.randn(3, 4 if concat else 2, 3, 3, device=DEVICE, requires_grad=True)
    bias = torch.randn(3, device=DEVICE, requires_grad=True)
    args = ConvArgs(x, up if concat else None, weight, bias, slope=0.0, pool=pool)
    torch.library.opcheck(torch.ops.fastunet.conv3x3.default, tuple(args))


def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    x, w = integers(1, 2, 4, 4), integers(3, 2, 3, 3)
    compiled = torch.compile(ops.conv3x3_bias_relu, fullgraph=True, backend="aot_eager")
    exact = reference.conv3x3_bias_relu(x.double(), w.double())
    torch.testing.assert_close(compiled(x, w).double(), exact, rtol=0, atol=0)


def test_a_training_step_of_the_unet() -> None:
    torch.manual_seed(0)
    model = fastunet.UNet(1, 2, features=(3, 5), norm=None).to(DEVICE)
    chosen = {
        row.op: row.implementation for row in fastunet.explain(model, torch.zeros(2, 1, 5, 6, device=DEVICE)).rows
    }
    assert chosen["conv3x3_bias_relu"] == "triton"
    exact = model.to_reference().double()
    x = torch.randn(2, 1, 5, 6, device=DEVICE)
    cotangent = torch.randn(2, 2, 5, 6, device=DEVICE)
    y = model(x)
    expected = exact(x.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    y.backward(cotangent)
    expected.backward(cotangent.double())
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        error = (p.grad.double() - q.grad).norm() / q.grad.norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


def test_the_kernels_ran() -> None:
    """The other tests would pass on ATen as well."""
    x, w = integers(1, 2, 4, 4).requires_grad_(), integers(3, 2, 3, 3).requires_grad_()
    with gpu.recording() as launches:
        y, pooled = ops.conv3x3_bias_relu_pool(x, w)
        torch.autograd.grad((y, pooled), (x, w), (torch.ones_like(y), torch.ones_like(pooled)))
    assert kernel_names(launches) == [
        "conv3x3_kernel",
        "activation_grad_kernel",
        "conv3x3_input_grad_kernel",
        "conv3x3_weight_grad_kernel",
        "sum_rows_kernel",
    ]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_empty_batch(memory_format: torch.memory_format) -> None:
    x = torch.empty(0, 2, 4, 4, device=DEVICE).contiguous(memory_format=memory_format).requires_grad_()
    w = torch.randn(3, 2, 3, 3, device=DEVICE, requires_grad=True)
    y = ops.conv3x3_bias_relu(x, w)
    assert y.shape == (0, 3, 4, 4)
    grads = torch.autograd.grad(y, (x, w), torch.empty_like(y))
    assert grads[0].shape == x.shape
    assert not grads[1].any()


@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_two_convolutions_in_one_call_are_two_calls(concat: bool, slope: float) -> None:
    torch.manual_seed(0)
    x, up = integers(2, 3, 5, 6), integers(2, 2, 5, 6) if concat else None
    weights = (integers(4, 5 if concat else 3, 3, 3), integers(2, 4, 3, 3))
    biases = (integers(4), integers(2))
    leaves = [t for t in (x, up, *weights, *biases) if t is not None]
    for t in leaves:
        t.requires_grad_()
    results = []
    for namespace in (ops, reference):
        if namespace is ops:
            y, pooled = ops.double_conv3x3_bias_relu(x, up, weights, biases, negative_slope=slope, pool=True)
        else:  # In float64, as run_reference.
            joined = (x if up is None else torch.cat([x, up], 1)).double()
            (w1, w2), (b1, b2) = ([t.double() for t in ts] for ts in (weights, biases))
            middle = reference.conv3x3_bias_relu(joined, w1, b1, negative_slope=slope)
            results_64 = reference.conv3x3_bias_relu_pool(middle, w2, b2, negative_slope=slope)
            y, pooled = (t.float() for t in results_64)
        torch.manual_seed(1)
        results.append(
            [y, pooled, *torch.autograd.grad((y, pooled), leaves, [integers(*t.shape) for t in (y, pooled)])]
        )
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("classes", [1, 9])
def test_the_last_convolution_and_the_head_in_one(norm: str | None, classes: int) -> None:
    torch.manual_seed(0)
    model = fastunet.UNet(1, classes, features=(3, 5), norm=norm, head="sigmoid").to(DEVICE).eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    x = torch.randn(2, 1, 5, 6, device=DEVICE)
    with torch.no_grad():
        rows = fastunet.explain(model, x).rows
        y = model(x)
    assert rows[-1].op == "conv3x3_relu_conv1x1"
    assert model(x).grad_fn is not None
    torch.testing.assert_close(y.double(), model.to_reference().double()(x.double()), rtol=1e-5, atol=1e-5)
