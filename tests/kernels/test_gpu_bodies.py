"""What the GPU's tests repeat, at sizes for the interpreter, and that a bit's difference shows."""

from __future__ import annotations

import gpu_bodies
import pytest
import torch
from kernel_device import DEVICE, MARK

import fastunet

pytestmark = MARK


@pytest.fixture(autouse=True)
def forced():
    with fastunet.backend("triton"):
        yield


@pytest.mark.parametrize("name", ["forward", "weight_grad", "statistics", "losses"])
def test_repeats(name: str) -> None:
    gpu_bodies.check_repeats(str(DEVICE), name, times=2, channels=16, side=8)


def test_a_hash_sees_one_bit() -> None:
    a = torch.zeros(3, dtype=torch.bfloat16)
    b = a.clone()
    b[2] = -0.0
    assert gpu_bodies.hash_of((a,)) != gpu_bodies.hash_of((b,))
