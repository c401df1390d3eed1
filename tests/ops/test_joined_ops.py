"""The ops that join two layers, against the two layers: conv3x3_relu_conv1x1 and double_conv3x3_bias_relu, on ATen."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet import ops
from fastunet.checks import DtypeError, ShapeError
from fastunet.reference import functional as reference


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


# --- the convolution with its head ---


def make_head(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor, float]]:
    """x, weight, bias, head_weight, head_bias; norm."""
    given = tensors((2, 3, 5, 6), (4, 3, 3, 3), (4,), (2, 4, 1, 1), (2,), dtype=dtype)
    mean, variance, gamma = tensors((4,), (4,), (4,), dtype=dtype)
    return given, (mean, variance.square() + 0.5, gamma, 1e-3)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_head_is_the_two_layers(sigmoid: bool, with_norm: bool, memory_format: torch.memory_format) -> None:
    (x, weight, bias, head_weight, head_bias), norm = make_head()
    x = x.contiguous(memory_format=memory_format)
    options = {"sigmoid": sigmoid, "negative_slope": 0.1, "norm": norm if with_norm else None}
    actual = ops.conv3x3_relu_conv1x1(x, weight, bias, head_weight, head_bias, **options)
    y = F.conv2d(x, weight, None if with_norm else bias, padding=1)
    if with_norm:
        mean, variance, gamma, eps = norm
        y = F.batch_norm(y, mean, variance, gamma, bias, False, 0.0, eps)
    z = F.conv2d(F.leaky_relu(y, 0.1), head_weight, head_bias)
    torch.testing.assert_close(actual, z.sigmoid() if sigmoid else z, rtol=1e-12, atol=1e-12)
    assert actual.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_of_the_head(requires_grad: bool) -> None:
    (x, weight, bias, head_weight, head_bias), (mean, variance, gamma, eps) = make_head(torch.float32)
    weight.requires_grad_(requires_grad)
    op = torch.ops.fastunet.conv3x3_relu_conv1x1.default
    arguments = (x, weight, bias, mean, variance, gamma, eps, 0.0, head_weight, head_bias, True)
    # Asking it for a gradient raises, which is no mistake of its registration.
    without = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, arguments, test_utils=without if requires_grad else "ALL")


def test_head_has_no_gradient_and_says_so() -> None:
    (x, *parameters), _ = make_head()
    parameters[0].requires_grad_()
    y = ops.conv3x3_relu_conv1x1(x, *parameters)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        y.backward(torch.ones_like(y))


def test_head_under_autocast_and_in_one_graph() -> None:
    (x, *parameters), norm = make_head(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.conv3x3_relu_conv1x1(x, *parameters, norm=norm).dtype == torch.bfloat16
    torch._dynamo.reset()
    compiled = torch.compile(ops.conv3x3_relu_conv1x1, fullgraph=True, backend="aot_eager")
    expected = ops.conv3x3_relu_conv1x1(x, *parameters, norm=norm)
    torch.testing.assert_close(compiled(x, *parameters, norm=norm), expected)


def test_head_errors() -> None:
    (x, weight, bias, head_weight, head_bias), _ = make_head()
    with pytest.raises(ShapeError, match="expected shape"):
        ops.conv3x3_relu_conv1x1(x, weight, bias, head_weight[:, :3], head_bias)
    with pytest.raises(DtypeError, match="head_weight"):
        ops.conv3x3_relu_conv1x1(x, weight, bias, head_weight.float(), head_bias)


# --- two convolutions ---


@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_two_convolutions_are_two_calls(concat: bool, pool: bool, slope: float) -> None:
    shapes = ((2, 3, 5, 6), (2, 2, 5, 6), (4, 5 if concat else 3, 3, 3), (4,), (3, 4, 3, 3), (3,))
    for wanted in itertools.product((True, False), repeat=3):
        results = []
        for joined in (True, False):
            x, up, w1, b1, w2, b2 = tensors(*shapes)
            leaves = [t for t, want in zip((x, w1, w2), wanted, strict=True) if want]
            for t in leaves:
                t.requires_grad_()
            if joined:
                options = {"negative_slope": slope, "pool": pool}
                out = ops.double_conv3x3_bias_relu(x, up if concat else None, (w1, w2), (b1, b2), **options)
            else:
                inputs = torch.cat([x, up], 1) if concat else x
                middle = reference.conv3x3_bias_relu(inputs, w1, b1, negative_slope=slope)
                last = reference.conv3x3_bias_relu_pool if pool else reference.conv3x3_bias_relu
                out = last(middle, w2, b2, negative_slope=slope)
            outs = out if pool else (out,)
            cotangents = tensors(*(t.shape for t in outs))
            results.append([*outs, *(torch.autograd.grad(outs, leaves, cotangents) if leaves else ())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_two_convolutions_compile_in_one_graph() -> None:
    torch._dynamo.reset()
    x, w1, b1, w2, b2 = tensors((1, 2, 4, 4), (3, 2, 3, 3), (3,), (2, 3, 3, 3), (2,), dtype=torch.float32)
    runs = []
    for run in (
        ops.double_conv3x3_bias_relu,
        torch.compile(ops.double_conv3x3_bias_relu, fullgraph=True, backend="aot_eager"),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, w1, w2)]
        y = run(leaves[0], None, (leaves[1], leaves[2]), (b1, b2))
        runs.append([y, *torch.autograd.grad(y, leaves, tensors(y.shape, dtype=torch.float32))])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)
