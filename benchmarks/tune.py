"""Measure which configurations are fastest on this GPU: the table that `kernels/tuned/` holds of it.

    python -m benchmarks.tune --out FILE [--minutes 30] [--size 512] [--batch 16]

For every 3x3 convolution of UNet(3, 2), forward and both gradients, in bfloat16: the possible configurations, the
derived one's neighbours first, compared with float64 and timed in turn (see search). FILE is written anew after each
shape, so that what is measured is never lost; rows of other shapes that FILE has already stay. `cp FILE kernels/tuned/`
puts it to use: `--tuned` writes it there at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fastunet.kernels import gpu, tuning

from fastunet import dispatch
from fastunet.files import write_json

from .environment import environment
from .schedule import Budget, measure
from .search import tune_steps
from .steps import DTYPE, Row, Settings
from .worker import Worker

_RESERVE = 6.0


def table(
    rows: Sequence[Row], name: str, found: dict[str, Any], before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The table of a GPU of that name from the rows of searches: an entry for each, with its margins and what it was
    measured with. before: a table whose other entries stay.
    """
    measured = {key: found.get(key) for key in ("commit", "dirty", "torch", "triton", "cudnn", "driver")}
    entries = [row["entry"] | {"layer": row["name"], "measured": measured} for row in rows if "entry" in row]
    taken = [_key(entry) for entry in entries]
    kept = [entry for entry in (before or {}).get("configs", ()) if _key(entry) not in taken]
    return {"gpu": name, "configs": [*entries, *kept]}


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["op"], entry["dtype"], *sorted(entry["shape"].items())


def write_table(path: Path, rows: Sequence[Row], device: str) -> None:
    """Write the table whole, unless no search has given an entry."""
    if any("entry" in row for row in rows):
        before = json.loads(path.read_text()) if path.is_file() else None
        name = gpu.target(torch.device(device)).name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, table(rows, name, environment(device), before))


def table_name(device: str) -> str:
    """The name of the file by which `tuning` finds the device's table."""
    return tuning.table_path(gpu.target(torch.device(device)).name).name


def line(row: Row) -> str:
    """One search as text, its dropped configurations below it."""
    name = f"{row['name']} {row['variant']}"
    if "entry" not in row:
        return f"{name}: {row['status']}: {row['reason'][:200]}"
    blocks = " ".join(f"{key}={value}" for key, value in row["entry"]["config"].items())
    margins = ", ".join(
        f"{row[key]['median']:.3f} [{row[key]['p10']:.3f}, {row[key]['p90']:.3f}] x {key.removeprefix('margin_over_')}"
        for key in ("margin_over_derived", "margin_over_aten")
        if key in row
    )
    dropped = "".join(f"\n  dropped {each['config']}: {each['reason'][:200]}" for each in row["dropped"])
    return f"{name}: {blocks}; of {row['tried']}; {margins}{dropped}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if there is a table, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="FILE")
    where.add_argument("--tuned", action="store_true", help="write kernels/tuned/<gpu>.json")
    parser.add_argument("--minutes", type=float, default=30.0, help="after which the search has ended")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", type=int, default=512, help="side of the square images")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--features", type=int, nargs="+", default=Settings().features)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here")
    obstacle = dispatch.triton_obstacle(torch.device(options.device), DTYPE)
    if obstacle is not None:
        parser.error(f"there is nothing to tune: {obstacle}")
    settings = Settings(device=options.device, size=options.size, batch=options.batch, features=tuple(options.features))
    path = tuning.TUNED / table_name(options.device) if options.tuned else options.out
    budget = Budget(60 * options.minutes - _RESERVE)
    rows = measure(
        settings, tune_steps(settings), Worker(settings), budget, lambda found: write_table(path, found, options.device)
    )
    print("\n".join(line(row) for row in rows))
    if not path.is_file():
        return 1
    if not options.tuned:
        print(f"cp {path} {tuning.TUNED / table_name(options.device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
