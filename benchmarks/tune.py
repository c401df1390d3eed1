"""Measure which configurations are fastest on this GPU, and where they are faster than ATen: the table that
`kernels/tuned/` holds of it.

    python -m benchmarks tune --out FILE [--minutes 30] [--size 512] [--batch 16]

For every 3x3 convolution of UNet(3, 2), forward and both gradients, in bfloat16: the possible configurations, the
derived one's neighbours first, compared with float64 and timed in turn (see search); then, with the fastest, the layers
of such nets beside ATen, by which `auto` chooses (see margins). FILE is written anew after each shape, so that what is
measured is never lost; rows of other shapes that FILE has already stay. `cp FILE kernels/tuned/` puts it to use:
`--tuned` writes it there at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fastunet.kernels import gpu, tuning

from fastunet import dispatch
from fastunet.files import write_json

from .cases import Settings
from .harness.environment import environment
from .harness.worker import Budget
from .margins import margin_steps
from .measure import Worker, run_steps
from .results import Row
from .search import tune_steps
from .steps import DTYPE

_RESERVE = 6.0
# The share of the time in which configurations are searched for.
_SEARCH = 0.6
# The parts of a table, and the rows' keys under which they have their entries.
_PARTS = {"configs": "entry", "layers": "layer"}


def table(
    rows: Sequence[Row], name: str, found: dict[str, Any], before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The table of a GPU of that name from the rows of searches and margins: an entry for each, with what it was
    measured with. before: a table whose other entries stay.
    """
    measured = {key: found.get(key) for key in ("commit", "dirty", "torch", "triton", "cudnn", "driver")}
    tables: dict[str, Any] = {"gpu": name}
    for part, key in _PARTS.items():
        entries = [row[key] | {"name": row["name"], "measured": measured} for row in rows if key in row]
        taken = [_identity(entry) for entry in entries]
        kept = [entry for entry in (before or {}).get(part, ()) if _identity(entry) not in taken]
        tables[part] = [*entries, *kept]
    return tables


def _identity(entry: dict[str, Any]) -> dict[str, Any]:
    """What an entry is of: layers that differ in pooling alone are told by their names."""
    named = ("op", "dtype", "shape") if "shape" in entry else ("name", "dtype", "height", "width", "training")
    return {key: entry[key] for key in named}


def write_table(path: Path, rows: Sequence[Row], device: str) -> None:
    """Write the table whole, unless nothing has given an entry."""
    if any(key in row for row in rows for key in _PARTS.values()):
        before = json.loads(path.read_text()) if path.is_file() else None
        name = gpu.target(torch.device(device)).name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, table(rows, name, environment(device), before))


def table_name(device: str) -> str:
    """The name of the file by which `tuning` finds the device's table."""
    return tuning.table_path(gpu.target(torch.device(device)).name).name


def line(row: Row) -> str:
    """One search or margin as text, the configurations it dropped below it."""
    name = f"{row['name']} {row['variant']}"
    if "layer" in row:
        return f"{name}: {_margin(row['layer'], 'margin_over_aten')}"
    if "entry" not in row:
        return f"{name}: {row['status']}: {row['reason'][:200]}"
    blocks = " ".join(f"{key}={value}" for key, value in row["entry"]["config"].items())
    margins = ", ".join(_margin(row, key) for key in ("margin_over_derived", "margin_over_aten") if key in row)
    dropped = "".join(f"\n  dropped {each['config']}: {each['reason'][:200]}" for each in row["dropped"])
    return f"{name}: {blocks}; of {row['tried']}; {margins}{dropped}"


def _margin(row: Row, key: str) -> str:
    found = row[key]
    return f"{found['median']:.3f} [{found['p10']:.3f}, {found['p90']:.3f}] x {key.removeprefix('margin_over_')}"


def measure_table(
    settings: Settings, path: Path, budget: Budget, save: Callable[[list[Row]], None] | None = None
) -> list[Row]:
    """Search for configurations in a share of the time, and measure margins in the rest; the rows of both.

    Both go into the table at path. save: gets the rows there are after each.
    """
    rows: list[Row] = []

    def keep(found: list[Row]) -> None:
        write_table(path, found, settings.device)
        if save is not None:
            save([*rows, *found])

    searching = Budget(_SEARCH * budget.left())
    rows += run_steps(settings, tune_steps(settings), Worker(settings), searching, keep)
    tuned = replace(settings, table=str(path))
    return rows + run_steps(tuned, margin_steps(settings), Worker(tuned), budget, keep)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="FILE")
    where.add_argument("--tuned", action="store_true", help="write kernels/tuned/<gpu>.json")
    parser.add_argument("--minutes", type=float, default=30.0, help="after which the search has ended")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", type=int, default=512, help="side of the square images")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--features", type=int, nargs="+", default=Settings().features)


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure and write the table; return 0 if there is one, else 1."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here")
    obstacle = dispatch.triton_obstacle(torch.device(options.device), DTYPE)
    if obstacle is not None:
        parser.error(f"there is nothing to tune: {obstacle}")
    settings = Settings(device=options.device, size=options.size, batch=options.batch, features=tuple(options.features))
    path = tuning.TUNED / table_name(options.device) if options.tuned else options.out
    rows = measure_table(settings, path, Budget(60 * options.minutes - _RESERVE))
    print("\n".join(line(row) for row in rows))
    if not path.is_file():
        return 1
    if not options.tuned:
        print(f"cp {path} {tuning.TUNED / table_name(options.device)}")
    return 0
