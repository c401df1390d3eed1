"""A whole net against the nets people run: inference, a training step, and the net's layers.

All that are compared take turns in one run, and the ratio is that of each round; what is not right, or does not run,
is named with its reason and has no time. `fastunet bench` draws the same.

`--host` times what a net costs the host: `fastunet.UNet` and the same net in plain modules, with next to nothing to
compute. Images of 16x16 pixels and few channels leave the calls alone to be timed: the classic net of 64 to 1024
channels multiplies 31 million weights even for one pixel. One thread, float32, channels_last. A training step is
forward and backward from a random cotangent; loss and optimiser, which both nets would share, are left out. It takes
two images: at the bottom one has a single pixel, from which batch norm has no variance.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastunet.checks import ConfigError
from fastunet.files import write_json
from fastunet.testing import random_cotangent

from . import cases
from .cases import DTYPES, TASKS, Settings, add_settings, settings_of, usual_device
from .gpu_steps import Step, describe, providers_of, runs_of
from .providers import OURS, dtype_name
from .results import Row, markdown
from .runs import images_and_masks, make_net, measured
from .tables import missing_table, report_of, times_table

# The reference model as people run it.
PLAIN = "eager channels_last"
# What --host times. A CPU's allocator takes a while to settle.
HOST = Settings("cpu", "float32", size=16, batch=1, features=(4, 8, 8, 8, 8), rounds=400, seconds=60.0, warmup=30)

# Layers of every kind, from both ends of the net.
_FEW = ("inc.c1", "inc.c2", "down1.c1", "up1.up", "up1.c1", "outc")


def default_settings(device: str, dtype: torch.dtype, *, quick: bool = False, **given: Any) -> Settings:
    """What takes about three minutes on two CPU cores, or on a GPU; `quick`, half a minute. given: replaces parts."""
    chosen: dict[str, Any] = {"seconds": 5.0}
    if device != "cuda":
        chosen = {"size": 256, "batch": 1, "features": (32, 64, 128, 256, 512), "rounds": 15, "seconds": 15.0}
    if quick:
        chosen |= {"rounds": 7, "seconds": 3.0, "warmup": 1, "compiles": False, "layers": _FEW}
        if device != "cuda":
            chosen |= {"size": 128, "features": (16, 32, 64, 128, 256)}
    return Settings(device, dtype_name(dtype), **(chosen | given))


def check_settings(settings: Settings) -> None:
    """ConfigError unless there is a net of those features, and its images reach its bottom, also in training."""
    cases.check_settings(settings)
    bottom = 2 ** (len(settings.features) - 1)
    if settings.batch == 1 and settings.size < 2 * bottom:
        raise ConfigError(
            f"size, batch: expected more than one value per channel at the bottom for batch norm in training, got one: "
            f"take a batch of 2, or images of {2 * bottom}"
        )


def compare(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> Iterator[Row]:
    """Yield a row for each task of the net, then for each layer, as they come; progress gets what is being done."""
    check_settings(settings)
    layers = [layer.name for layer in settings.net_layers() if settings.layers is None or layer.name in settings.layers]
    for step in [Step("net", task) for task in TASKS] + [Step("layer", name, "forward") for name in layers]:
        progress(step.name)
        providers = providers_of(settings, step)
        # Compiling each layer would take longer than all else.
        if not (settings.compiles if step.kind == "net" else settings.thorough):
            reason = f"compiling a {step.kind} was not asked for"
            providers = [replace(each, unavailable=reason) if each.compiles else each for each in providers]
        row, runs = runs_of(settings, step, providers)
        yield measured(settings, describe(settings, step) | row, runs)


def tables(report: Row) -> list[str]:
    """Write Markdown: a table of the net, one of the layers, one of what was not measured, and why."""
    kinds = {kind: [row for row in report["rows"] if row["kind"] == kind] for kind in ("net", "layer")}
    found = [*map(times_table, kinds.values()), missing_table(report["rows"])]
    return [f"{table}\n" for table in found if table != markdown((), ())]


# --- what the calls cost the host ---


def compare_host(settings: Settings) -> Row:
    """Return what the JSON file holds: a row for each task, with every sample, and the summary of their ratios."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return report_of(settings, [_host_row(settings, task) for task in TASKS])
    finally:
        torch.set_num_threads(threads)


def _host_row(settings: Settings, task: str) -> Row:
    model = make_net(settings)
    batch = settings.batch if task == "inference" else max(2, settings.batch)
    x, _ = images_and_masks(settings, batch, settings.size)
    nets: dict[str, Any] = {OURS: model, PLAIN: model.to_reference()}
    runs = {}
    for name, net in nets.items():
        net.to(memory_format=torch.channels_last).train(task == "training")
        cotangent = random_cotangent(net(x)) if task == "training" else None
        runs[name] = [functools.partial(_host_step, net, x, cotangent)]
    return measured(settings, {"kind": "net", "name": task, "status": "ok", "images": batch}, runs)


def _host_step(net: nn.Module, x: Tensor, cotangent: Tensor | None) -> None:
    if cotangent is None:
        with torch.no_grad():
            net(x)
    else:
        net.zero_grad()
        net(x).backward(cotangent)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", action="store_true", help="time the calls, on next to no arithmetic")
    add_settings(parser, None, "device", "dtype", "size", "batch", "features", "rounds")
    parser.set_defaults(device=usual_device(), dtype="float32")
    parser.add_argument("--no-layers", action="store_true", help="the net alone")
    parser.add_argument("--all", action="store_true", help="also what takes minutes to compile")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write every sample and the ratios")


def run(options: argparse.Namespace) -> int:
    """Time, print and write; return 0, or 1 if ours is wrong."""
    if options.host:
        options.device, options.dtype, options.usual = HOST.device, HOST.dtype, HOST
        found = compare_host(settings_of(options))
    else:
        options.usual = default_settings(options.device, DTYPES[options.dtype], thorough=options.all)
        more: dict[str, Any] = {"seconds": math.inf} if options.rounds is not None else {}
        settings = settings_of(options, **more | ({"layers": ()} if options.no_layers else {}))
        found = report_of(settings, list(compare(settings, lambda doing: print(doing, flush=True))))
    print("\n".join(tables(found)))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, found)
    return 1 if any(row["status"] != "ok" for row in found["rows"]) else 0
