"""Frozen nets that are dropped, and sizes of image that are forgotten, do not fill the memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from onednn_here import MARKS

import fastunet
from fastunet.inference import frozen

pytestmark = MARKS

# Bytes by which the process grows with each net that is frozen, used and dropped, and the bytes of a net's weights.
DROPPED = """
import resource, torch, fastunet
model, x = fastunet.UNet(1, 1, features=(64, 128, 256)).eval(), torch.rand(1, 1, 32, 32)
def use(times):
    for _ in range(times):
        fastunet.freeze(model)(x)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = use(8)
print((use(24) - before) // 24, sum(4 * p.numel() for p in model.parameters()))
"""


def test_a_dropped_net_leaves_no_weights() -> None:
    """TorchScript keeps what it traced, and oneDNN its code: 2 MB of it, without the weights."""
    found = subprocess.run([sys.executable, "-c", DROPPED], capture_output=True, text=True, check=True).stdout
    grown, weights = map(int, found.split())
    assert grown < weights / 2


def test_few_sizes_of_large_weights_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastunet.UNet(1, 1, features=(4, 8)).eval()
    monkeypatch.setattr(frozen, "_MOST_BYTES", 3 * 2 * 4 * sum(p.numel() for p in model.parameters()))
    net = fastunet.freeze(model)
    kept = []
    for size in range(16, 32, 2):
        net(torch.rand(1, 1, size, size))
        kept.append(len(net._nets))
    assert kept == [1, 2, 3, 1, 2, 3, 1, 2]
