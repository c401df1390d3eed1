"""What figures depend on: hardware, driver, versions, commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def environment(device: str) -> dict[str, Any]:
    """Of this machine and tree; None for what cannot be found out."""
    changes = _git("status", "--porcelain")
    found = {
        "device": _cpu(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else changes != "",
    }
    return found | (_gpu() if device == "cuda" else {})


def _cpu() -> str:
    """The processor's name where Linux tells it, else its kind."""
    named = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.max.sm,power.limit,temperature.gpu"
    state = _output(["nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader"])
    values = state.splitlines()[0].split(", ") if state else [None] * 4
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cudnn": torch.backends.cudnn.version(),
        **dict(zip(("driver", "max_clock", "power_limit", "temperature"), values, strict=False)),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    return _output(["git", "-C", str(ROOT), *arguments])


def _output(command: Sequence[str]) -> str | None:
    """What it prints, or None where it is absent, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
