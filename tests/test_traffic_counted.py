"""The bytes that launches are said to move, against those that Triton's interpreter is seen to access."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastunet.benchmarks import access_counts
from fastunet.benchmarks.access_counts import traffic_of
from fastunet.benchmarks.jobs import Job, all_ops, launch_of
from fastunet.benchmarks.jobs.pointwise import LossShape
from fastunet.kernels.config import ConvShape
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
_TWO_OUT = ConvShape(16, 0, 40, *_SIDES, c_out2=40)
_WHOLE_TILES = ConvShape(32, 0, 80, 16, 16)
_LOSS = {"masked": True, "squared": False}


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
    *(_job("input_grad", shape, capability) for shape in (_PLAIN, _FOLDED) for capability in (80, 90)),
    *(_job("two_input_grads", _TWO_OUT, capability) for capability in (80, 90)),
    *(_job("masked_input_grad", _NARROW, capability) for capability in (80, 90)),
    *(_job(op, _WHOLE_TILES, c) for op in ("weight_grad", "bias_grad") for c in (80, 90)),
    _job("bias_grad", _NARROW, 90),
    _job("bias_grad", _FOLDED),
    _job("activation_grad", _NARROW),
    _job("unpool", _NARROW),
    _job("max_pool", 100),
    _job("merge_statistics", (40, False)),
    _job("finish_statistics", (40, False)),
    *(_job(op, (20, per_image)) for op in ("normalise", "norm_sums", "norm_grad") for per_image in (False, True)),
    *(_job("transpose", (16, 80), capability) for capability in (80, 90)),
    _job("transpose_contiguous", (16, 32)),
    _job("transpose_grad", (32, 16)),
    _job("transpose_weights", (16, 80)),
    *(_job(op, (20, 3, kind)) for op in ("conv1x1", "conv1x1_grad", "conv1x1_weights") for kind in (None, "softmax")),
    *(_job(op, (20, 3, "sigmoid")) for op in ("conv1x1_grad", "conv1x1_weights")),
    *(_job("sum_rows", outputs) for outputs in (1, 2)),
    *(
        _job(op, LossShape(3, softmax, indices, entropy=entropy, target=target, **_LOSS))
        for op in ("loss_sums", "loss_sums_grad")
        for softmax, indices, entropy, target in (
            (True, True, True, torch.int64),
            (False, False, True, torch.uint8),
            (False, False, False, torch.float32),
        )
    ),
]


def test_every_op_there_is_a_job_for_is_counted() -> None:
    # Gluon has no interpreter: test_traffic_emulated.py has those kernels.
    assert {job.op for job in JOBS} == {op for op in all_ops() if not op.startswith("halo")}


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job.op}-sm_{job.capability}-{job.shape}")
def test_traffic_is_what_the_kernel_accesses(job: Job) -> None:
    launch = launch_of(job)
    assert traffic_of(launch) == counted(with_memory(launch))


@pytest.mark.parametrize("capability", [80, 90])
def test_a_count_that_forgets_the_edges_is_caught(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether taps outside the image cost bytes, or the halo is left out, or the last tile's: the equality is exact."""
    launch = launch_of(_job("forward", _NARROW, capability))
    seen = counted(with_memory(launch))
    planted = {
        "taps outside the image are loaded": lambda size, tile=None: 3 * size,
        "there is no halo": lambda size, tile=None: size,
        "boxes are as gathers": lambda size, tile=None: 3 * size - 2,
    }
    wrong = []
    for mistake, rows in planted.items():
        monkeypatch.setattr(access_counts, "tap_rows", rows)
        if traffic_of(launch) != seen:
            wrong.append(mistake)
    assert wrong == [*planted][: 2 if capability == 80 else 3]
