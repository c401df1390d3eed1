"""Freed memory is kept, and asked of the system no second time."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Pages that five rounds of four blocks ask for, once each block has found its place.
ROUNDS = """
import resource, sys
import torch
from fastunet.cpu.memory import keep_freed_memory
if int(sys.argv[1]):
    keep_freed_memory(int(sys.argv[1]))
    keep_freed_memory(1 << 16)
def use():
    blocks = [torch.zeros(10 << 20) for _ in range(4)]
for _ in range(5):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_of(block: int, **environment: str) -> int:
    run = [sys.executable, "-c", ROUNDS, str(block)]
    return int(subprocess.run(run, env=os.environ | environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the parameters are glibc's")
def test_freed_memory_is_kept() -> None:
    """Blocks of 40 MB, more than glibc comes to keep by itself; a smaller value asked for later lowers nothing."""
    assert pages_of(0) > 1000
    assert pages_of(1 << 30) < 100
    assert pages_of(1 << 30, MALLOC_TRIM_THRESHOLD_="100000") > 1000
