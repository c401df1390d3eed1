"""Where the halo variant may run, and its self-test: what is a verdict, how long it is kept, and what a hang leaves."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, for the kernel's constants and descriptors")

from fastunet.kernels import gpu
from fastunet.kernels.conv3x3 import config, config_hopper, hopper, hopper_epilogue, hopper_self_test
from gluon_source import run, weave

HOPPER = gpu.known_target(90)


def test_the_variant_wants_sm_90_and_a_known_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    target = HOPPER
    monkeypatch.setattr(gpu, "target", lambda _: target)
    monkeypatch.setattr(hopper_self_test, "verdict", lambda _, key, index: f"{key} on GPU {index}")

    def reason() -> str:
        hopper_self_test.unsupported_reason.cache_clear()
        return hopper_self_test.unsupported_reason(torch.device("cuda", 3)) or ""

    assert re.fullmatch(r"sm_90, driver \d+, triton .*, source \w{16} on GPU 3", reason())
    monkeypatch.setattr(hopper_self_test.triton, "__version__", "3.9.1")
    assert reason() == "the halo variant is written for Triton 3.6 and 3.7, not 3.9"
    target = gpu.known_target(100)
    assert reason() == "the halo variant is for sm_90, not sm_100"
    hopper_self_test.unsupported_reason.cache_clear()


@pytest.mark.parametrize("driver", [0, 13000])
def test_a_verdict_is_kept_by_the_driver(driver: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By CUDA's public interface alone: torch's own way to ask is not in every release."""

    def load(_: str) -> SimpleNamespace:
        def get(version: Any) -> None:
            ctypes.cast(version, ctypes.POINTER(ctypes.c_int))[0] = driver

        if not driver:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return SimpleNamespace(cuDriverGetVersion=get)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert hopper_self_test.identity("H100").startswith(f"H100, driver {driver}, triton ")


def test_a_verdict_is_kept_by_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[str | None] = ["wrong", None]
    monkeypatch.setattr(hopper_self_test, "run", lambda _: outcomes.pop(0))
    cache = tmp_path / "new" / "verdicts.json"
    found = [hopper_self_test.verdict(cache, key, 0) for key in ("a", "a", "b", "b", "a")]
    assert found == ["wrong", "wrong", None, None, "wrong"]
    for damaged in ("{broken", "[1]", "7"):
        cache.write_text(damaged)
        outcomes.append("tested again")
        assert hopper_self_test.verdict(cache, "a", 0) == "tested again"
    assert not list(cache.parent.glob("tmp*"))


FAILS = "import sys; print('2 of 5 of y are wrong'); sys.exit(3)"
SELF_TESTS: dict[str, tuple[str, str | None, bool]] = {  # Their program, what is said, and whether that is a verdict.
    "passes": ("pass", None, True),
    "fails": (FAILS, "the halo variant failed its self-test on this GPU: 2 of 5 of y are wrong", True),
    "crashes": ("import os; os.abort()", "ended without a verdict on this GPU: exit code -6", False),
    "lacks memory": ("raise MemoryError('CUDA')", "ended without a verdict on this GPU: MemoryError: CUDA", False),
    "hangs": ("import time; time.sleep(60)", "did not end its self-test within 1 s on this GPU", False),
}


@pytest.mark.parametrize("name", SELF_TESTS)
def test_only_results_are_a_verdict(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What else ends a self-test holds for this process; the next one tests again."""
    program, said, is_verdict = SELF_TESTS[name]
    started, run = [], hopper_self_test.run

    def run_program(index: int) -> str | None:
        started.append(index)
        return run(index, [sys.executable, "-c", program], timeout=1.0 if name == "hangs" else 60.0)

    monkeypatch.setattr(hopper_self_test, "run", run_program)
    monkeypatch.setattr(gpu, "target", lambda _: HOPPER)
    monkeypatch.setattr(hopper_self_test.triton.knobs.cache, "dir", str(tmp_path))
    for _ in range(2):  # Processes.
        hopper_self_test.unsupported_reason.cache_clear()
        for _ in range(2):
            found = hopper_self_test.unsupported_reason(torch.device("cuda", 1))
            assert found == said or (said is not None and said in (found or ""))
    hopper_self_test.unsupported_reason.cache_clear()
    assert started == ([1] if is_verdict else [1, 1])


def ends(pid: int) -> bool:
    """Whether the process is gone within ten seconds, or dead and not yet waited for."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


SLEEPS = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"


def pid_in(file: Path) -> int:
    """What a process writes there within a minute."""
    for _ in range(600):
        if file.exists() and file.read_text():
            return int(file.read_text())
        time.sleep(0.1)
    pytest.fail(f"nothing wrote {file.name}")


def test_out_of_time_ends_what_the_self_test_has_started(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEPS!r}, {str(file)!r}])"
    with pytest.raises(hopper_self_test.NoVerdict, match="within 5 s"):
        hopper_self_test.run(0, [sys.executable, "-c", program], timeout=5.0)
    assert ends(pid_in(file))


def test_a_self_test_dies_with_the_process_that_asked(tmp_path: Path) -> None:
    """By kill -9, say of a job's time limit."""
    file = tmp_path / "pid"
    child = f"""
import sys
from fastunet.kernels.conv3x3 import hopper_self_test
hopper_self_test.check = lambda *_: exec({SLEEPS!r})
parent, sys.argv[1:] = sys.argv[1], [{str(file)!r}]
hopper_self_test.main(["0", parent])
"""
    asks = f"""
import os, sys
from fastunet.kernels.conv3x3 import hopper_self_test
hopper_self_test.run(0, [sys.executable, "-c", {child!r}, str(os.getpid())])
"""
    with subprocess.Popen([sys.executable, "-c", asks]) as process:
        pid = pid_in(file)
        os.kill(process.pid, signal.SIGKILL)
    assert ends(pid)


def test_the_self_test_compiles_four_kernels_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[gpu.Launch] = []
    monkeypatch.setattr(gpu.Launch, "run", lambda launch, _: launches.append(launch))
    for problem in hopper_self_test.PROBLEMS:
        with pytest.raises(AssertionError, match="of y are wrong"):
            hopper_self_test.check(problem, torch.device("cpu"))
        assert config_hopper.shared_memory(problem.chosen) + 512 <= HOPPER.shared_memory
    assert len(launches) == 4
    assert {launch.arguments["CLASSES"] for launch in launches} == {0, 2}
    assert all(launch.arguments["tiles"] > HOPPER.multiprocessors for launch in launches)


@pytest.mark.parametrize("is_right", [True, False])
def test_the_self_test_tells_right_from_wrong(is_right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the model, whose results are rounded as the hardware's are."""
    modules = (hopper_epilogue, hopper)
    code = None if is_right else weave(modules, [("k - C1, full", "k, full")])  # Of the second input.

    def emulate(launch: gpu.Launch, _: torch.device) -> None:
        memory = run(modules, launch, 1, code)
        for name in ("y_desc", "pooled_desc", "head_ptr"):
            t = getattr(launch.arguments[name], "base", launch.arguments[name])
            if memory.is_written(t):
                t.copy_(memory.result(t))

    monkeypatch.setattr(gpu.Launch, "run", emulate)
    chosen = config.ConvConfig(16, 8, 128, 64, 4, 2, config.HALO, weight_stages=2, swapped=True)
    problem = hopper_self_test.Problem((2, 9, 17, 64, 64, 128), chosen, torch.float16)
    with nullcontext() if is_right else pytest.raises(AssertionError, match=r"of y are wrong"):
        hopper_self_test.check(problem, torch.device("cpu"))
