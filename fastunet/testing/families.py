"""What a family of kernels is checked by on a user's GPU, before its first use: small images, against float64.

`fastunet.kernels.self_test` runs `check_family` in a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

import fastunet
from fastunet import dispatch

from .budget import assert_within, float32_precision, random_integers
from .parity import FORMATS, cases_of, check, registered

# As cases_of takes it: wide enough for the heuristic blocks of large images, with edges on both sides; and of the halo
# variant more tiles than a GPU has multiprocessors.
_SIZE, _HALO_SIZE = (2, 64, 131, 66, 128), (2, 64, 195, 75, 136)
# Height and width of images that whole runs of pixels make up.
_RUNS = 2, 64
HALO, FP8 = "conv3x3_halo", "conv3x3_fp8"
# By each of its check's configurations one, because each is a kernel to compile; and the first with a head.
_HALO_OPS = ("conv3x3_bias_relu_pool", "concat_conv3x3_batch_norm_relu", "conv3x3_batch_norm_relu_pool")
_HEAD = "conv3x3_relu_conv1x1"


def check_family(family: str, dtype: str, device: torch.device, size: Sequence[int] = _SIZE) -> None:
    """Raise AssertionError unless the kernels of an op that dispatch knows, of HALO or of FP8 are right on the device.

    dtype: a format of FORMATS. size: as cases_of takes it.
    """
    format, allow_tf32 = FORMATS[dtype]
    with fastunet.backend("triton"), float32_precision("tf32" if allow_tf32 else "ieee"):
        if family == FP8:
            check_fp8(format, device)
        elif family == HALO:
            check_halo(format, device)
        else:
            has_first = family.removesuffix(dispatch.STRIDE2) == "conv3x3_bias_relu"
            sizes = [size, (size[0], 3, *size[2:])] if has_first else [size]  # As of a first layer.
            for case in (
                case for each in sizes for case in cases_of(*each) if registered(case.op, case.options) == family
            ):
                check(case, format, device, allow_tf32=allow_tf32)
            if family in (*dispatch.WINOGRAD_OPS, *dispatch.STRIDED_OPS):
                _check_gradients(format, device, size[1], 2 if family in dispatch.STRIDED_OPS else 1)


def _check_gradients(dtype: torch.dtype, device: torch.device, c: int, stride: int) -> None:
    """Raise AssertionError unless a convolution's gradients are exact on integers where they have variants that small
    images do not lead to: two inputs of as many channels, which one program may have both, and whole runs of pixels.
    """
    from fastunet.kernels.conv3x3 import grad as kernels  # Late, as triton: it may be absent.

    h, w = _RUNS
    shapes = (2, 2 * c, stride * h, stride * w), (2 * c, 2 * c, 3, 3), (2, 2 * c, h, w)
    tensors = (random_integers(shape, largest=1, seed=i, device=device).to(dtype) for i, shape in enumerate(shapes))
    x, weight, grad = (t.contiguous(memory_format=torch.channels_last) for t in tensors)
    leaves = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = torch.autograd.grad(F.conv2d(*leaves, stride=stride, padding=1), leaves, grad.double())
    found = kernels.conv3x3_input_grads(grad, weight, [c, c], stride=stride, size=x.shape[2:])
    assert_within(torch.cat(found, 1), exact[0].to(dtype).double(), 0.0)
    of_weight, of_bias = kernels.conv3x3_weight_grad(grad, x, with_bias=True, stride=stride)
    assert_within(of_weight, exact[1].to(dtype).double(), 0.0)
    assert of_bias is not None
    assert_within(of_bias, grad.double().sum((0, 2, 3)).to(dtype).double(), 0.0)


def check_halo(
    dtype: torch.dtype, device: torch.device, size: Sequence[int] = _HALO_SIZE, configs: Sequence[Any] = ()
) -> None:
    """Raise AssertionError unless convolutions by the halo variant, and an input gradient, are right, twice over.

    configs: to run them with, by default those of its check. A head wants all channels in one block.
    """
    from fastunet.kernels import autotune, gpu  # Late, as triton: it may be absent.
    from fastunet.kernels.conv3x3 import config, config_hopper

    # So that the variant may run here: nothing is written.
    passed = {"op": HALO, "dtype": autotune.format_of(dtype, allow_tf32=False), "shape": {}, "failed": ""}
    autotune.put(gpu.target(device).name, [passed], keep=False)
    configs = configs or config_hopper.checked_configs()
    found = {case.op: case for case in cases_of(*size) if "stride" not in case.options}
    cases = [found[op] for op in _HALO_OPS]
    cases[1] = replace(cases[1], options={**cases[1].options, "training": False})  # The last leaves statistics.
    n, c, h, w, _ = size
    cases.append(next(case for case in cases_of(n, c, h, w, 64) if case.op == _HEAD))
    for case, chosen in zip(cases, [*configs, configs[0]], strict=False):
        with autotune.overriding(config.CONV3X3, chosen):
            for _ in range(2):
                check(replace(case, backward=False), dtype, device)
    with autotune.overriding(config.INPUT_GRAD, configs[0]):
        for _ in range(2):
            _check_masked_grad(dtype, device, n, c, h, w)


def _check_masked_grad(dtype: torch.dtype, device: torch.device, n: int, c: int, h: int, w: int) -> None:
    """Raise AssertionError unless the gradient of a ReLU's input before a convolution is exact on integers."""
    from fastunet.kernels.conv3x3.grad import conv3x3_input_grads  # Late, as triton: it may be absent.

    shapes = (n, c, h, w), (c, c, 3, 3), (n, c, h, w)
    tensors = (random_integers(shape, largest=2, seed=i, device=device) for i, shape in enumerate(shapes))
    grad, weight, x = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in tensors)
    exact = F.conv_transpose2d(grad.double(), weight.double(), padding=1).to(dtype).double()
    (masked,) = conv3x3_input_grads(grad, weight, [c], x=x, negative_slope=0.0)
    assert_within(masked, torch.where(x > 0, exact, 0.0), 0.0)


def check_fp8(dtype: torch.dtype, device: torch.device, height: int = 35, width: int = 18) -> None:
    """Raise AssertionError unless the convolution of e4m3 values is exact on integers, whose sums fit 14 bits."""
    from fastunet.kernels.conv3x3.fp8 import conv3x3_fp8  # Late, as triton: it may be absent.
    from fastunet.kernels.epilogue import Normalisation

    for c2, c_out in ((0, 64), (64, 128)):
        shapes = (2, 64, height, width), (2, c2, height, width), (c_out, 64 + c2, 3, 3)
        tensors = (random_integers(shape, largest=2, seed=i, device=device) for i, shape in enumerate(shapes))
        x, up, weight = (t.contiguous(memory_format=torch.channels_last) for t in tensors)
        exact = F.conv2d(torch.cat([x, up], 1).double(), weight.double(), padding=1).relu().to(dtype).double()
        one = torch.ones(c_out, device=device)
        x, up, weight = (t.to(torch.float8_e4m3fn) for t in (x, up, weight))
        norm = Normalisation(0 * one, one, None, 0.0)
        given = (x, up if c2 else None, weight, one[:1], 0 * one, norm, 0.0)
        y, pooled = conv3x3_fp8(*given, dtype=dtype, pool=True)
        assert_within(y, exact, 0.0)
        assert pooled is not None
        assert_within(pooled, F.max_pool2d(exact, 2), 0.0)
