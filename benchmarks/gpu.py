"""What a person with a GPU runs: are the kernels right there, and how fast are they beside cuDNN and torch.compile?

    python -m benchmarks gpu --out DIR [--minutes 9] [--size 512] [--batch 16] [--tuned]

Writes into DIR, anew after every step: gpu_report.json (rows, environment, commit, summary), gpu_report.md,
roofline.png, and the table of measured configurations, <gpu>.json, which `--tuned` puts into kernels/tuned/ at once. It
ends within the given minutes: what there was no time for is named. In this order: every op in bfloat16 against float64;
the GPU's roofs; the layers of UNet(3, 2), forward; the net's inference and training step; the layers, backward;
the nets beside torch.compile; every op in the other formats; the layers beside torch.compile; `pytest -m gpu`; the
search for configurations (the command tune has more time for it). The first implementation is ours: the Triton kernels,
where they run. `--device cpu` runs the same steps on a CPU, to see that they run.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from fastunet import dispatch
from fastunet.files import write_json, written_whole

from .cases import DTYPE, Layer, Settings
from .gpu_steps import Step, Worker, all_steps, run_steps
from .gpu_tables import Report, render, summarise
from .harness.environment import ROOT, environment
from .harness.worker import Budget
from .results import Row, times_ms
from .roofline import Roofs, floor_seconds, points_of_report

# Seconds kept for ending a process and writing the files, and the least that the tests are begun with.
_RESERVE, _LEAST_TESTS = 6.0, 30.0
# What is left after this many of the tests' seconds goes to the search for configurations.
_MOST_TESTS = 120.0
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
    """JSON and Markdown, each whole or not at all."""
    add_floors(report["rows"])
    report["summary"] = summarise(report["rows"])
    write_json(out / "gpu_report.json", report)
    with written_whole(out / "gpu_report.md") as temporary:
        temporary.write_text(render(report))


def add_floors(rows: Sequence[Row]) -> None:
    """To the rows of forward times, where the roofs were measured: "floor_ms", and the share of it that is "of_floor".

    The roof of matmul is the burst's: no share is flattered by a GPU that was hot when the roof was measured.
    """
    roofs = roofs_of(rows)
    if roofs is None:
        return
    floors = {}
    for row in rows:
        if row["kind"] == "layer" and row["variant"] != "backward":
            shapes = {name: tuple(shape) for name, shape in row["shapes"].items()}
            floors[row["name"]] = floor_seconds(Layer(row["name"], row["op"], shapes, row["flops"]), roofs)
            _add_floor(row, floors[row["name"]])
    for row in rows:
        if row["kind"] == "net" and row["name"] == "inference":
            _add_floor(row, sum(floors.values()))


def _add_floor(row: Row, seconds: float) -> None:
    row["floor_ms"] = 1e3 * seconds
    if times := times_ms(row):
        row["of_floor"] = row["floor_ms"] / next(iter(times.values())).median


def roofs_of(rows: Sequence[Row]) -> Roofs | None:
    """The measured roofs, if there are any yet."""
    row = next((row for row in rows if row["kind"] == "roofs" and row["status"] == "ok"), None)
    if row is None:
        return None
    l2 = row["l2"]["gb_per_s"]
    return Roofs(
        matmul_flops=1e12 * row["matmul"]["burst_tflops"],
        copy_bytes=1e9 * row["copy"]["gb_per_s"],
        l2_bytes=None if l2 is None else 1e9 * l2,
        source="measured in the same run",
    )


def draw_roofline(out: Path, report: Report) -> str:
    """Write roofline.png; why not, where it cannot be."""
    roofs, points = roofs_of(report["rows"]), []
    if roofs is not None:
        points = points_of_report(report, roofs)
    if roofs is None or not points:
        return "no roofs, or no layer, were measured"
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed"
    from .charts import plot_roofline

    plot_roofline(points, roofs, out / "roofline.png")
    return ""


def make_report(
    settings: Settings, out: Path, minutes: float, steps: Sequence[Step] | None = None, tuned: Path | None = None
) -> Report:
    """Measure (by default all steps) and write DIR's files; returns what the JSON holds.

    tuned: the folder of the table of measured configurations, by default DIR.
    """
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

    measured = run_steps(settings, all_steps(settings) if steps is None else steps, Worker(settings), budget, save)
    report["roofline"] = draw_roofline(out, report)
    report["tests"] = run_tests(settings.device, min(budget.left(), _MOST_TESTS))
    write_report(out, report)
    if steps is None and dispatch.triton_unsupported(torch.device(settings.device), DTYPE) is None:
        _search(settings, budget, tuned or out, lambda rows: save([*measured, *rows]))
    return report


def _search(settings: Settings, budget: Budget, folder: Path, save: Callable[[list[Row]], None]) -> None:
    """Search for configurations as long as there is time; what is found goes into the GPU's table in the folder."""
    from .tune import measure_table, table_name  # Late: without kernels installed, `main` says what to do.

    measure_table(settings, folder / table_name(settings.device), budget, save)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which the report has ended")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", type=int, default=512, help="side of the square images")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tuned", action="store_true", help="write the measured configurations to kernels/tuned/")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure and write; return 0 if something was measured and nothing was found wrong, else 1."""
    if importlib.util.find_spec("fastunet.kernels") is None:
        parser.error("fastunet is not installed: run `pip install --no-deps --no-build-isolation -e .` first")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --device cpu runs the same steps on the CPU")
    if options.minutes <= 0 or options.batch < 1 or options.size < 32:
        parser.error("expected --minutes above 0, --batch from 1 and --size from 32")
    settings = Settings(device=options.device, size=options.size, batch=options.batch)
    from fastunet.kernels import tuning

    from .tune import table_name

    report = make_report(settings, options.out, options.minutes, tuned=tuning.TUNED if options.tuned else None)
    print(f"{options.out / 'gpu_report.md'}\n{report['summary']}")
    table = options.out / table_name(settings.device)
    if table.is_file():
        print(f"To use the configurations that were measured: cp {table} {tuning.TUNED / table.name}")
    wrong = [row for row in report["rows"] if row["status"] not in ("ok", "skipped")]
    is_empty = all(row["status"] == "skipped" for row in report["rows"])
    return 1 if wrong or is_empty or report["tests"].get("failed") else 0
