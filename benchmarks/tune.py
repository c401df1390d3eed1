"""Measure at length what `fastunet.tune` measures in seconds, for the table of this GPU that the package holds.

Of UNet(3, 2) with batch norm, instance norm and none, in inference and training, under autocast in bfloat16: every
layer beside ATen, with every configuration of its kernels. What was measured before in this environment is not
measured again (but with FASTUNET_TUNE=force), and what is measured is kept as it is found: a search that is stopped,
crashes or hangs goes on with the next call. Without `--out` it becomes kernels/tuned/<gpu>.json, for other environments
too.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fastunet.kernels import autotune, gpu

import fastunet
from fastunet import dispatch
from fastunet.checks import ConfigError

from .cases import DTYPE, TASKS, Settings, add_settings, settings_of
from .harness.environment import environment
from .harness.worker import LEAST, RESERVE, Budget, Spawned
from .runs import images_and_masks, make_net
from .tables import tune_table

NORMS = ("batch", "instance", None)


def tune_net(settings: Settings, request: tuple[Any, str, float]) -> None:
    """Tune the settings' net with a norm, for a task, in so many seconds."""
    norm, task, seconds = request
    model: Any = make_net(replace(settings, norm=norm))
    model = model.to(memory_format=torch.channels_last).train(task == "training")
    x, _ = images_and_masks(settings, settings.batch, settings.size)
    with torch.autocast(settings.device, DTYPE), torch.set_grad_enabled(model.training):
        fastunet.tune(model, x, seconds=seconds, neighbours=None)


def measure_table(settings: Settings, path: Path, budget: Budget) -> list[autotune.Row]:
    """Tune the nets within the budget, and write what is known of the GPU then to path; return its rows."""
    name = gpu.target(settings.torch_device).name
    with Spawned(tune_net, settings) as process:
        for norm, task in ((norm, task) for norm in NORMS for task in TASKS):
            left = budget.left()
            if left < LEAST:
                break
            try:
                process.ask((norm, task, left), left)
                print(f"{budget.left():6.0f} s left  {norm} norm, {task}: done", flush=True)
            except (TimeoutError, ChildProcessError) as error:
                print(f"{budget.left():6.0f} s left  {norm} norm, {task}: {error}", flush=True)
    rows = autotune.read_table(autotune.cache_file(name), autotune.environment(name))
    autotune.write_table(path, environment(settings.device), rows)
    return [*rows.values()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE", help="instead of kernels/tuned/<gpu>.json")
    parser.add_argument("--minutes", type=float, default=30.0, help="after which the search has ended")
    add_settings(parser, Settings(), "size", "batch", "features")


def run(options: argparse.Namespace) -> int:
    """Measure and write the table; return 0 if it has a layer, else 1."""
    if not torch.cuda.is_available():
        raise ConfigError("there is nothing to tune: torch finds no CUDA device here")
    settings = settings_of(options)
    unsupported = dispatch.triton_unsupported(settings.torch_device, DTYPE)
    if unsupported is not None:
        raise ConfigError(f"there is nothing to tune: {unsupported}")
    path = options.out or autotune.table_path(gpu.target(settings.torch_device).name)
    rows = measure_table(settings, path, Budget(60 * options.minutes - RESERVE))
    print(f"{tune_table(rows)}\n{path}")
    return 0 if any("speedup" in row for row in rows) else 1
