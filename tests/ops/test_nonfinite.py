"""An infinity and a NaN, each in one pixel, reach on the Triton kernels what they reach in torch, and nothing else.

Channels and pixels that only fill a kernel's block are multiplied by zeros: zero times infinity is NaN, which no sum is
to meet.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from fastunet.kernels import gpu
from kernel_device import DEVICE, INTERPRETED, MARK
from test_ops import CASES, CHANNELS, W3, Case, X, call, grads_of, make_buffers, make_tensors
from torch import Tensor

import fastunet
from fastunet import ops
from fastunet.reference import functional as reference

pytestmark = [MARK, pytest.mark.usefixtures("ieee", "nan_in_fresh_memory")]

FOR_INFERENCE = ("conv3x3_relu_conv1x1", "conv_transpose2x2_concat_conv3x3_relu")
HOPPER = dataclasses.replace(gpu.known_target(90), multiprocessors=4)
NORM = tuple(torch.linspace(0.5, 1.5, 5) + i for i in range(3))
HEAD = [
    Case("conv3x3_relu_conv1x1", (X, W3, CHANNELS, (2, 5, 1, 1), (2,)), options)
    for options in ({"negative_slope": 0.1}, {"norm": (*NORM, 1e-3), "sigmoid": True})
]
# 40 channels of a block of 64, by boxes.
X16, SKIP16, UP16, WIDE, PLANES = (1, 16, 9, 10), (1, 32, 9, 10), (1, 16, 9, 10), (40, 16, 3, 3), (40,)
DESCRIPTORS = [
    Case("conv3x3_bias_relu_pool", (X16, WIDE, PLANES), {}),
    Case("concat_conv3x3_bias_relu", (SKIP16, UP16, (40, 48, 3, 3), None), {"negative_slope": 0.1}),
    Case("conv3x3_instance_norm_relu", (X16, WIDE, PLANES, PLANES), {}),
    Case("conv_transpose2x2", (X16, (16, 40, 2, 2), PLANES), {}),
    Case("conv3x3_relu_conv1x1", (X16, WIDE, PLANES, (3, 40, 1, 1), (3,)), {}),
]
if INTERPRETED:  # Two steps elsewhere.
    low, up = (1, 16, 4, 5), (16, 16, 2, 2)
    DESCRIPTORS.append(
        Case("conv_transpose2x2_concat_conv3x3_relu", (SKIP16, low, up, (16,), (40, 48, 3, 3), PLANES), {})
    )


def results(case: Case, dtype: torch.dtype, *, exact: bool) -> list[Tensor]:
    """Outputs and gradients, of torch in float64 where exact."""
    namespace, computed = (reference, torch.float64) if exact else (ops, dtype)
    x, *others = make_tensors(case, dtype, torch.channels_last)
    x[0, 0, 3, 3], x[-1, 1, 0, 0] = math.inf, math.nan
    positive = (None if t is None else t.abs() for t in others)  # Infinities are not to meet their opposites.
    tensors = [None if t is None else t.to(DEVICE, computed) for t in (x, *positive)]
    options = dict(case.options)
    if "norm" in options:
        options["norm"] = tuple(o.to(DEVICE, computed) if isinstance(o, Tensor) else o for o in options["norm"])
    has_gradient = case.op not in FOR_INFERENCE
    for t in tensors:
        if t is not None:
            t.requires_grad_(has_gradient)
    buffers = [b.to(DEVICE) for b in make_buffers(case, computed)]
    with fastunet.backend("aten" if exact else "triton"):
        outputs = call(getattr(namespace, case.op), dataclasses.replace(case, options=options), tensors, buffers)
        return [*outputs, *(grads_of(outputs, tensors) if has_gradient else [])]


def check(case: Case, dtype: torch.dtype) -> None:
    for i, (actual, expected) in enumerate(zip(*(results(case, dtype, exact=e) for e in (False, True)), strict=True)):
        for state in (torch.isnan, torch.isposinf, torch.isneginf):
            wrong = (state(actual) != state(expected)).nonzero().tolist()
            assert not wrong, f"result {i}: {state.__name__} differs at {wrong[:5]} and {len(wrong[5:])} more"


@pytest.mark.parametrize("case", [*CASES, *HEAD], ids=str)
def test_by_pointers(case: Case) -> None:
    check(case, torch.float32)


@pytest.mark.parametrize("case", DESCRIPTORS, ids=str)
def test_by_descriptors(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(gpu, "target", lambda device: HOPPER)
    check(case, torch.float16)


def test_statistics_of_values_whose_squares_overflow() -> None:
    """They are taken about the mean, which rows beyond the last tile, and those before the first, are not near to."""
    x = 1e20 * (1 + torch.arange(2 * 9 * 7, device=DEVICE).reshape(2, 1, 9, 7) / 4096)
    weight = torch.zeros(1, 1, 3, 3, device=DEVICE)
    weight[..., 1, 1] = 1
    statistics = torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    with fastunet.backend("triton"):
        y = ops.conv3x3_batch_norm_relu(x, weight, None, None, *statistics, training=True, momentum=1.0, relu=False)
    expected = ((x.double() - x.double().mean()) / x.double().std(correction=0)).cpu()
    torch.testing.assert_close(y.double().cpu(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(statistics[1].double().cpu(), x.double().var()[None].cpu(), rtol=1e-4, atol=0)
