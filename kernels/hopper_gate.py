"""Where the kernels written in Gluon may run: on sm_90, with a Triton they are written for, and once they have given
right results on this very GPU.

What they rest on is private to Triton, and they synchronise by hand: a wrong barrier hangs. So the check runs in a
process of its own with a time limit, when such a kernel is first asked for. Its outcome is kept in Triton's cache, by
GPU, driver, Triton and source.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from fastunet.kernels import gpu

# Seconds for starting Python, compiling a dozen kernels, and running them.
TIMEOUT = 240.0
_SOURCES = ("conv3x3_hopper.py", "hopper_epilogue.py", "hopper_check.py")


@functools.cache
def obstacle(device: torch.device) -> str | None:
    """Why the halo variant may not run on a device, None where it may."""
    target = gpu.target(device)
    if target.capability != 90:
        return f"the halo variant is for sm_90, not {target.name}"
    version = gpu.unknown_triton()
    if version is not None:
        return f"the halo variant is written for Triton {' and '.join(gpu.TRITON_VERSIONS)}, not {version}"
    index = torch.cuda.current_device() if device.index is None else device.index
    return checked(cache_file(), identity(target.name), index)


def identity(name: str) -> str:
    """What an outcome holds for: the GPU's name, the driver, Triton, and the kernels' source."""
    here = Path(__file__).parent
    source = hashlib.sha256(b"".join((here / file).read_bytes() for file in _SOURCES)).hexdigest()[:16]
    driver = torch._C._cuda_getDriverVersion() if torch.cuda.is_available() else 0  # type: ignore[attr-defined]
    return f"{name}, driver {driver}, triton {triton.__version__}, torch {torch.__version__}, source {source}"


def cache_file() -> Path:
    """Where outcomes are kept."""
    return Path(triton.knobs.cache.dir) / "fastunet_hopper.json"


def checked(cache: Path, key: str, index: int) -> str | None:
    """The outcome of the check by that key, which runs where the cache has none: what is wrong, or None."""
    try:
        outcomes = json.loads(cache.read_text())
    except (OSError, ValueError):
        outcomes = {}
    if key not in outcomes:
        outcomes[key] = run_check(index)
        _write(cache, outcomes)
    return outcomes[key]


def run_check(index: int, command: list[str] | None = None, timeout: float = TIMEOUT) -> str | None:
    """What is wrong on the GPU of that number, or None. command: what checks, by default ours."""
    command = command or [sys.executable, "-m", "fastunet.kernels.hopper_check", str(index)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"the halo variant did not end its check within {timeout:.0f} s on this GPU"
    if done.returncode == 0:
        return None
    last = (done.stderr or done.stdout).strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return f"the halo variant failed its check on this GPU: {last[0][:200]}"


def _write(cache: Path, outcomes: dict[str, str | None]) -> None:
    """Whole or not at all; without a place to write, the check runs again next time."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache.parent, delete=False) as file:
            json.dump(outcomes, file, indent=1)
        os.replace(file.name, cache)
    except OSError:
        pass
