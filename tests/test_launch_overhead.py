"""What the host takes for a launch: measured in a process of its own, on a driver that runs nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="times Triton's launches")


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    command = [sys.executable, "-m", "benchmarks.launch_overhead", "--features", "16", "32", "--size", "16"]
    done = subprocess.run([*command, "--rounds", "5", "--out", str(out)], capture_output=True, text=True, timeout=300)
    if "no C compiler" in done.stderr:
        pytest.skip("the stand-in for a driver is compiled: no C compiler")
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    # Six blocks and the step up; the head is in the last.
    assert {*map(result["launches"].get, ("inference, repeated", "inference, anew", "inference, planned"))} == {7}
    assert result["launches"]["training step, repeated"] == result["launches"]["training step, anew"] > 100
    assert set(result["summary"]) == set(result["launches"])
    assert all(name in done.stdout for name in result["summary"])
    assert all(of["median"] > 0 for of in result["summary"].values())
