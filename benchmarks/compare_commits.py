"""Is the working tree right, and is it faster than a commit? Two processes, round by round in turn.

    python -m benchmarks compare-commits --base REV [--device cuda] [--size 512] [--only inc.c2 ...] [--out FILE]

First every op is compared with float64 in both trees; then each layer and the whole net is timed in both, under the
implementation that runs on the device, in alternating order; what is off in either tree gets no speed. `base/new` is
the median of the rounds' ratios, with the 10th and 90th percentile: above 1, the working tree is faster. Benchmarks
and tolerances are the working tree's on both sides (see commit_process). Ends with 1 if anything is off, with 2 if REV
cannot be measured. REV is checked out in a temporary `git worktree`, which is removed however this ends.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

import fastunet
from fastunet import ops
from fastunet.files import write_json
from fastunet.testing import parity
from fastunet.testing.parity import backends_for

from .cases import DIRECTIONS, DTYPE, TASKS, Settings
from .commit_process import TreeError, TreeProcess
from .gpu_steps import Step, describe, layer_of, parity_formats, run_step
from .harness.environment import ROOT, environment
from .harness.timing import Quantiles, clock_of, cudnn_benchmark
from .results import Row, failure
from .runs import layer_sets, make_net, prepare_layer, prepare_net

# Seconds for what compiles, and for what is measured.
_FIRST, _LATER = 300.0, 120.0


class Caller(Protocol):
    """What `verify` needs of a TreeProcess."""

    label: str

    def call(self, method: str, *arguments: Any, timeout: float) -> Any: ...


@contextmanager
def checked_out(root: Path, revision: str) -> Iterator[Path]:
    """A temporary worktree of the repository at `root`. TreeError if it has no such commit."""
    commit = _git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="fastunet-verify-") as folder:
        tree = Path(folder) / "base"
        try:
            with _undisturbed():
                _git(root, "worktree", "add", "--quiet", "--detach", str(tree), commit.strip())
            yield tree
        finally:
            if tree.exists():
                with _undisturbed():
                    _git(root, "worktree", "remove", "--force", str(tree))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block ends: half a worktree could not be removed. Children inherit this."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise TreeError(f"git {' '.join(arguments)}: {done.stderr.strip() or 'no such commit'}")
    return done.stdout


def steps_to_compare(settings: Settings, only: Sequence[str] = ()) -> list[Step]:
    """Nets, then layers, forward and backward; of these the `only` names, where there are any.

    ValueError for a name that none has.
    """
    steps = [Step("net", task) for task in TASKS]
    steps += [Step("layer", layer.name, direction) for direction in DIRECTIONS for layer in settings.net_layers()]
    unknown = set(only) - {step.name for step in steps}
    if unknown:
        raise ValueError(f"expected names among {', '.join(dict.fromkeys(s.name for s in steps))}, got {unknown}")
    return [step for step in steps if not only or step.name in only]


def parity_rows(sides: Sequence[Caller], settings: Settings) -> list[Row]:
    """Every op in every format, in each tree: rows with its "side"."""
    rows = []
    for variant in parity_formats(settings.device):
        for number, case in enumerate(parity.cases()):
            for side in sides:
                row = side.call("parity", str(number), variant, timeout=_FIRST)
                rows.append({"side": side.label, "op": case.op, **row})
    return rows


def compare(step: Step, base: Caller, new: Caller, settings: Settings, clock: Callable[[], float]) -> Row:
    """Time one step in both trees: a row with "ratio", or one that says which side is off."""
    prepared = {
        side.label: side.call("prepare", step.kind, step.name, step.variant, timeout=_FIRST) for side in (base, new)
    }
    row: Row = {**asdict(step), "implementation": {label: found["implementation"] for label, found in prepared.items()}}
    off = {label: found for label, found in prepared.items() if found["status"] != "ok"}
    if off:
        reason = "; ".join(f"in {label}: {found['reason']}" for label, found in off.items())
        return row | {"status": next(iter(off.values()))["status"], "reason": reason}
    seconds: dict[str, list[float]] = {base.label: [], new.label: []}
    end = clock() + settings.seconds
    for i in range(settings.rounds):
        if i and clock() >= end:
            break
        for side in (base, new) if i % 2 == 0 else (new, base):
            seconds[side.label].append(side.call("round", timeout=_LATER))
    ratios = [b / n for b, n in zip(seconds[base.label], seconds[new.label], strict=True)]
    measured = {f"{label}_ms": 1e3 * Quantiles.of(values).median for label, values in seconds.items()}
    return row | {"status": "ok", "reason": "", "ratio": asdict(Quantiles.of(ratios)), **measured}


def verify(
    base: Caller,
    new: Caller,
    settings: Settings,
    steps: Sequence[Step],
    report: Callable[[Row], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Report every op that is off, then every step's comparison. TreeError if a tree cannot be measured."""
    for side in (base, new):
        lacking = side.call("lacking", timeout=_FIRST)
        if lacking:
            raise TreeError(f"{side.label} has no {', '.join(lacking)}, which the benchmarks of this tree measure")
    wrong = [row for row in parity_rows((base, new), settings) if row["status"] != "ok"]
    for row in wrong:
        report(row)
    for step in steps:
        ops = {row["op"] for row in wrong}
        off = ops if step.kind == "net" else ops & {layer_of(settings, step.name).op}
        if off:
            sides = sorted({row["side"] for row in wrong if row["op"] in off})
            reason = f"{', '.join(sorted(off))} in {' and '.join(sides)}"
            report({**asdict(step), "status": "parity failed", "reason": reason})
        else:
            report(compare(step, base, new, settings, clock))


def line(row: Row) -> str:
    """One row as text."""
    name = f"{row['kind']} {row['name']} {row['variant']}".strip()
    if "ratio" not in row:
        side = f" in {row['side']}" if "side" in row else ""
        return f"{name:<28} {row['status'].upper()}{side}: {row['reason'][:300]}"
    ratio = row["ratio"]
    return (
        f"{name:<28} base/new {ratio['median']:6.3f} [{ratio['p10']:.3f}, {ratio['p90']:.3f}]"
        f"  base {row['base_ms']:.3f} ms  new {row['new_ms']:.3f} ms  ({ratio['samples']} rounds)"
    )


# --- one of the two sides: what runs in its process, on whatever fastunet is imported there ---

_WARMUP = 3


class Side:
    """Answers one request after the other; `settings` is a Settings as a dict. Every answer is plain data."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = Settings(**{**settings, "features": tuple(settings["features"])})
        self._runs: list[Callable[[], Any]] = []

    def lacking(self) -> list[str]:
        """What the measurements need and this fastunet has not."""
        wanted = [(ops, case.op) for case in parity.cases()] + [(fastunet, "UNet"), (fastunet, "backend")]
        return sorted({f"{module.__name__}.{name}" for module, name in wanted if not hasattr(module, name)})

    def files(self) -> dict[str, str]:
        """Where each module of fastunet that is imported here lies."""
        return {
            name: str(module.__file__)
            for name, module in sys.modules.items()
            if name.partition(".")[0] == "fastunet" and getattr(module, "__file__", None)
        }

    def parity(self, case: str, variant: str) -> Row:
        """The row of one op's comparison with float64."""
        step = Step("parity", case, variant)
        try:
            return run_step(self._settings, step)
        except Exception as error:
            return describe(self._settings, step) | failure(error)

    def prepare(self, kind: str, name: str, variant: str) -> Row:
        """Get a layer or a net ready for `round`: "status" and "reason", and the "implementation" that will run."""
        step = Step(kind, name, variant)
        self._runs = []
        device = torch.device(self._settings.device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        row: Row = {"implementation": "", "status": "ok", "reason": ""}
        try:
            row["implementation"], self._runs = self._prepared(step, device)
            with cudnn_benchmark():
                for run in _WARMUP * self._runs:
                    run()
        except Exception as error:
            return row | failure(error)
        return row

    def _prepared(self, step: Step, device: torch.device) -> tuple[str, list[Callable[[], Any]]]:
        if step.kind == "net":
            (ours, *_), _ = backends_for("conv3x3_batch_norm_relu", device, DTYPE)
            _, nets = prepare_net(self._settings, make_net(self._settings), [ours], training=step.name == "training")
            return ours, [nets[ours]]
        layer = layer_of(self._settings, step.name)
        (ours, *_), _ = backends_for(layer.op, device, DTYPE)
        runs = prepare_layer(layer, layer_sets(layer, device), [ours], backward=step.variant == "backward")
        return ours, runs[ours]

    def round(self) -> float:
        """Seconds of one pass over all sets of inputs of what was prepared."""
        clock, marks = clock_of(torch.device(self._settings.device)), []
        with cudnn_benchmark():
            for run in self._runs:
                clock.prepare()
                begin = clock.mark()
                run()
                marks.append((begin, clock.mark()))
            clock.wait()
        return sum(clock.elapsed(begin, end) for begin, end in marks)


# --- the command ---


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--base", required=True, metavar="REV", help="the commit to compare with")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=512, help="side of the square images")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--features", type=int, nargs="+", default=Settings().features)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each comparison")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="layers, inference, training")
    parser.add_argument("--out", type=Path, metavar="FILE", help="rows as JSON")


def _settings(options: argparse.Namespace) -> Settings:
    """ValueError for what cannot be measured."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device here; --device cpu compares on the CPU")
    least = 2 ** (len(options.features) - 1)
    if options.batch < 2 or options.size < least or options.rounds < 1:
        raise ValueError(f"expected --batch from 2, --size from {least} and --rounds from 1")
    names = ("device", "size", "batch", "rounds", "seconds")
    return Settings(**{name: getattr(options, name) for name in names}, features=tuple(options.features))


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Compare; return 0 if both trees are right, 1 if something is off, 2 if a tree cannot be measured."""
    try:
        settings = _settings(options)
        steps = steps_to_compare(settings, options.only)
    except ValueError as error:
        parser.error(str(error))
    # As Ctrl-C: contexts end processes and remove the worktree.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows: list[Row] = []
    result = {
        "base": options.base,
        "environment": environment(settings.device),
        "settings": asdict(settings),
        "rows": rows,
    }

    def report(row: Row) -> None:
        rows.append(row)
        print(line(row), flush=True)
        if options.out:
            write_json(options.out, result)

    try:
        with (
            checked_out(ROOT, options.base) as tree,
            TreeProcess("base", tree, ROOT, asdict(settings)) as base,
            TreeProcess("new", ROOT, ROOT, asdict(settings)) as new,
        ):
            verify(base, new, settings, steps, report)
    except TreeError as error:
        print(f"{options.base} and the working tree cannot be compared: {error}", file=sys.stderr)
        return 2
    return 0 if all(row["status"] == "ok" for row in rows) else 1
