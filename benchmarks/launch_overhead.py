"""What Python takes to launch the kernels of a net's inference, one image at a time.

    python -m benchmarks.launch_overhead [--features 64 128 ...] [--size 256] [--rounds 200] [--out JSON]

prints microseconds on the host for each launch: of the net as it stands, layer by layer, and of `fastunet.planned`. On
a GPU that is the time until all launches are queued, Triton's own part included. Without one the launches are left out
and what comes before them is timed alone, with the configurations of sm_90.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Read when triton is imported: kernels without a driver.

from fastunet.kernels import gpu

import fastunet
from fastunet import plan
from fastunet.files import write_json

from .environment import environment
from .steps import DTYPE, Settings
from .tables import table

# Microseconds for each launch.
GOAL = 15.0


def measured(features: Sequence[int], size: int, rounds: int) -> dict[str, Any]:
    """Medians and p10, p90 in microseconds for each launch, by "layer by layer" and "planned", and their number."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    model = fastunet.UNet(3, 2, features=tuple(features)).to(device, DTYPE).eval()
    x = torch.randn(1, 3, size, size, device=device, dtype=DTYPE).to(memory_format=torch.channels_last)
    with torch.no_grad(), fastunet.backend("triton"), _launches(on_gpu):
        with gpu.recording() as steps:
            model(x)
        launches = sum(isinstance(step, gpu.Launch) for step in steps)
        fast = plan.planned(model) if on_gpu else _Listed(steps)
        runs = {"layer by layer": lambda: model(x), "planned": lambda: fast(x)}
        times = _times(runs, rounds, torch.cuda.synchronize if on_gpu else None)
    spread = {name: [t / launches for t in statistics.quantiles(of, n=10)] for name, of in times.items()}
    summary = {name: {"median": q[4], "p10": q[0], "p90": q[8]} for name, q in spread.items()}
    return {"summary": summary, "launches": launches, "launched": on_gpu, "goal": GOAL}


class _Listed:
    """The loop of a plan, without its block of memory: nothing is computed whose place could matter."""

    def __init__(self, steps: Sequence[Any]) -> None:
        self.steps = steps

    def __call__(self, x: torch.Tensor) -> None:
        for step in self.steps:
            step.run(x.device)


@contextmanager
def _launches(on_gpu: bool) -> Iterator[None]:
    """Without a GPU launches and copies are noted down and do nothing, as if for sm_90."""
    if on_gpu:
        yield
        return
    real = gpu.Launch.run, gpu.Copy.run, gpu.target
    target = gpu.known_target(90)
    gpu.Launch.run = gpu.Copy.run = lambda self, device: gpu.note(self)
    gpu.target = lambda device: target
    try:
        yield
    finally:
        gpu.Launch.run, gpu.Copy.run, gpu.target = real


def _times(
    runs: dict[str, Callable[[], Any]], rounds: int, synchronize: Callable[[], None] | None
) -> dict[str, list[float]]:
    """Microseconds of each call, taken in turn; what it queued is waited for between them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 3):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            elapsed = (time.perf_counter() - start) * 1e6
            if synchronize is not None:
                synchronize()
            if i >= 3:
                times[name].append(elapsed)
    return times


def report(result: dict[str, Any]) -> str:
    """The table, and what it is of."""
    rows = [[name, *(f"{of[key]:.1f}" for key in ("median", "p10", "p90"))] for name, of in result["summary"].items()]
    what = "with" if result["launched"] else "without"
    title = f"Microseconds of the host for each of {result['launches']} launches, {what} the launch itself"
    return f"{title} (goal {result['goal']:.0f})\n\n" + table(["", "median", "p10", "p90"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; with --out write it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--features", type=int, nargs="+", default=Settings().features)
    parser.add_argument("--size", type=int, default=256, help="side of the image")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, help="write the times as JSON")
    given = parser.parse_args(arguments)
    result = measured(given.features, given.size, given.rounds)
    print(report(result))
    if given.out is not None:
        settings = {"features": list(given.features), "size": given.size, "rounds": given.rounds}
        where = environment("cuda" if result["launched"] else "cpu")
        write_json(given.out, result | {"settings": settings, "environment": where})
    return 0


if __name__ == "__main__":
    sys.exit(main())
