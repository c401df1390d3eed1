"""What the host takes to launch the kernels of a net's inference and training, one image at a time.

    python -m benchmarks.launch_overhead [--features 64 128 ...] [--size 256] [--rounds 200] [--out JSON]

prints microseconds for each launch: of inference by the net as it stands and by `fastunet.planned`, and of a training
step (forward, Dice loss, backward) of a net with few channels, which are all the same to the host. Nets and ops repeat
what they launched for arguments of the same kind; "anew" has them find their launches at every call, as at the first.

On a GPU that is the time until all launches are queued. Without one, Triton's launcher hands them to a stand-in for the
driver of a GPU of sm_90, which takes them and does nothing: what a driver takes for a launch is left out. That needs a
C compiler.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fastunet.kernels import gpu
from torch import Tensor

import fastunet
from fastunet import plan
from fastunet.files import write_json
from fastunet.graphs import GraphedModel, Recording
from fastunet.ops.replay import replaying

from .environment import environment
from .steps import DTYPE, Settings
from .tables import table

# Microseconds for each launch.
GOAL = 15.0
STAND_IN = "none, a stand-in"
# Of the net that is trained: its weights are copied by the host where there is no GPU, so they are small.
_FEW_CHANNELS, _SMALL_SIDE = (16, 32, 64, 128, 256), 32


def measured(features: Sequence[int], size: int, rounds: int) -> dict[str, Any]:
    """Medians and p10, p90 in microseconds for each launch of "inference" and "training step", each "repeated" and
    "anew", the first also "planned"; and how many each has.

    Of a GPU where there is one, else of a driver that the caller has made to stand in for it.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    model = fastunet.UNet(3, 2, features=tuple(features)).to(device, DTYPE).eval()
    x = torch.randn(1, 3, size, size, device=device, dtype=DTYPE).to(memory_format=torch.channels_last)
    with torch.no_grad(), fastunet.backend("triton"):
        fast = fastunet.planned(model) if on_gpu else GraphedModel(model, record=_listed)
        inference, step = functools.partial(model, x), _training_step(device)
        runs: dict[str, Callable[[], Any]] = {
            "inference, anew": replaying(False)(inference),
            "inference, repeated": inference,
            "inference, planned": functools.partial(fast, x),
            "training step, anew": replaying(False)(step),
            "training step, repeated": step,
        }
        launches = {name: _launches_of(run) for name, run in runs.items()}
        times = _times(runs, rounds, torch.cuda.synchronize if on_gpu else None)
    spread = {name: [t / launches[name] for t in statistics.quantiles(of, n=10)] for name, of in times.items()}
    summary = {name: {"median": q[4], "p10": q[0], "p90": q[8]} for name, q in spread.items()}
    driver = "CUDA" if on_gpu else STAND_IN
    return {"summary": summary, "launches": launches, "driver": driver, "goal": GOAL}


def _listed(run: Callable[[], Tensor]) -> Recording:
    """As `planned` records, but for its block of memory: where nothing is computed, none can be checked."""
    with gpu.recording() as steps:
        result = run()
    return plan.repeated(list(steps), result.device), result


def _training_step(device: torch.device) -> Callable[[], None]:
    model = fastunet.UNet(3, 2, features=_FEW_CHANNELS).to(device, DTYPE)
    loss = fastunet.losses.DiceLoss(sigmoid=True)
    x = torch.randn(1, 3, _SMALL_SIDE, _SMALL_SIDE, device=device, dtype=DTYPE)
    target = (x[:, :2] > 0).to(torch.uint8)

    @torch.enable_grad()
    def step() -> None:
        model.zero_grad()
        loss(model(x), target).backward()

    return step


def _launches_of(run: Callable[[], Any]) -> int:
    """How many there are in a call after the first three, which may make or note down what the others go without."""
    for _ in range(3):
        run()
    with gpu.recording() as steps:
        run()
    return sum(isinstance(step, gpu.Launch) for step in steps)


def _times(
    runs: dict[str, Callable[[], Any]], rounds: int, synchronize: Callable[[], None] | None
) -> dict[str, list[float]]:
    """Microseconds of a call that follows one of its own kind, as in a loop, the kinds in turn; what a call queued is
    waited for after it.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 3):
        for name, run in runs.items():
            for _ in range(2):
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
    rows = [
        [name, str(result["launches"][name]), *(f"{of[key]:.1f}" for key in ("median", "p10", "p90"))]
        for name, of in result["summary"].items()
    ]
    title = f"Microseconds of the host for each launch, driver: {result['driver']} (goal of planned: {GOAL:.0f})"
    return f"{title}\n\n" + table(["", "launches", "median", "p10", "p90"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; with --out write it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--features", type=int, nargs="+", default=Settings().features)
    parser.add_argument("--size", type=int, default=256, help="side of the image")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, help="write the times as JSON")
    given = parser.parse_args(arguments)
    if torch.cuda.is_available():
        result = measured(given.features, given.size, given.rounds)
    else:
        from . import stand_in_driver

        with tempfile.TemporaryDirectory() as folder:
            stand_in_driver.activate(Path(folder), capability=90)
            result = measured(given.features, given.size, given.rounds)
    print(report(result))
    if given.out is not None:
        settings = {"features": list(given.features), "size": given.size, "rounds": given.rounds}
        where = environment("cpu" if result["driver"] == STAND_IN else "cuda")
        write_json(given.out, result | {"settings": settings, "environment": where})
    return 0


if __name__ == "__main__":
    sys.exit(main())
