"""The bodies of the GPU's tests, at sizes for the interpreter: each passes, and each can fail."""

from __future__ import annotations

import gpu_bodies
import pytest
import torch
from kernel_device import DEVICE, MARK

import fastunet
from fastunet import ops

pytestmark = MARK
SMALL = (3, 16, 8, 8)


@pytest.fixture(autouse=True)
def forced():
    with fastunet.backend("triton"):
        yield


@pytest.mark.parametrize("name", ["forward", "weight_grad", "statistics", "losses"])
def test_repeats(name: str) -> None:
    gpu_bodies.check_repeats(str(DEVICE), name, times=2, channels=16, side=8)


@pytest.mark.parametrize("name", gpu_bodies.FAR_ENDS)
def test_far_ends(name: str) -> None:
    gpu_bodies.FAR_ENDS[name](str(DEVICE), SMALL)


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("convolution", "conv3x3_bias_relu"),
        ("pooling", "max_pool2x2"),
        ("norm", "conv3x3_batch_norm_relu"),
        ("loss", "segmentation_sums"),
    ],
)
def test_a_far_end_that_is_off_is_caught(name: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(ops, op)

    def wraps_around(x, *args, **kwargs):
        """Of several images, the last one's values are the first one's, as with offsets that overflow."""
        if len(x) > 1:
            x = torch.cat([x[:-1], x[:1]])
        return right(x, *args, **kwargs)

    monkeypatch.setattr(ops, op, wraps_around)
    with pytest.raises(AssertionError):
        gpu_bodies.FAR_ENDS[name](str(DEVICE), SMALL)


def test_a_hash_sees_one_bit() -> None:
    a = torch.zeros(3, dtype=torch.bfloat16)
    b = a.clone()
    b[2] = -0.0
    assert gpu_bodies.hash_of((a,)) != gpu_bodies.hash_of((b,))
