"""Is the working tree right, and is it faster than a commit? Two processes, round by round in turn.

First every op is compared with float64 in both trees; then each layer and the whole net is timed in both, under the
implementation that runs on the device, in alternating order; what is off in either tree gets no speed. `base/new` is
the median of the rounds' ratios, with the 10th and 90th percentile: above 1, the working tree is faster. Benchmarks
and tolerances (fastunet.testing) are the working tree's on both sides. Ends with 1 if anything is off, with 2 if REV
cannot be measured.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastunet.checks import ConfigError
from fastunet.files import write_json
from fastunet.testing import parity

from . import gpu_steps
from .cases import DIRECTIONS, TASKS, Settings, add_settings, settings_of, usual_device
from .gpu_steps import Step, parity_formats, runs_of
from .harness.environment import ROOT, environment
from .harness.worker import Spawned
from .providers import OURS, Provider, Run
from .results import Row, ratio_text, spread_text, timed, times_ms
from .runs import samples_in_turn

# Seconds for what compiles, and for what is measured.
_FIRST, _LATER = 300.0, 120.0


@contextmanager
def package_of(revision: str | None) -> Iterator[Path]:
    """A folder with the package fastunet of a commit, or of the working tree, but what judges it is the working tree's.

    Whatever is installed, and if in editable form: a process that looks there first finds no other. ChildProcessError
    where there is no such commit.
    """
    with tempfile.TemporaryDirectory(prefix="fastunet-compare-") as folder:
        tree, package = Path(folder) / "tree", Path(folder) / "fastunet"
        if revision is not None:
            command = ["git", "-C", str(ROOT), "archive", revision, "fastunet", "kernels"]
            done = subprocess.run(command, capture_output=True)
            if done.returncode:
                raise ChildProcessError(f"{' '.join(command)}: {done.stderr.decode().strip()}")
            tree.mkdir()
            subprocess.run(["tar", "-xC", str(tree)], input=done.stdout, check=True)
        root = ROOT if revision is None else tree
        parts = {path.name: path for path in (root / "fastunet").iterdir()} | {"kernels": root / "kernels"}
        parts |= {"testing": ROOT / "fastunet" / "testing", "benchmarks": ROOT / "benchmarks"}
        package.mkdir()
        for name, path in parts.items():
            (package / name).symlink_to(path)
        yield Path(folder)


# --- one of the two sides: what runs in its process, on whatever fastunet is imported there ---

# Ours of the step that this process was asked for last, on each set of inputs.
_runs: list[Run] = []


def answer(settings: Settings, step: Step | None) -> Any:
    """Return the step's row, its op, layer or net compared with float64; without a step, the seconds that the layer or
    net before takes for each of its sets of inputs once.
    """
    if step is None:
        return sum(samples_in_turn(replace(settings, rounds=len(_runs), warmup=0), {OURS: _runs})[OURS])
    return gpu_steps.answer(settings, step, _prepare)[0]


def _prepare(settings: Settings, step: Step, providers: list[Provider]) -> Row:
    _runs.clear()
    row, runs = runs_of(settings, step, providers[:1])
    if runs:
        _runs.extend(runs[OURS])
        samples_in_turn(replace(settings, rounds=1), runs)  # Warms up.
    return row


# --- both sides ---

# What a side is asked for, and the seconds it has.
Ask = Callable[[Step | None, float], Any]


def steps_to_compare(settings: Settings, only: Sequence[str]) -> list[Step]:
    """Nets, then layers, forward and backward; of these the `only` names, where there are any.

    ConfigError for a name that none has.
    """
    steps = [Step("net", task) for task in TASKS]
    steps += [Step("layer", layer.name, direction) for direction in DIRECTIONS for layer in settings.net_layers()]
    names = dict.fromkeys(step.name for step in steps)
    if unknown := set(only) - set(names):
        raise ConfigError(f"--only: expected some of {', '.join(names)}, got {unknown}")
    return [step for step in steps if not only or step.name in only]


def compare(step: Step, sides: Mapping[str, Ask], settings: Settings) -> Row:
    """Return the row of one step in both trees, "base" and "new": with their times and the ratio of "base" to "new",
    or which side is off; an op of which neither is has no more to say.
    """
    rows = {label: ask(step, _FIRST) for label, ask in sides.items()}
    row: Row = {**rows["new"], **asdict(step), "name": rows["new"]["name"], "status": "ok", "reason": ""}
    off = {label: found for label, found in rows.items() if found["status"] != "ok"}
    if off:
        reason = "; ".join(f"in {label}: {found['reason']}" for label, found in off.items())
        return row | {"status": next(iter(off.values()))["status"], "reason": reason}
    if step.kind == "parity":
        return row
    seconds: dict[str, list[float]] = {label: [] for label in reversed([*sides])}
    end = time.monotonic() + settings.seconds
    for i in range(settings.rounds):
        if i and time.monotonic() >= end:
            break
        for label in sides if i % 2 == 0 else reversed([*sides]):
            seconds[label].append(sides[label](None, _LATER))
    return row | timed(seconds)


def line(row: Row) -> str:
    """One row as text."""
    name = f"{row['kind']} {row['name']} {row['variant']}".strip()
    if "ratios" not in row:
        return f"{name:<28} {row['status'].upper()} {row['reason'][:300]}"
    times = "  ".join(f"{label} {spread_text(found)} ms" for label, found in times_ms(row).items())
    return f"{name:<28} base/new {ratio_text(row['ratios']['base'])}  {times}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, metavar="REV", help="the commit to compare with")
    usual = Settings(usual_device(), rounds=30, seconds=10.0)
    add_settings(parser, usual, "device", "size", "batch", "features", "rounds", "seconds")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="layers, inference, training")
    parser.add_argument("--out", type=Path, metavar="FILE", help="rows as JSON")


def run(options: argparse.Namespace) -> int:
    """Compare; return 0 if both trees are right, 1 if something is off, 2 if a tree cannot be measured."""
    settings = settings_of(options)
    chosen = steps_to_compare(settings, options.only)
    parities = [
        Step("parity", str(i), name) for name in parity_formats(settings.device) for i in range(len(parity.cases()))
    ]
    # As Ctrl-C: contexts end processes and remove folders.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows: list[Row] = []
    machine = environment(settings.device)
    result = {"base": options.base, "environment": machine, "settings": asdict(settings), "rows": rows}
    try:
        with (
            package_of(options.base) as base_package,
            package_of(None) as new_package,
            Spawned(answer, settings, path=base_package) as base,
            Spawned(answer, settings, path=new_package) as new,
        ):
            sides = {"base": base.ask, "new": new.ask}
            for step in parities + chosen:
                row = compare(step, sides, settings)
                if step.kind == "parity" and row["status"] == "ok":
                    continue
                rows.append(row)
                print(line(row), flush=True)
                if options.out:
                    write_json(options.out, result)
    except (TimeoutError, ChildProcessError) as error:
        print(f"{options.base} and the working tree cannot be compared: {error}", file=sys.stderr)
        return 2
    return 0 if all(row["status"] == "ok" for row in rows) else 1
