"""What a person with a GPU runs: are the kernels right there, and how fast are they beside cuDNN?

    python -m benchmarks.gpu_report --out DIR [--minutes 9] [--size 512] [--batch 16]

Writes DIR/gpu_report.json (rows, environment, commit, summary) and DIR/gpu_report.md, anew after every step, and ends
within the given minutes: what there was no time for is named. In this order: every op in bfloat16 against float64; the
layers of UNet(3, 2), forward; the net's inference and training step; the layers, backward; every op in the other
formats; `pytest -m gpu`. Layers and nets are timed under the backends "triton" and "aten", which is cuDNN, eager and
channels_last with cudnn.benchmark on. `--device cpu` runs the same steps on a CPU, to see that they run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from fastunet.files import write_json, written_whole

from .environment import ROOT, environment
from .schedule import Budget, measure
from .steps import Row, Settings, Step, all_steps
from .tables import Report, render, summarise
from .worker import Worker

# Seconds kept for ending a process and writing the files, and the least that the tests are begun with.
_RESERVE, _LEAST_TESTS = 6.0, 30.0
_OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed")


def run_tests(device: str, seconds: float, folder: Path = ROOT / "tests") -> Row:
    """`pytest -m gpu` within `seconds`: "counts" by outcome, the names of what "failed", and a "reason" otherwise."""
    if device != "cuda":
        return {"reason": f"the device is {device}"}
    if not folder.is_dir() or importlib.util.find_spec("pytest") is None:
        return {"reason": "there is no tests folder" if not folder.is_dir() else "pytest is not installed"}
    if seconds < _LEAST_TESTS:
        return {"reason": "no time left"}
    command = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-p", "no:cacheprovider", "-m", "gpu", str(folder)]
    # A machine with a GPU may lack what the tests of training import.
    command.append("--continue-on-collection-errors")
    output, ended = run_for(command, seconds)
    return {**count_outcomes(output), "reason": "" if ended else f"Stopped after {seconds:.0f} s."}


def run_for(command: Sequence[str], seconds: float) -> tuple[str, bool]:
    """What a command prints within that time, and whether it ended by itself; else it goes with its children."""
    # To a file: a pipe would stay open as long as any child of it lives.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        try:
            process.wait(timeout=seconds)
            ended = True
        except subprocess.TimeoutExpired:
            ended = False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return output.read(), ended


def count_outcomes(output: str) -> Row:
    """Of `pytest -v`, also of one that was stopped: a line for each test."""
    found = re.findall(rf"^(\S+::.*?) ({'|'.join(_OUTCOMES).upper()})\b", output, re.MULTILINE)
    counts = Counter(outcome.lower() for _, outcome in found)
    failed = [name for name, outcome in found if outcome in ("FAILED", "ERROR")]
    return {"counts": {name: counts[name] for name in _OUTCOMES if counts[name]}, "failed": failed}


def write_report(out: Path, report: Report) -> None:
    """Both files, each whole or not at all."""
    report["summary"] = summarise(report["rows"])
    write_json(out / "gpu_report.json", report)
    with written_whole(out / "gpu_report.md") as temporary:
        temporary.write_text(render(report))


def make_report(settings: Settings, out: Path, minutes: float, steps: Sequence[Step] | None = None) -> Report:
    """Measure (by default all steps) and write DIR's two files; returns what the JSON holds."""
    budget = Budget(60 * minutes - _RESERVE)
    out.mkdir(parents=True, exist_ok=True)
    report: Report = {
        "summary": {},
        "environment": environment(settings.device),
        "settings": asdict(settings),
        "rows": [],
        "tests": {"reason": "the report has not come to them"},
    }

    def save(rows: list[Row]) -> None:
        report["rows"] = rows
        write_report(out, report)

    measure(settings, all_steps(settings) if steps is None else steps, Worker(settings), budget, save)
    report["tests"] = run_tests(settings.device, budget.left())
    write_report(out, report)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if something was measured and nothing was found wrong, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which the report has ended")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", type=int, default=512, help="side of the square images")
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("fastunet.kernels") is None:
        parser.error("fastunet is not installed: run `pip install --no-deps --no-build-isolation -e .` first")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --device cpu runs the same steps on the CPU")
    if options.minutes <= 0 or options.batch < 1 or options.size < 32:
        parser.error("expected --minutes above 0, --batch from 1 and --size from 32")
    settings = Settings(device=options.device, size=options.size, batch=options.batch)
    report = make_report(settings, options.out, options.minutes)
    print(f"{options.out / 'gpu_report.md'}\n{report['summary']}")
    wrong = [row for row in report["rows"] if row["status"] not in ("ok", "skipped")]
    is_empty = all(row["status"] == "skipped" for row in report["rows"])
    return 1 if wrong or is_empty or report["tests"].get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
