"""Whether kernels come out right on this GPU, found by processes that may crash or hang without taking ours along.

Each family of kernels has a process, which compares it with float64 on small images; it dies with the process that
asks. What it finds is put into the table of this environment (`autotune`), but for running out of time or memory,
which holds for this process alone: the next one checks again.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from fastunet.kernels import autotune, gpu

# Seconds for starting Python, compiling a family's kernels, and running them.
TIMEOUT = 120.0
# The function of a family, a dtype and a device that raises AssertionError where results are wrong. By its name,
# because it stands above this package.
CHECK = "fastunet.testing.families:check_family"
# What a process prints once it can run kernels. What ends it before, such as a GPU that is taken or no C compiler, says
# nothing of them.
_BEGUN = "begun"
_WRONG, _NO_MEMORY = 3, 4  # Exit codes. Python's own are lower.
_PR_SET_PDEATHSIG = 1


class Verdict(NamedTuple):
    """What is wrong, "" if nothing, and whether it would be the same again."""

    failed: str
    lasts: bool


def check(families: Sequence[str], dtype: str, device: torch.device, timeout: float = TIMEOUT) -> dict[str, str]:
    """Return by family what is wrong with it in that dtype on the device, "" if nothing; those without a verdict yet
    are checked, all at once.
    """
    name = gpu.target(device).name
    where = f"cuda:{torch.cuda.current_device()}" if str(device) == "cuda" else str(device)
    missing = [family for family in families if "failed" not in autotune.look_up(name, family, dtype, {})]
    program = [sys.executable, "-m", "fastunet.kernels.self_test"]
    commands = {family: [*program, family, dtype, where, str(os.getpid())] for family in missing}
    for family, verdict in run(commands, timeout).items():
        row = {"op": family, "dtype": dtype, "shape": {}, "failed": verdict.failed}
        autotune.put(name, [row], keep=verdict.lasts)
        if verdict.failed:
            autotune.warn_once(f"{family} in {dtype} does not run on Triton on {name}: {verdict.failed}")
    return {family: autotune.look_up(name, family, dtype, {})["failed"] for family in families}


def run(commands: Mapping[str, Sequence[str]], timeout: float) -> dict[str, Verdict]:
    """Run the commands, some at a time, and return their verdicts; `timeout` seconds for each."""
    waiting, running = dict(commands), dict[str, tuple[subprocess.Popen, Any, float]]()
    found: dict[str, Verdict] = {}
    environment = {**os.environ, "FASTUNET_TUNE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        while waiting or running:
            while waiting and len(running) < max(1, (os.cpu_count() or 1) // 2):
                family = next(iter(waiting))
                output = tempfile.TemporaryFile("w+")
                child = subprocess.Popen(
                    waiting.pop(family), stdout=output, stderr=output, env=environment, start_new_session=True
                )
                running[family] = child, output, time.monotonic() + timeout
            for family, (child, output, end) in [*running.items()]:
                if child.poll() is not None:
                    output.seek(0)
                    found[family] = _verdict(child.returncode, output.read().strip().splitlines())
                elif time.monotonic() > end:
                    found[family] = Verdict(f"its check did not end within {timeout:.0f} s", lasts=False)
                else:
                    continue
                _end(child)
                output.close()
                del running[family]
            time.sleep(0.02)
    finally:  # Ctrl-C does not reach them.
        for child, output, _ in running.values():
            _end(child)
            output.close()
    return found


def _verdict(code: int, lines: list[str]) -> Verdict:
    if code == 0:
        return Verdict("", lasts=True)
    has_begun = _BEGUN in lines
    last = next((line for line in reversed(lines) if line != _BEGUN), f"exit code {code}")[:200]
    if code < 0:
        last = f"the process was ended by signal {-code}"
    # The system ends with SIGKILL whoever takes too much memory.
    lasts = has_begun and code not in (_NO_MEMORY, -signal.SIGKILL)
    return Verdict(f"its check {'failed' if lasts else 'ended without a verdict'}: {last}", lasts)


def _end(child: subprocess.Popen) -> None:
    """End a process, if it has not ended, with the compilers it has started."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


# --- the process ---


def die_with(parent: int) -> None:
    """Have Linux kill this process when that parent of it dies, or end it where it has died already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the process that asked for the check has died")


def main(arguments: Sequence[str]) -> int:
    """Check a family in a dtype on a device, for the process of that id: 0 where all results are right."""
    family, dtype, name, parent = arguments
    die_with(int(parent))
    module, _, function = CHECK.partition(":")
    check_family, device = getattr(importlib.import_module(module), function), torch.device(name)
    torch.zeros(1, device=device).item()
    if device.type == "cuda":
        import triton

        triton.runtime.driver.active.get_current_device()  # For which Triton needs a C compiler.
    print(_BEGUN, flush=True)
    try:
        check_family(family, dtype, device)
    except AssertionError as error:
        print(error)
        return _WRONG
    except torch.OutOfMemoryError as error:
        print(error)
        return _NO_MEMORY
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
