"""The check of the kernels on a user's GPU: what its processes find, how long that is kept, what a hang leaves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, for the kernel's constants and descriptors")

from fastunet.kernels import autotune, gpu, self_test
from fastunet.kernels.conv3x3 import config, config_hopper, hopper
from fastunet.kernels.conv3x3.descriptor import conv3x3_weight_grad_descriptor_kernel
from fastunet.kernels.self_test import Verdict
from gluon_source import Edit, run

import fastunet
from fastunet import dispatch
from fastunet.testing import families, parity

HOPPER = gpu.known_target(90)
CPU = torch.device("cpu")


# What a process does, and what that is taken for.
PROGRAMS = {
    "right": ("print('begun')", Verdict("", True)),
    "wrong": ("print('begun\\n2 of 5 of y are wrong'); sys.exit(3)", Verdict("failed: 2 of 5 of y are wrong", True)),
    "does not compile": ("print('begun', flush=True); 1 / 0", Verdict("failed: ZeroDivisionError: ", True)),
    "crashes": ("print('begun', flush=True); os.abort()", Verdict("failed: the process was ended by signal 6", True)),
    "lacks memory": ("print('begun\\nout of memory'); sys.exit(4)", Verdict("without a verdict: out of memory", False)),
    "is killed": ("print('begun', flush=True); os.kill(os.getpid(), 9)", Verdict("ended by signal 9", False)),
    "gets no GPU": ("raise RuntimeError('the GPU is taken')", Verdict("RuntimeError: the GPU is taken", False)),
    "hangs": ("print('begun', flush=True); time.sleep(60)", Verdict("did not end within 5 s", False)),
}


def test_what_a_process_ends_with_is_a_verdict() -> None:
    """All at once, each told apart. What running out of time or memory says does not last."""
    commands = {name: [sys.executable, "-c", f"import os, sys, time; {text}"] for name, (text, _) in PROGRAMS.items()}
    found = self_test.run(commands, timeout=5.0)
    for name, (_, expected) in PROGRAMS.items():
        assert expected.failed in found[name].failed, name
        assert (found[name].lasts, found[name].failed == "") == (expected.lasts, name == "right"), name


def test_a_verdict_that_lasts_is_kept_for_other_processes(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    outcomes = {"conv1x1": Verdict("y is off", True), "max_pool2x2": Verdict("", True), "late": Verdict("late", False)}
    asked: list[list[str]] = []

    def fake(commands: dict[str, list[str]], timeout: float) -> dict[str, Verdict]:
        asked.extend([sorted(commands)] if commands else [])
        assert all(command[-2:] == ["cpu", str(os.getpid())] for command in commands.values())
        return {name: outcomes[name] for name in commands}

    monkeypatch.setattr(self_test, "run", fake)
    autotune._said.clear()
    for _ in range(2):  # Processes.
        for _ in range(2):
            found = self_test.check([*outcomes], "float32", CPU)
            assert found == {name: verdict.failed for name, verdict in outcomes.items()}
        autotune._tables.clear()
    assert asked == [sorted(outcomes), ["late"]]
    self_test.check(["max_pool2x2"], "bfloat16", CPU)
    assert asked[2:] == [["max_pool2x2"]], "of another dtype nothing is known"
    assert [str(each.message) for each in recwarn] == [
        "fastunet: conv1x1 in float32 does not run on Triton on interpreter: y is off",
        "fastunet: late in float32 does not run on Triton on interpreter: late",
    ]


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


def test_out_of_time_ends_what_the_check_has_started(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEPS!r}, {str(file)!r}])"
    self_test.run({"family": [sys.executable, "-c", program]}, timeout=5.0)
    assert ends(pid_in(file))


def test_a_check_dies_with_the_process_that_asked(tmp_path: Path) -> None:
    """By kill -9, say of a job's time limit."""
    file = tmp_path / "pid"
    (tmp_path / "sleeping.py").write_text(
        f"def check(*_):\n    import sys\n    sys.argv[1:] = [{str(file)!r}]\n    {SLEEPS}"
    )
    asks = f"""
import os, sys
sys.path.insert(0, {str(tmp_path)!r})
from fastunet.kernels import self_test
child = "from fastunet.kernels import self_test; self_test.CHECK = 'sleeping:check'; self_test.main(sys.argv[1:])"
self_test.run({{"f": [sys.executable, "-c", "import sys; " + child, "f", "float32", "cpu", str(os.getpid())]}}, 60.0)
"""
    with subprocess.Popen([sys.executable, "-c", asks]) as process:
        pid = pid_in(file)
        os.kill(process.pid, signal.SIGKILL)
    assert ends(pid)


def test_the_command_that_is_run_is_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an op that needs no kernel on the CPU, from this process to the check's end."""
    monkeypatch.setenv("FASTUNET_BACKEND", "aten")
    assert self_test.check(["none"], "float32", CPU) == {"none": ""}


# --- the halo variant's ---


def test_the_halo_variant_wants_sm_90_and_a_known_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    target = HOPPER
    monkeypatch.setattr(gpu, "target", lambda _: target)
    monkeypatch.setattr(self_test, "check", lambda names, dtype, device: {names[0]: f"failed in {dtype} on {device}"})

    def reason(dtype: torch.dtype = torch.bfloat16) -> str:
        config_hopper.unsupported_reason.cache_clear()
        return config_hopper.unsupported_reason(torch.device("cuda", 3), dtype) or ""

    assert reason() == "the halo variant: failed in bfloat16 on cuda:3"
    assert re.search("16 bits on sm_90, not torch.float32 on sm_90", reason(torch.float32))
    monkeypatch.setattr("triton.__version__", "3.9.1")
    assert reason() == "the halo variant is written for Triton 3.6 and 3.7, not 3.9"
    target = gpu.known_target(100)
    assert re.search("not torch.bfloat16 on sm_100", reason())
    config_hopper.unsupported_reason.cache_clear()


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gpu, "target", lambda _: HOPPER)
    monkeypatch.setattr(dispatch, "triton_unsupported", lambda *_: None)
    config_hopper.unsupported_reason.cache_clear()
    yield
    config_hopper.unsupported_reason.cache_clear()


@pytest.mark.usefixtures("on_hopper")
def test_its_check_compiles_five_kernels_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[gpu.Launch] = []
    monkeypatch.setattr(gpu.Launch, "run", lambda launch, _: launches.append(launch))
    monkeypatch.setattr(parity, "compare", lambda *_: None)
    monkeypatch.setattr(families, "assert_within", lambda *_: None)
    families.check_family(families.HALO, "bfloat16", CPU)
    # In training, other kernels merge the statistics and normalise.
    launches = [launch for launch in launches if launch.kernel is hopper.conv3x3_hopper_kernel]
    kinds = {str({k: v for k, v in each.arguments.items() if k.isupper()} | each.options) for each in launches}
    assert len(launches) == 2 * len(kinds) == 10
    assert {launch.arguments["CLASSES"] for launch in launches} == {0, 2}
    assert all(sum(launch.arguments[flag] for launch in launches) == 2 for flag in ("STATISTICS", "MASK"))
    assert all(launch.arguments["tiles"] > HOPPER.multiprocessors for launch in launches)
    assert all(config_hopper.shared_memory(c) + 512 <= HOPPER.shared_memory for c in config_hopper.checked_configs())


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("family", [*dispatch.WINOGRAD_OPS, *dispatch.STRIDED_OPS])
def test_a_convolutions_check_runs_the_gradients_of_large_images(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole runs of pixels, and by stride 1 two gradients by one program."""
    launches: list[gpu.Launch] = []
    monkeypatch.setattr(gpu.Launch, "run", lambda launch, _: launches.append(launch))
    monkeypatch.setattr(parity, "compare", lambda *_: None)
    monkeypatch.setattr(families, "assert_within", lambda *_: None)
    families.check_family(family, "bfloat16", CPU)
    stride = 2 if family in dispatch.STRIDED_OPS else 1
    weight_grads = [each for each in launches if each.kernel is conv3x3_weight_grad_descriptor_kernel]
    assert {each.arguments["STRIDE"] for each in weight_grads} == {stride}
    assert any(each.arguments.get("JOINED") for each in launches) == (stride == 1)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("edits", "seen"),
    [
        ([], ""),
        ([("k - C1, full", "k, full")], "concat_conv3x3_batch_norm_relu: y: "),  # Of the second input.
        ([("y <= 0.0, 0.0, g", "y < 0.0, 0.0, g")], "elements are outside the tolerance"),  # Of the mask.
    ],
)
def test_its_check_tells_right_from_wrong(edits: list[Edit], seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the model, whose results are rounded as the hardware's are."""

    def emulate(launch: gpu.Launch, _: torch.device) -> None:
        memory = run(launch, 1, edits)
        for name in ("y_desc", "pooled_desc", "head_ptr"):
            t = getattr(launch.arguments[name], "base", launch.arguments[name])
            if memory.is_written(t):
                t.copy_(memory.result(t))

    monkeypatch.setattr(gpu.Launch, "run", emulate)
    chosen = config.ConvConfig(16, 8, 128, 64, 4, 2, config.HALO, weight_stages=2)
    sees = pytest.raises(AssertionError, match=seen) if edits else nullcontext()
    with fastunet.backend("triton"), sees:
        families.check_halo(torch.float16, CPU, (1, 64, 9, 17, 128), [chosen])
