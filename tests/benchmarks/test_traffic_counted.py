"""The bytes that launches are said to move, against those that Triton's interpreter is seen to access."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastunet.benchmarks import access_counts
from fastunet.benchmarks.access_counts import traffic_of
from fastunet.benchmarks.jobs import Job, launch_of
from fastunet.kernels.conv3x3.config import ConvShape
from kernel_device import INTERPRETED

if not INTERPRETED:
    pytest.skip(
        "needs TRITON_INTERPRET=1 before triton is imported: accesses are counted there", allow_module_level=True
    )

from counted_accesses import counted, with_memory

pytestmark = pytest.mark.interpreter

# 18x13 pixels leave the last tiles partly outside, on both sides, and an odd column beside the pooling windows.
_SIDES = (18, 13)
# 80 channels leave the last block of 64 partly empty.
_PLAIN = ConvShape(16, 0, 80, *_SIDES)
_TWO = ConvShape(16, 16, 40, *_SIDES)
_FOLDED = ConvShape(3, 0, 40, *_SIDES, aligned=False)
_NARROW = ConvShape(16, 0, 40, *_SIDES)
_DEEP = ConvShape(128, 128, 40, *_SIDES)
_QUANTISED = ConvShape(32, 0, 48, *_SIDES)
_COMPOSED = ConvShape(16, 32, 128, *_SIDES)
_COMPOSED_NARROW = ConvShape(16, 32, 40, 9, 8)


def _job(op: str, shape: Any, capability: int = 80, dtype: torch.dtype = torch.float16) -> Job:
    return Job(op, dtype, False, capability, shape)


# Pointers on sm_80, descriptors on sm_90.
JOBS = [
    *(_job("forward", shape, capability) for shape in (_PLAIN, _FOLDED) for capability in (80, 90)),
    *(_job(op, _NARROW, capability) for op in ("pool", "head", "norm") for capability in (80, 90)),
    # Of several blocks of channels, the first alone stores a tile's count.
    *(_job("statistics", _PLAIN, capability) for capability in (80, 90)),
    *(_job("two_inputs", _TWO, capability) for capability in (80, 90)),
    _job("leaky", _NARROW),
    *(_job(op, _DEEP, capability) for op in ("split", "finish_split") for capability in (80, 90)),
    *(
        _job(op, _QUANTISED, 90, torch.bfloat16)
        for op in ("fp8", "fp8_pool", "fp8_two_inputs", "fp8_chain", "fp8_quantise")
    ),
    _job("fp8_first", _FOLDED, 90, torch.bfloat16),
    _job("fp8_transpose", (16, 80), 90, torch.bfloat16),
    *(_job(op, _COMPOSED, 90) for op in ("composed", "composed_bias", "composed_odd")),
    _job("composed_odd", _COMPOSED_NARROW, 90),
    _job("contiguous_weight", _NARROW),
    *(_job("transpose", (16, 80), capability) for capability in (80, 90)),
    _job("transpose_contiguous", (16, 32)),
    *(_job("conv1x1", (20, 3, kind)) for kind in (None, "softmax")),
]


def test_every_kernel_that_is_counted_is_run() -> None:
    # Gluon has no interpreter: test_traffic_emulated.py has that kernel.
    kernels = {launch_of(job).kernel.fn.__name__ for job in JOBS}
    assert kernels == set(access_counts.COUNTS) - {"conv3x3_hopper_kernel"}


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job.op}-sm_{job.capability}-{job.shape}")
def test_traffic_is_what_the_kernel_accesses(job: Job) -> None:
    launch = launch_of(job)
    assert traffic_of(launch) == counted(with_memory(launch))


@pytest.mark.parametrize("capability", [80, 90])
def test_a_count_that_forgets_the_edges_is_caught(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether taps outside the image cost bytes, or the halo is left out, or the last tile's: the equality is exact."""
    launch = launch_of(_job("forward", _NARROW, capability))
    seen = counted(with_memory(launch))
    injected = {
        "taps outside the image are loaded": lambda size, tile=None: 3 * size,
        "there is no halo": lambda size, tile=None: size,
        "boxes are as gathers": lambda size, tile=None: 3 * size - 2,
    }
    wrong = []
    for mistake, rows in injected.items():
        monkeypatch.setattr(access_counts, "tap_rows", rows)
        if traffic_of(launch) != seen:
            wrong.append(mistake)
    assert wrong == [*injected][: 2 if capability == 80 else 3]
