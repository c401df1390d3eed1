"""What is timed beside the first implementation of a layer or a net: our other forms, CUDA graphs, other libraries."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

import fastunet

from .gate import NetGate, check_layer
from .layer_runs import Inputs, Runs, check_last_image
from .layers import Layer
from .net_runs import images, target_for
from .opponents import OURS, OURS_TRITON, Opponent, Unavailable, layer_opponents, net_opponents
from .search import subject_of, within
from .steps import DTYPE, Settings

Run = Callable[[], Any]
# What could not be timed, by name, with the reason.
Absent = dict[str, str]


def layer_rivals(layer: Layer, device: torch.device, sets: Sequence[Inputs], *, compiled: bool) -> tuple[Runs, Absent]:
    """Others' runs of the layer, forward: what torch.compile makes of it, or all the rest; only right ones."""

    def prepare(opponent: Opponent) -> list[Run]:
        runs = [opponent.prepare(each) for each in sets]
        check_layer(layer, sets[0], runs[0]())
        return runs

    found = [each for each in layer_opponents(layer, device, DTYPE) if not each.name.startswith("fastunet")]
    return _prepared([each for each in found if _is_compiled(each) == compiled], prepare)


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
        run = opponent.prepare(copy.deepcopy(model), x, target if training else None)
        gate.check(opponent, run())
        return [run]

    # Ours under a backend is timed already.
    found = [each for each in net_opponents(x.device, DTYPE, training=training) if each.name not in (OURS, OURS_TRITON)]
    wanted = [each for each in found if (each.name == only if only else not _is_compiled(each))]
    runs, absent = _prepared(wanted, prepare)
    return {name: run for name, (run,) in runs.items()}, absent


def _is_compiled(opponent: Opponent) -> bool:
    return opponent.name.startswith("compile")


def _prepared(opponents: Sequence[Opponent], prepare: Callable[[Opponent], list[Run]]) -> tuple[Runs, Absent]:
    runs: Runs = {}
    absent: Absent = {}
    for opponent in opponents:
        try:
            if opponent.unavailable:
                raise Unavailable(opponent.unavailable)
            runs[opponent.name] = prepare(opponent)
        except Exception as error:  # Another library's: the rest is still worth its time.
            absent[opponent.name] = reason_of(error)
    return runs, absent


def reason_of(error: Exception) -> str:
    """Why something has no time. An assertion is the parity check's."""
    if isinstance(error, AssertionError):
        return f"parity failed: {error}"[:500]
    return str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"[:500]


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
