"""What there is to measure: settings, the steps in the order of their worth, what is known of each beforehand."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from fastunet.testing import cpu_accumulates_in_float32, parity

from .cases import Layer, Settings
from .results import Row

# What layers and nets are timed in.
DTYPE = torch.bfloat16
DIRECTIONS = ("forward", "backward")
TASKS = ("inference", "training")
COMPILED = "compiled"
# What torch.compile makes of a net, by the opponents' names: each takes a minute, and is a step of its own.
COMPILED_NETS = ("compile max-autotune", "compile CUDA graphs", "compile", "compile freezing")


@dataclass(frozen=True)
class Step:
    """One row to measure, of this kind:

    "parity": name is the case's number, variant the number format. "layer": the layer; the direction, or COMPILED for
    forward beside what torch.compile makes of it. "net": the task; variant empty or one of COMPILED_NETS. "tune": the
    layer, and which of its kernels. "margin": one of margin_cases, and the task. "roofs": the device's.
    "clock": the layer that is timed by another timer too.
    """

    kind: str
    name: str
    variant: str = ""


def all_steps(settings: Settings) -> list[Step]:
    """In the order of their worth, should the time not suffice for all. Compiling takes long and comes late."""
    cases = [str(i) for i in range(len(parity.cases()))]
    layers = [layer.name for layer in settings.net_layers()]
    formats = parity_formats(settings.device)
    steps = [Step("parity", case, formats[0]) for case in cases]
    steps += [Step("roofs", "copy, matmul, L2")]
    steps += [Step("layer", name, DIRECTIONS[0]) for name in layers]
    steps += [Step("net", task) for task in TASKS]
    if settings.device == "cuda":  # The other timer is CUDA's alone.
        steps += [Step("clock", layers[1])]
    steps += [Step("layer", name, DIRECTIONS[1]) for name in layers]
    steps += [Step("net", task, name) for name in COMPILED_NETS for task in TASKS]
    steps += [Step("parity", case, name) for name in formats[1:] for case in cases]
    return steps + [Step("layer", name, COMPILED) for name in layers]


def parity_formats(device: str) -> list[str]:
    """The number formats of that device, the one that is timed first.

    TF32 is a GPU's alone, and a dtype in which the processor's convolutions do not accumulate in float32 lies beyond
    any bound that assumes it: no error of ours could be told from torch's.
    """
    if device == "cuda":
        return list(parity.FORMATS)
    return [n for n, (dtype, tf32) in parity.FORMATS.items() if not tf32 and cpu_accumulates_in_float32(dtype)]


def describe(settings: Settings, step: Step) -> Row:
    """The part of a step's row that is known beforehand."""
    row: Row = asdict(step)
    if step.kind == "parity":
        row["name"] = str(parity.cases()[int(step.name)])
    if step.kind in ("layer", "tune", "clock"):
        layer = layer_of(settings, step.name)
        row["op"], row["shapes"] = layer.op, {name: list(shape) for name, shape in layer.shapes.items()}
        row["flops"] = layer.backward_flops if step.variant == "backward" else layer.flops
    if step.kind == "net":
        work = [(layer.flops, layer.flops + layer.backward_flops) for layer in settings.net_layers()]
        row["flops"] = sum(flops[TASKS.index(step.name)] for flops in work)
    return row


def failure(error: Exception) -> Row:
    """ "status" and "reason" of a row that the error has ended. An assertion is the parity check's."""
    if isinstance(error, AssertionError):
        return {"status": "parity failed", "reason": str(error)}
    return {"status": "failed", "reason": f"{type(error).__name__}: {str(error).strip()}"[:2000]}


def is_ours(implementation: str) -> bool:
    """Whether a name among a row's times is of fastunet with its kernels."""
    return implementation.startswith(("triton", "fastunet"))


def layer_of(settings: Settings, name: str) -> Layer:
    return next(layer for layer in settings.net_layers() if layer.name == name)
