"""What is particular to the ops that join two layers, on ATen; test_ops.py has the values of those for inference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastunet import ops
from fastunet.checks import DtypeError, ShapeError
from fastunet.reference import functional as reference


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def test_ops_for_inference_have_no_gradient_and_say_so() -> None:
    x, low, up_weight, weight, head = tensors((2, 3, 6, 6), (2, 5, 3, 3), (5, 4, 2, 2), (6, 7, 3, 3), (2, 6, 1, 1))
    weight.requires_grad_()
    calls = (
        lambda: ops.conv3x3_relu_conv1x1(x, weight[:, :3], None, head),
        lambda: ops.conv_transpose2x2_concat_conv3x3_relu(x, low, up_weight, None, weight),
    )
    for call in calls:
        y = call()
        with pytest.raises(RuntimeError, match="cannot be differentiated"):
            y.backward(torch.ones_like(y))


def test_arguments_of_ops_for_inference() -> None:
    x, low, up_weight, weight, head = tensors((2, 3, 6, 6), (2, 5, 3, 3), (5, 4, 2, 2), (6, 7, 3, 3), (2, 6, 1, 1))
    with pytest.raises(ShapeError, match="expected shape"):
        ops.conv3x3_relu_conv1x1(x, weight[:, :3], None, head[:, :3])
    with pytest.raises(DtypeError, match="head_weight"):
        ops.conv3x3_relu_conv1x1(x, weight[:, :3], None, head.float())
    step_up = ops.conv_transpose2x2_concat_conv3x3_relu
    with pytest.raises(ShapeError, match="low: expected shape"):
        step_up(x, low[..., :2], up_weight, None, weight)
    with pytest.raises(ShapeError, match="at least 2x2 pixels"):
        step_up(x[..., :1], low[..., :0], up_weight, None, weight)
    with pytest.raises(DtypeError, match="low"):
        step_up(x, low.float(), up_weight, None, weight)


@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("pool", [False, True])
def test_two_convolutions_are_two_calls(concat: bool, pool: bool) -> None:
    slope = 0.3 if pool else 0.0
    shapes = ((2, 3, 5, 6), (2, 2, 5, 6), (4, 5 if concat else 3, 3, 3), (4,), (3, 4, 3, 3), (3,))
    for wanted in itertools.product((True, False), repeat=3):
        results = []
        for joined in (True, False):
            x, up, w1, b1, w2, b2 = tensors(*shapes)
            leaves = [t.requires_grad_() for t, is_wanted in zip((x, w1, w2), wanted, strict=True) if is_wanted]
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
    op, runs = ops.double_conv3x3_bias_relu, []
    for run in (op, torch.compile(op, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x, w1, w2)]
        y = run(leaves[0], None, (leaves[1], leaves[2]), (b1, b2))
        runs.append([y, *torch.autograd.grad(y, leaves, tensors(y.shape, dtype=torch.float32))])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)
