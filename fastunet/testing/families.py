"""What a family of kernels is checked by on a user's GPU, before its first use: small images, against float64.

`fastunet.kernels.self_test` runs `check_family` in a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import fastunet

from .budget import float32_precision, random_integers
from .parity import FORMATS, cases_of, check, registered

# As cases_of takes it: wide enough for the heuristic blocks of large images, with edges on both sides.
_SIZE = (2, 64, 131, 66, 128)
HALO, FP8 = "conv3x3_halo", "conv3x3_fp8"
# Of the halo variant batch, height, width, channels of both inputs and of the output, as many as its check has configs:
# more tiles than a GPU has multiprocessors.
_HALO_SHAPES = ((2, 131, 75, 64, 0, 72), (2, 40, 131, 64, 64, 136), (2, 75, 131, 64, 0, 40))


def check_family(family: str, dtype: str, device: torch.device, size: Sequence[int] = _SIZE) -> None:
    """Raise AssertionError unless the kernels of an op that dispatch knows, of HALO or of FP8 are right on the device.

    dtype: a format of FORMATS. size: as cases_of takes it.
    """
    format, allow_tf32 = FORMATS[dtype]
    if family == HALO:
        check_halo(format, device)
    elif family == FP8:
        check_fp8(format, device)
    else:
        sizes = [size, (size[0], 3, *size[2:])] if family == "conv3x3_bias_relu" else [size]  # As of a first layer.
        with fastunet.backend("triton"), float32_precision("tf32" if allow_tf32 else "ieee"):
            for case in (case for each in sizes for case in cases_of(*each) if registered(case.op) == family):
                check(case, format, device, allow_tf32=allow_tf32)


def check_halo(
    dtype: torch.dtype, device: torch.device, shapes: Sequence[Sequence[int]] = _HALO_SHAPES, configs: Sequence = ()
) -> None:
    """Raise AssertionError unless the halo variant is exact, twice over, on integers, with a norm, pooling and a head.

    configs: one for each shape, by default those of its check.
    """
    from fastunet.kernels import autotune, gpu  # Late, as triton: it may be absent.
    from fastunet.kernels.conv3x3 import config, config_hopper, pointer
    from fastunet.kernels.epilogue import Head, Normalisation

    # So that the variant may run here: nothing is written.
    passed = {"op": HALO, "dtype": autotune.format_of(dtype, allow_tf32=False), "shape": {}, "failed": ""}
    autotune.put(gpu.target(device).name, [passed], keep=False)
    for (n, h, w, c1, c2, c_out), chosen in zip(shapes, configs or config_hopper.checked_configs(), strict=True):
        x, up, weight = (_integers(*sizes, dtype=dtype, device=device) for sizes in _sizes(n, h, w, c1, c2, c_out))
        bias, mean = (_integers(c_out, device=device, seed=seed) for seed in (3, 4))
        # With eps a variance of 1, whose root is exact.
        norm = Normalisation(mean, torch.full_like(mean, 0.75), None, 0.25)
        head = _integers(2, c_out, 1, 1, dtype=dtype, device=device)
        head[:, torch.arange(c_out, device=device) % 8 != 0] = 0
        exact = _exact(x, up, weight) - mean.double()[:, None, None] + bias.double()[:, None, None]
        options = {"up": up if c2 else None, "norm": norm, "negative_slope": 0.0}
        for _ in range(2):
            with autotune.overriding(config.CONV3X3, chosen):
                y, pooled = pointer.conv3x3(x, weight, bias, pool=True, **options)
                classes = pointer.conv3x3_head(x, weight, bias, Head(head, None, sigmoid=False), **options)
            _assert_equal("y", y, exact.relu())
            _assert_equal("pooled", pooled, F.max_pool2d(exact.relu(), 2))
            if classes is not None:
                _assert_equal("head", classes, F.conv2d(exact.relu(), head.double()))


def check_fp8(dtype: torch.dtype, device: torch.device, height: int = 35, width: int = 18) -> None:
    """Raise AssertionError unless the convolution of e4m3 values is exact on integers, whose sums fit 14 bits."""
    from fastunet.kernels.conv3x3.fp8 import conv3x3_fp8  # Late, as triton: it may be absent.
    from fastunet.kernels.epilogue import Normalisation

    for c2, c_out in ((0, 64), (64, 128)):
        x, up, weight = (_integers(*sizes, device=device) for sizes in _sizes(2, height, width, 64, c2, c_out))
        one = torch.ones(c_out, device=device)
        e4m3 = [t.to(torch.float8_e4m3fn) for t in (x, up, weight)]
        given = (e4m3[0], e4m3[1] if c2 else None, e4m3[2], one[:1], 0 * one)
        y, pooled = conv3x3_fp8(*given, Normalisation(0 * one, one, None, 0.0), 0.0, dtype=dtype, pool=True)
        exact = _exact(x, up, weight).relu()
        _assert_equal("y", y, exact)
        _assert_equal("pooled", pooled, F.max_pool2d(exact, 2))


def _sizes(n: int, h: int, w: int, c1: int, c2: int, c_out: int) -> Sequence[Sequence[int]]:
    return (n, c1, h, w), (n, c2, h, w), (c_out, c1 + c2, 3, 3)


def _integers(*sizes: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    t = random_integers(sizes, dtype=dtype, largest=2, seed=seed + sum(sizes), device=device)
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def _exact(x: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(torch.cat([x, up], 1).double(), weight.double(), padding=1)


def _assert_equal(what: str, actual: Tensor | None, exact: Tensor) -> None:
    assert actual is not None
    wrong = int((actual != exact.to(actual.dtype)).sum())  # NaN is.
    if wrong:
        raise AssertionError(f"{wrong} of {exact.numel()} of {what} are wrong")
