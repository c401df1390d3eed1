"""What a measurement gives: rows, the tables written of them, and the README's, made from those that are committed.

    python -m benchmarks perf-table

rewrites the text between the two marker lines of README.md. Its figures are those of the `summary` in
benchmarks/results/<gpu>/gpu_report.json and benchmarks/results/cpu/*.json: by task ("inference", "training") and
provider, how many times as long it takes as fastunet ("ratio", and of the rounds' ratios "p10" and "p90").
benchmarks/results/cpu/drop_in_<task>.json give other people's U-Nets. Other files there have no part in it. What has no
file is said to be unmeasured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastunet.checks import DataError
from fastunet.files import written_whole
from fastunet.measuring.timing import Quantiles, ratio

from .harness.environment import ROOT

# A row says what was measured ("kind", "name", "variant"), its "status" and, where that is not "ok", the "reason"; one
# of times has "samples_ms" and "ratios" (see timed), and "missing": the reason for each provider without a time.
Row = dict[str, Any]


def timed(samples: Mapping[str, Sequence[float]]) -> Row:
    """Return "samples_ms" and "times_ms" by name, and "ratios": how many times as long as the first the others take.

    samples: seconds, of the same rounds. A ratio is the median of the rounds', with the 10th and 90th percentile.
    """
    first, *others = samples
    found = {name: ratio(samples, name, first) for name in others}
    row: Row = {"samples_ms": {name: [1e3 * seconds for seconds in values] for name, values in samples.items()}}
    medians = {name: {"median": t.median, "p10": t.p10, "p90": t.p90} for name, t in times_ms(row).items()}
    return row | {
        "times_ms": medians,
        "ratios": {
            name: {"ratio": r.median, "p10": r.p10, "p90": r.p90, "rounds": r.samples} for name, r in found.items()
        },
    }


def times_ms(row: Row) -> dict[str, Quantiles]:
    """Return the milliseconds of each provider that the row has times of, in its order."""
    return {name: Quantiles.of(samples) for name, samples in row.get("samples_ms", {}).items()}


def ratio_text(found: Row | None) -> str:
    """Write a ratio with its spread."""
    return "" if found is None else f"{found['ratio']:.2f} ({found['p10']:.2f} to {found['p90']:.2f})"


def spread_text(found: Quantiles, digits: int = 3) -> str:
    """Write times, or ratios, with their spread."""
    return f"{found.median:.{digits}f} ({found.p10:.{digits}f} to {found.p90:.{digits}f})"


class Unavailable(RuntimeError):
    """A provider cannot do this work: the message says why."""


def failure(error: Exception) -> Row:
    """ "status" and "reason" of a row that the error has ended. An assertion is the parity check's."""
    if isinstance(error, AssertionError):
        return {"status": "parity failed", "reason": str(error)}
    name = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
    return {"status": "failed", "reason": f"{name}{str(error).strip()}"[:2000]}


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], right: Collection[str] = ()) -> str:
    """Write a Markdown table, without the columns that are empty throughout; "None." without lines.

    right: columns of figures, by their headers.
    """
    columns = [i for i in range(len(header)) if any(line[i] for line in lines)]
    head = [header[i] for i in columns]
    # A bar would end the cell.
    cells = [[line[i].replace("|", "/").replace("\n", " ") for i in columns] for line in lines]
    rules = "|".join("--:" if name in right else "---" for name in head)
    rows = [f"| {' | '.join(row)} |" for row in (head, *cells)]
    return "\n".join([rows[0], f"|{rules}|", *rows[1:]]) if lines else "None."


# --- the README's table ---

BEGIN = "<!-- performance: made from benchmarks/results by `make perf-table` -->"
END = "<!-- end of performance -->"
_TASKS = {"inference": "inference", "training": "training step"}

Result = Mapping[str, Any]


# What the README shows of them; docs/performance.md has all.
README_FILES = ("gpu_report.json", "unet_float32.json")


def generate(folder: Path, names: Sequence[str] | None = None) -> str:
    """Return a table for each file, GPUs first, or that there is none. names: of those alone."""
    parts: dict[str, list[str]] = {"gpu": [], "cpu": [], "drop-in": []}
    for path in (*sorted(folder.glob("*/gpu_report.json")), *sorted(folder.glob("cpu/*.json"))):
        if names is not None and path.name not in names:
            continue
        result, place = json.loads(path.read_text()), path.relative_to(folder.parents[1])
        try:
            if any(result.get("summary", {}).get(task) for task in _TASKS):
                parts["gpu" if path.name == "gpu_report.json" else "cpu"].append(_section(place, result))
            elif path.name.startswith("drop_in_"):
                parts["drop-in"].append(_drop_in_section(place, result))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{place}: expected a summary or rows, settings and environment, got {error!r}") from error
    gpu = parts["gpu"] or ["Speed on a GPU: not measured. There is no `benchmarks/results/<gpu>/gpu_report.json`."]
    cpu = parts["cpu"] or ["Speed on a CPU: not measured. There is no file of it in `benchmarks/results/cpu/`."]
    return "\n\n".join([*gpu, *cpu, *parts["drop-in"]])


def _section(path: Path, result: Result) -> str:
    """Conditions and a table: how many times as long each provider takes."""
    tasks = {task: result["summary"].get(task) or {} for task in _TASKS}
    providers = dict.fromkeys(name for found in tasks.values() for name in found)
    lines = [[name, *(ratio_text(found.get(name)) for found in tasks.values())] for name in providers]
    table = markdown(["time of ... / time of fastunet", *_TASKS.values()], lines, right=_TASKS.values())
    settings = result["settings"]
    what = f"U-Net {'-'.join(map(str, settings['features']))}, {settings.get('dtype', 'bfloat16')}"
    return f"{_conditions(path, result, what)}\n\n{table}"


# The columns of other people's models: the time of the first over that of the second.
DROP_IN = (
    ("eager", "fastunet"),
    ("inductor", "fastunet"),
    ("inductor channels_last", "fastunet.compile"),
)


def _drop_in_section(path: Path, result: Result) -> str:
    """Conditions, and by model what is replaced, what is left and why, and how many times as long the others take."""
    names = [f"{other} / {ours}" for other, ours in DROP_IN]
    lines = []
    for row in result["rows"]:
        left = "; ".join(f"{count}: {reason.partition(':')[0]}" for reason, count in row["left"].items())
        ratios = [_drop_in_ratio(row["samples_ms"], *pair) for pair in DROP_IN]
        lines.append([row["name"], str(row["found"]), str(row["replaced"]), left, *ratios])
    settings = result["settings"]
    table = markdown(["model", "found", "replaced", "left, and why", *names], lines, ["found", "replaced", *names])
    what = f"{settings['task']} of other people's U-Nets, {settings['width']} channels in the first level"
    return f"{_conditions(path, result, what)}\n\n{table}"


def _drop_in_ratio(samples: Mapping[str, Sequence[float]], other: str, ours: str) -> str:
    """How many times as long as ours the other takes, or which of the two could not run the model."""
    failed = [name for name in (other, ours) if name not in samples]
    return f"{' and '.join(failed)}: failed" if failed else spread_text(ratio(samples, other, ours), digits=2)


def _conditions(path: Path, result: Result, what: str) -> str:
    settings, environment = result["settings"], result["environment"]
    side, threads = settings["size"], settings.get("threads")
    said = f"{what}, images of {side}x{side}, batches of {settings['batch']}"
    said += f", {threads} threads" if threads else ""
    return (
        f"{environment['device']}, torch {environment['torch']}; {said}; medians of at most {settings['rounds']} "
        f"rounds in turn, p10 to p90 in brackets; above 1, fastunet is faster (`{path}`):"
    )


def replace_between(text: str, generated: str) -> str:
    """The text with what stands between its markers replaced. DataError unless it has each marker once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise DataError(f"expected one line {BEGIN!r} and after it one {END!r}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{generated}\n\n{END}{rest.partition(END)[2]}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository")


def run(options: argparse.Namespace) -> int:
    """Rewrite the README. Returns 0."""
    readme = options.root / "README.md"
    text = replace_between(readme.read_text(), generate(options.root / "benchmarks" / "results", README_FILES))
    with written_whole(readme) as temporary:
        temporary.write_text(text)
    return 0
