"""What the tests of the conv3x3 kernels share: tensors, outputs and gradients against float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from kernel_device import DEVICE, INTERPRETED
from torch import Tensor

from fastunet.testing import (
    assert_within,
    bias_grad_expected,
    conv3x3_expected,
    conv3x3_input_grad_expected,
    conv3x3_weight_grad_expected,
    in_layout,
    random_cotangent,
    random_input,
)

HALF, BFLOAT = torch.float16, torch.bfloat16
# n, c1, c2, c_out, h, w of a convolution of [x, up].
Shape = tuple[int, int, int, int, int, int]


def make_inputs(
    shape: Shape, dtype: torch.dtype, make: Any = random_input
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """x, up (None where c2 is 0), weight and bias."""
    n, c1, c2, c_out, h, w = shape
    options = {"dtype": dtype, "device": DEVICE}
    x = make((n, c1, h, w), seed=1, **options)
    up = make((n, c2, h, w), seed=2, **options) if c2 else None
    return x, up, make((c_out, c1 + c2, 3, 3), seed=3, **options), make((c_out,), seed=4, **options)


def upsampling_inputs(
    size: tuple[int, int], *, n: int = 1, c1: int = 16, c_low: int = 32, c_out: int = 64, make: Any = random_input
) -> dict:
    """Tensors of a decoder upsampling in float16; the convolution has as many channels of the upsampled image as of
    skip, of which size is the height and width.
    """
    options = {"dtype": torch.float16, "device": DEVICE}
    scales = {"up_weight": c_low**-0.5, "weight": (18 * c1) ** -0.5} if make is random_input else {}
    shapes = {
        "skip": (n, c1, *size),
        "low": (n, c_low, size[0] // 2, size[1] // 2),
        "up_weight": (c_low, c1, 2, 2),
        "up_bias": (c1,),
        "weight": (c_out, 2 * c1, 3, 3),
    }
    return {
        name: make(shape, seed=i, **options, **({"scale": scales[name]} if name in scales else {}))
        for i, (name, shape) in enumerate(shapes.items())
    }


def assert_forward(
    kernels: ModuleType, x: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None, **options: Any
) -> None:
    """Value, dtype, shape and memory format of both outputs."""
    pool = min(x.shape[2:]) >= 2 * options.get("stride", 1)
    y, pooled = kernels.conv3x3.pointer.conv3x3(x, weight, bias, up=up, pool=pool, **options)
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    if INTERPRETED:  # It knows no TF32, and computes such products in float32.
        options.pop("allow_tf32", None)
    expected = conv3x3_expected(x, weight, bias, up=up, **options)
    assert_within(y, *expected)
    assert (pooled is not None) == pool
    if pooled is not None:
        assert pooled.is_contiguous(memory_format=torch.channels_last)
        assert_within(pooled, *expected.pool())
        if x.shape[0]:
            assert torch.equal(pooled, F.max_pool2d(y, 2))


def assert_gradients(
    kernels: ModuleType,
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    *,
    stride: int = 1,
    layout: str = "channels_last",
    allow_tf32: bool = False,
) -> None:
    """The gradients of one input or both, of x's share of the weight, and of the bias."""
    size, inputs = tuple(x.shape[2:]), [t for t in (x, up) if t is not None]
    shape = (x.shape[0], weight.shape[0], *(-(-side // stride) for side in size))
    grad = in_layout(random_cotangent(x.new_empty(shape)), layout)
    options, rounds = {"stride": stride, "allow_tf32": allow_tf32}, {"allow_tf32": allow_tf32 and not INTERPRETED}
    channels, of = [t.shape[1] for t in inputs], kernels.conv3x3.grad
    grads = of.conv3x3_input_grads(grad, weight, channels, size=size, **options)
    for actual, share in zip(grads, weight.split(channels, dim=1), strict=True):
        assert actual.dtype == x.dtype
        assert actual.is_contiguous(memory_format=torch.channels_last)
        assert_within(actual, *conv3x3_input_grad_expected(grad, share, stride=stride, size=size, **rounds))
    gw, gb = of.conv3x3_weight_grad(grad, x, with_bias=True, **options)
    assert gw.dtype == gb.dtype == x.dtype
    assert_within(gw, *conv3x3_weight_grad_expected(grad, x, stride=stride, **rounds))
    assert_within(gb, *bias_grad_expected(grad))
