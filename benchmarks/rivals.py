"""What is timed beside the first implementation of a layer or a net: our other forms, CUDA graphs, other libraries."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

import fastunet

from .cases import Layer, Settings
from .gate import NetGate, check_layer, runs_or_reason
from .layer_runs import Inputs, Runs, check_last_image
from .net_runs import images, target_for
from .opponents import OURS, OURS_TRITON, Opponent, Run, layer_opponents, net_opponents, reason_of
from .search import subject_of, within
from .steps import DTYPE

# What could not be timed, by name, with the reason.
Absent = dict[str, str]


def layer_rivals(layer: Layer, device: torch.device, sets: Sequence[Inputs], *, compiled: bool) -> tuple[Runs, Absent]:
    """Others' runs of the layer, forward: what torch.compile makes of it, or all the rest; only right ones."""

    def prepare(opponent: Opponent) -> list[Run]:
        return [opponent.prepare(each) for each in sets]

    def check(opponent: Opponent, result: Any) -> None:
        check_layer(layer, sets[0], result)

    found = [each for each in layer_opponents(layer, device, DTYPE) if not each.name.startswith("fastunet")]
    return _prepared([each for each in found if _is_compiled(each) == compiled], prepare, check)


def net_rivals(
    settings: Settings, model: fastunet.UNet, only: str = "", *, training: bool
) -> tuple[dict[str, Run], Absent]:
    """Others' runs of the same net, and ours as a CUDA graph: inference, or a training step; only right ones.

    only: one by its name; else all but what torch.compile makes, which takes long.
    """
    x = images(settings, settings.batch, settings.size)
    target = target_for(settings, x)
    gate = NetGate(model, x, target, training=training)

    def prepare(opponent: Opponent) -> list[Run]:
        return [opponent.prepare(copy.deepcopy(model), x, target if training else None)]

    # Ours under a backend is timed already.
    found = [each for each in net_opponents(x.device, DTYPE, training=training) if each.name not in (OURS, OURS_TRITON)]
    wanted = [each for each in found if (each.name == only if only else not _is_compiled(each))]
    runs, absent = _prepared(wanted, prepare, gate.check)
    return {name: run for name, (run,) in runs.items()}, absent


def _is_compiled(opponent: Opponent) -> bool:
    return opponent.name.startswith("compile")


def _prepared(
    opponents: Sequence[Opponent], prepare: Callable[[Opponent], list[Run]], check: Callable[[Opponent, Any], object]
) -> tuple[Runs, Absent]:
    runs: Runs = {}
    absent: Absent = {}
    for opponent in opponents:
        found = opponent.unavailable or runs_or_reason(opponent, prepare, check)
        if isinstance(found, str):
            absent[opponent.name] = found
        else:
            runs[opponent.name] = found
    return runs, absent


def form_runs(layer: Layer, device: torch.device, sets: Sequence[Inputs], ours: Sequence[Run]) -> tuple[Runs, Absent]:
    """Our runs of a 3x3 convolution, forward, in the forms but the one that is chosen; only those that are right."""
    runs: Runs = {}
    absent: Absent = {}
    if "conv3x3" not in layer.op:
        return runs, absent
    from fastunet.kernels import config, config_search, gpu, tuning  # Late, as triton: it may be absent.

    target = gpu.target(device)
    subject = subject_of(layer, "forward", target)
    chosen = config.conv_config(subject.shape, DTYPE, target, allow_tf32=False)
    for form, candidate in config_search.conv_forms(subject.shape, DTYPE, target, allow_tf32=False).items():
        if form == chosen.form:
            continue
        name = f"triton, {form} form"
        try:
            with fastunet.backend("triton"), tuning.pinned(subject.op, candidate):
                check_last_image(layer, sets[0], backward=False)
            runs[name] = [within(subject.op, candidate, run) for run in ours]
        except Exception as error:
            absent[name] = reason_of(error)
    return runs, absent
