"""Is the working tree right, and is it faster than a commit? Two processes, round by round in turn.

    python -m benchmarks compare-commits --base REV [--device cuda] [--size 512] [--only inc.c2 ...] [--out FILE]

First every op is compared with float64 in both trees; then each layer and the whole net is timed in both, under the
implementation that runs on the device, in alternating order; what is off in either tree gets no speed. `base/new` is
the median of the rounds' ratios, with the 10th and 90th percentile: above 1, the working tree is faster. Benchmarks
and tolerances (fastunet.testing) are the working tree's on both sides. Ends with 1 if anything is off, with 2 if REV
cannot be measured. REV is checked out in a temporary `git worktree`, which is removed however this ends.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

import fastunet
from fastunet import ops
from fastunet.files import write_json
from fastunet.testing import parity
from fastunet.testing.parity import Case, backends_for

from .cases import DIRECTIONS, DTYPE, TASKS, Settings
from .gpu_steps import Step, describe, layer_of, parity_formats, run_step
from .harness.environment import ROOT, environment
from .harness.timing import Quantiles, clock_of, cudnn_benchmark
from .harness.worker import Spawned
from .providers import OURS, Run, our_net
from .results import Row, failure
from .runs import (
    NetCheck,
    case_run,
    check_backward,
    check_gradients,
    check_layer,
    device_inputs,
    images,
    input_sets,
    make_net,
    target_for,
    wanted_of,
)

# Seconds for what compiles, and for what is measured.
_FIRST, _LATER = 300.0, 120.0


class TreeError(Exception):
    """A tree cannot be measured: it lacks something, or its process ended or hung."""


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


# --- one of the two sides: what runs in its process, on whatever fastunet is imported there ---


@contextmanager
def package_of(tree: Path, measuring: Path) -> Iterator[Path]:
    """A folder with the package fastunet of `tree`, but what judges it of the tree that measures; links, in both cases.

    Whatever is installed, and if in editable form: a process that looks there first finds no other.
    """
    parts = {path.name: path for path in (tree / "fastunet").iterdir()} | {"kernels": tree / "kernels"}
    parts |= {"testing": measuring / "fastunet" / "testing", "benchmarks": measuring / "benchmarks"}
    with tempfile.TemporaryDirectory(prefix="fastunet-verify-") as folder:
        (Path(folder) / "fastunet").mkdir()
        for name, path in parts.items():
            (Path(folder) / "fastunet" / name).symlink_to(path)
        yield Path(folder)


class Caller(Protocol):
    """What `verify` needs of a Tree."""

    label: str

    def call(self, method: str, *arguments: Any, timeout: float) -> Any: ...


class Tree:
    """Calls methods of a Side in a process whose fastunet is that of the folder. label: what errors call it."""

    def __init__(self, label: str, folder: Path, settings: Settings) -> None:
        self.label, self.process = label, Spawned(answer, settings, path=folder)

    def call(self, method: str, *arguments: Any, timeout: float) -> Any:
        """What the method returns. TreeError if it raises or takes over `timeout` seconds, or if the process dies."""
        try:
            found, error = self.process.ask((method, arguments), timeout)
        except (TimeoutError, ChildProcessError) as reason:
            raise TreeError(f"{self.label}: {reason}") from None
        if error:
            raise TreeError(f"{self.label}: {error}")
        return found


_sides: list[Side] = []


def answer(settings: Settings, request: tuple[str, tuple[Any, ...]]) -> tuple[Any, str]:
    """The result of a call of this process's Side, and the error it ended with, if any."""
    if not _sides:
        _sides.append(Side(settings))
    method, arguments = request
    try:
        return getattr(_sides[0], method)(*arguments), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


class Side:
    """Answers one request after the other. Every answer is plain data."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._runs: list[Run] = []

    def lacking(self) -> list[str]:
        """What the measurements need and this fastunet has not."""
        wanted = [(ops, case.op) for case in parity.cases()] + [(fastunet, "UNet"), (fastunet, "backend")]
        return sorted({f"{module.__name__}.{name}" for module, name in wanted if not hasattr(module, name)})

    def files(self) -> dict[str, str]:
        """Where each module of fastunet that is imported here lies."""
        found = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
        return {name: str(Path(file).resolve()) for name, file in found.items() if file and name.startswith("fastunet")}

    def parity(self, case: str, variant: str) -> Row:
        """The row of one op's comparison with float64."""
        step = Step("parity", case, variant)
        try:
            return run_step(self._settings, step)
        except Exception as error:
            return describe(self._settings, step) | failure(error)

    def prepare(self, step: Step) -> Row:
        """Get a layer or a net ready for `round`: "status" and "reason", and the "implementation" that will run."""
        self._runs = []
        if self._settings.device == "cuda":
            torch.cuda.empty_cache()
        row: Row = {"implementation": "", "status": "ok", "reason": ""}
        try:
            op = "conv3x3_batch_norm_relu" if step.kind == "net" else layer_of(self._settings, step.name).op
            (row["implementation"], *_), _ = backends_for(op, self._settings.torch_device, DTYPE)
            with fastunet.backend(row["implementation"]), cudnn_benchmark():
                prepared = self._net if step.kind == "net" else self._layer
                self._runs = prepared(step, row["implementation"])
                for run in self._settings.warmup * self._runs:
                    run()
        except Exception as error:
            return row | failure(error)
        return row

    def _net(self, step: Step, backend: str) -> list[Run]:
        settings, training = self._settings, step.name == "training"
        model, x = make_net(settings), images(settings, settings.batch, settings.size)
        target = target_for(settings, x)
        if training:
            check_gradients(settings, model)
        ours = our_net(OURS, backend, DTYPE, training=training)
        run = ours.prepare(model, x, target)
        NetCheck(model, x, target, training=training).check(ours, run())
        return [run]

    def _layer(self, step: Step, backend: str) -> list[Run]:
        layer = layer_of(self._settings, step.name)
        sets = input_sets(device_inputs(layer, self._settings.torch_device), self._settings.torch_device)
        runs = [case_run(Case(layer.op, layer.shapes), each, backend, step.variant, wanted_of(layer)) for each in sets]
        if step.variant == "backward":
            check_backward(layer, sets[0])
        else:
            check_layer(layer, sets[0], runs[0]())
        return runs

    def round(self) -> float:
        """Seconds of one pass over all sets of inputs of what was prepared."""
        clock, marks = clock_of(self._settings.torch_device), []
        with cudnn_benchmark():
            for run in self._runs:
                clock.prepare()
                begin = clock.mark()
                run()
                marks.append((begin, clock.mark()))
            clock.wait()
        return sum(clock.elapsed(begin, end) for begin, end in marks)


# --- both sides ---


def steps_to_compare(settings: Settings, only: Sequence[str] = ()) -> list[Step]:
    """Nets, then layers, forward and backward; of these the `only` names, where there are any.

    ValueError for a name that none has.
    """
    steps = [Step("net", task) for task in TASKS]
    steps += [Step("layer", layer.name, direction) for direction in DIRECTIONS for layer in settings.net_layers()]
    names = dict.fromkeys(step.name for step in steps)
    if unknown := set(only) - set(names):
        raise ValueError(f"--only: expected some of {', '.join(names)}, got {unknown}")
    return [step for step in steps if not only or step.name in only]


def compare(step: Step, base: Caller, new: Caller, settings: Settings, clock: Callable[[], float]) -> Row:
    """Time one step in both trees: a row with "ratio", or one that says which side is off."""
    prepared = {side.label: side.call("prepare", step, timeout=_FIRST) for side in (base, new)}
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
        if lacking := side.call("lacking", timeout=_FIRST):
            raise TreeError(f"{side.label} has no {', '.join(lacking)}, which the benchmarks of this tree measure")
    wrong: dict[str, set[str]] = {}  # By op, the sides in which it is off.
    for variant in parity_formats(settings.device):
        for number in range(len(parity.cases())):
            for side in (base, new):
                row = side.call("parity", str(number), variant, timeout=_FIRST)
                if row["status"] != "ok":
                    report({"side": side.label, **row})
                    wrong.setdefault(row["op"], set()).add(side.label)
    for step in steps:
        off = [op for op in sorted(wrong) if step.kind == "net" or op == layer_of(settings, step.name).op]
        if off:
            sides = sorted(set().union(*(wrong[op] for op in off)))
            reason = f"{', '.join(off)} in {' and '.join(sides)}"
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
    machine = environment(settings.device)
    result = {"base": options.base, "environment": machine, "settings": asdict(settings), "rows": rows}

    def report(row: Row) -> None:
        rows.append(row)
        print(line(row), flush=True)
        if options.out:
            write_json(options.out, result)

    try:
        with (
            checked_out(ROOT, options.base) as tree,
            package_of(tree, ROOT) as base_package,
            package_of(ROOT, ROOT) as new_package,
        ):
            base, new = Tree("base", base_package, settings), Tree("new", new_package, settings)
            with base.process, new.process:
                verify(base, new, settings, steps, report)
    except TreeError as error:
        print(f"{options.base} and the working tree cannot be compared: {error}", file=sys.stderr)
        return 2
    return 0 if all(row["status"] == "ok" for row in rows) else 1
