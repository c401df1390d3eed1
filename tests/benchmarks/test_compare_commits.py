"""The comparison of two commits: whose files each side runs, and what it says of a slow, a wrong and an old one."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from fastunet.benchmarks import compare_commits
from fastunet.benchmarks.cases import Settings
from fastunet.benchmarks.gpu_steps import Step
from fastunet.benchmarks.harness.worker import Spawned

from fastunet.checks import ConfigError
from fastunet.testing import cpu_accumulates_in_float32

ROOT = Path(__file__).parents[2]
TINY = Settings(device="cpu", size=16, batch=2, features=(4, 8), rounds=3)
CONVOLUTION = "fastunet/ops/conv3x3.py"
CALL = "    y, pooled, raw, mean, invstd = _op.invoke(args)\n"
UPSAMPLING = "fastunet/ops/conv_transpose2x2.py"
UP_CALL = "    return _op.invoke(UpArgs(x, weight, bias))\n"


def git(repository: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", "-C", str(repository), *who, *arguments], check=True, capture_output=True, text=True
    ).stdout


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree's sources, in a repository of their own; the tag "bad" has a wrong convolution and slow upsampling."""
    root = tmp_path_factory.mktemp("repository")
    for folder in ("fastunet", "kernels", "benchmarks"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    git(root, "init", "--quiet")
    (root / ".gitignore").write_text("__pycache__\n")
    replaced(root / CONVOLUTION, CALL, CALL + "    y = 1.5 * y\n")
    replaced(root / UPSAMPLING, UP_CALL, "    import time\n\n    time.sleep(0.05)\n" + UP_CALL)
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "bad")
    git(root, "tag", "bad")
    for file in (CONVOLUTION, UPSAMPLING):
        shutil.copy(ROOT / file, root / file)
    git(root, "commit", "--quiet", "--all", "--message", "good")
    return root


def run(repository: Path, base: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = ["--device", "cpu", "--size", "16", "--batch", "2", "--features", "4", "8", "--rounds", "3"]
    command = [sys.executable, "-m", "benchmarks", "compare-commits", "--base", base, *settings, *arguments]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)


def files(_: Settings, request: str) -> dict[str, str]:
    """Where each module of fastunet lies that a side has imported, after its answer."""
    compare_commits.answer(TINY, Step("net", request))
    found = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    return {name: str(Path(file).resolve()) for name, file in found.items() if file and name.startswith("fastunet")}


def test_each_side_imports_its_own_tree(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fastunet is installed from a third tree here, this one."""
    monkeypatch.setattr(compare_commits, "ROOT", repository)
    with compare_commits.package_of("bad") as package, Spawned(files, TINY, path=package) as base:
        found = base.ask("inference", 100)
        for name, file in found.items():
            measured = name.startswith(("fastunet.testing", "fastunet.benchmarks"))
            assert Path(file).is_relative_to(repository if measured else package / "tree"), name
        assert "y = 1.5 * y" in (package / CONVOLUTION).read_text()
    assert {"fastunet", "fastunet.ops.conv3x3", "fastunet.kernels.autotune", "fastunet.testing.parity"} <= set(found)
    assert not package.exists()


@pytest.mark.slow
@pytest.mark.skipif(
    not cpu_accumulates_in_float32(torch.bfloat16), reason="this processor sums products of bfloat16 in bfloat16"
)
def test_what_is_wrong_is_named_and_has_no_speed_and_what_is_slow_is_seen(repository: Path, tmp_path: Path) -> None:
    done = run(repository, "bad", "--only", "inc.c1", "up1.up", "inference", "--out", str(tmp_path / "rows.json"))
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    parity = [line for line in lines if line.startswith("parity")]
    assert parity
    assert all("PARITY FAILED in base: " in line and "conv3x3" in line for line in parity), done.stdout
    assert not any("ms" in line for line in lines if line.startswith(("net inference", "layer inc.c1")))
    assert sum("base/new" in line for line in lines) == 2, "upsampling is right"
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    forward, backward = (row for row in rows if row["name"] == "up1.up")
    assert forward["ratios"]["base"]["ratio"] > 1.5, "its base sleeps 0.05 s in each forward pass"
    assert forward["times_ms"]["base"]["median"] > 50
    assert (backward["status"], backward["ratios"]["base"]["rounds"]) == ("ok", 3)
    assert run(repository, "HEAD", "--only", "up1.up").returncode == 0


def test_an_unknown_commit_is_named(repository: Path) -> None:
    done = run(repository, "nowhere")
    assert (done.returncode, "nowhere and the working tree cannot be compared: git" in done.stderr) == (2, True)


def test_a_stopped_comparison_leaves_nothing(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "compare-commits", "--base", "HEAD", "--device", "cpu"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, cwd=repository, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 100
        while not any(tmp_path.glob("fastunet-compare-*/fastunet/kernels")):
            assert time.monotonic() < deadline, "it has not begun"
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=100) == 143
    finally:
        process.kill()
        process.wait()
    assert not [*tmp_path.glob("fastunet-compare-*")]


def test_a_signal_while_a_process_starts_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(process: BaseProcess) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(BaseProcess, "start", start)
    with pytest.raises(SystemExit, match="143"), Spawned(abs) as worker:
        worker.ask(-1, 1.0)


def compared(seconds: dict[str, list[float]], status: str = "ok") -> tuple[dict, list[str]]:
    """A row of two sides whose rounds take what is given, of which the new one has the status; and whose turns came."""
    log: list[str] = []

    def ask(label: str, step: Step | None, timeout: float) -> Any:
        if step is not None:
            return {"name": "inference", "status": status if label == "new" else "ok", "reason": "y is off"}
        log.append(label)
        return seconds[label].pop(0)

    sides = {label: functools.partial(ask, label) for label in ("base", "new")}
    return compare_commits.compare(Step("net", "inference"), sides, TINY), log


def test_rounds_alternate_and_their_ratios_count() -> None:
    row, log = compared({"base": [2.0, 9.0, 4.0], "new": [1.0, 3.0, 4.0]})
    assert log == ["base", "new", "new", "base", "base", "new"]
    assert row["ratios"] == {"base": {"ratio": 2.0, "p10": pytest.approx(1.2), "p90": pytest.approx(2.8), "rounds": 3}}
    assert row["times_ms"]["base"]["median"] == 4000


def test_a_side_that_is_off_is_not_timed() -> None:
    row, log = compared({}, "parity failed")
    assert (row["status"], row["reason"], log) == ("parity failed", "in new: y is off", [])
    assert "ratios" not in row


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"inc\.c1.*got \{'inc\.c9'\}"):
        compare_commits.steps_to_compare(TINY, ["inc.c9"])
