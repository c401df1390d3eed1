"""The steps of the GPU report: what there is to measure, in the order of its worth, and how each gives its row.

Nothing is timed before its results were compared with float64. Steps follow each other within a budget of time, in a
process that may hang, crash or lose its GPU. Ours are the Triton kernels, where they run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from fastunet.kernels import autotune, gpu
from fastunet.kernels.conv3x3 import config, config_search
from torch import Tensor

import fastunet
from fastunet.measuring.timing import clock_of, cudnn_benchmark
from fastunet.testing import cpu_accumulates_in_float32, float32_precision, parity
from fastunet.testing.parity import backends_for

from .cases import DIRECTIONS, TASKS, Layer, Settings, fused_pass
from .harness.worker import LEAST, Budget, Spawned
from .providers import COMPILED_NETS, OURS, OURS_TRITON, Provider, Run, layer_providers, net_providers
from .results import Row, failure
from .roofline import burst_and_steady, measure_peak_rates
from .runs import (
    Runs,
    case_run,
    layer_runs,
    measured,
    net_runs,
    peak_bytes,
    wanted_of,
)
from .tables import COMPILED

# Seconds that one step may take: most go to Triton's and ptxas's first compilation, and none should take half of this.
STEP_LIMIT = 90.0
# The same where torch.compile tries every configuration of every op of a net.
_COMPILED_NET_LIMIT = 150.0
# An op chooses, remembers its choice, and follows it: each way is checked.
_CALLS = 3


@dataclass(frozen=True)
class Step:
    """One row to measure, of this kind:

    "parity": name is the case's number, variant the number format. "layer": the layer; the direction, or COMPILED for
    forward beside what torch.compile makes of it. "net": the task; variant empty or one of COMPILED_NETS, which take a
    minute each. "peak rates": the device's.
    """

    kind: str
    name: str
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name} {self.variant}".strip()


def all_steps(settings: Settings) -> list[Step]:
    """In the order of their worth, should the time not suffice for all. Compiling takes long and comes late."""
    cases = [str(i) for i in range(len(parity.cases()))]
    layers = [layer.name for layer in settings.net_layers()]
    formats = parity_formats(settings.device)
    steps = [Step("parity", case, formats[0]) for case in cases]
    steps += [Step("peak rates", "copy, matmul, L2")]
    steps += [Step("layer", name, DIRECTIONS[0]) for name in layers]
    steps += [Step("net", task) for task in TASKS]
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
    row: Row = asdict(step) | {"status": "ok", "reason": ""}
    if step.kind == "parity":
        case = parity.cases()[int(step.name)]
        row |= {"name": str(case), "op": case.op}
    if step.kind == "layer":
        layer, is_backward = settings.layer(step.name), step.variant == "backward"
        row |= {"op": layer.op, "flops": layer.backward_flops if is_backward else layer.flops}
        row["shapes"] = {name: list(shape) for name, shape in layer.shapes.items()}
        if not is_backward:
            row["bytes"] = fused_pass(layer, settings.torch_dtype.itemsize).bytes
    if step.kind == "net":
        layers = settings.net_layers()
        backward = sum(layer.backward_flops for layer in layers) if step.name == "training" else 0
        row |= {"flops": backward + sum(layer.flops for layer in layers), "images": settings.batch}
    return row


# --- measuring ---


Measure = Callable[[Settings, Step, list[Provider]], Row]


def run_step(settings: Settings, step: Step, measure: Measure | None = None) -> Row:
    """Measure: the row, with "status" and "reason" of whatever error ended it.

    measure: what gives the row of a layer or a net by its providers, ours first, instead of `_timed`.
    """
    row, device = describe(settings, step), settings.torch_device
    try:
        if step.kind == "peak rates":
            return row | measure_peak_rates(device)
        dtype, allow_tf32 = parity.FORMATS[step.variant] if step.kind == "parity" else (settings.torch_dtype, False)
        # Of a net's ops, the convolution decides: where it has no kernel that runs here, there is nothing to compare.
        backends, row["why_no_triton"] = backends_for(row.get("op", "conv3x3_batch_norm_relu"), device, dtype)
        row["implementation"] = backends[0]
        with float32_precision("tf32" if allow_tf32 else "ieee"), fastunet.backend(backends[0]):
            if step.kind != "parity":
                return row | (measure or _timed)(settings, step, reported(settings, step, backends))
            for _ in range(_CALLS if device.type == "cuda" else 1):
                parity.check(parity.cases()[int(step.name)], dtype, device, allow_tf32=allow_tf32)
            return row
    except Exception as error:
        return row | failure(error)


def providers_of(settings: Settings, step: Step) -> list[Provider]:
    """Return what a layer's forward pass or a net can be timed with, ours first."""
    options: dict[str, Any] = {"device": settings.torch_device, "dtype": settings.torch_dtype}
    options["thorough"] = settings.thorough
    if step.kind == "net":
        return net_providers(training=step.name == "training", **options)
    return layer_providers(settings.layer(step.name), **options)


def reported(settings: Settings, step: Step, backends: Sequence[str]) -> list[Provider]:
    """Return what the report times a layer or a net with, ours first.

    A layer forward: also our other variants and other libraries, or what torch.compile makes of it. A net: a variant is
    one provider by its name; without one, all but what torch.compile makes.
    """
    if step.variant == "backward":
        layer = settings.layer(step.name)
        case, wanted = parity.Case(layer.op, layer.shapes), wanted_of(layer)
        run = functools.partial(case_run, case, direction="backward", wanted=wanted)
        named = zip([OURS, *backends[1:]], backends, strict=True)
        return [Provider(name, "NHWC", "bfloat16", functools.partial(run, backend=backend)) for name, backend in named]
    ours, *others = [each for each in providers_of(settings, step) if each.name != OURS_TRITON]
    if step.variant in COMPILED_NETS:
        return [ours, *(each for each in others if each.name == step.variant)]
    others = [each for each in others if each.compiles == (step.variant == COMPILED)]
    if backends[0] != "triton" or step.variant == COMPILED or step.kind == "net":
        return [ours, *others]
    return [ours, *variants_of(settings, settings.layer(step.name)), *others]


def runs_of(settings: Settings, step: Step, providers: Sequence[Provider]) -> tuple[Row, Runs]:
    """Return `runs.prepared` of a layer's or a net's providers."""
    if step.kind == "net":
        return net_runs(settings, step.name, providers)
    return layer_runs(settings, settings.layer(step.name), providers, backward=step.variant == "backward")


def _timed(settings: Settings, step: Step, providers: list[Provider]) -> Row:
    """In turn and, of a net, each without a break: "steady_ms", "peak_bytes", by name."""
    device = settings.torch_device
    row, runs = runs_of(settings, step, providers)
    row = measured(settings, row, runs)
    if step.kind == "layer":
        return row
    # The memory of a graph was taken when it was captured.
    row["peak_bytes"] = {name: peak_bytes(run, device) for name, (run,) in runs.items() if "CUDA graph" not in name}
    row["steady_ms"] = {}
    for name, (run,) in runs.items():
        with cudnn_benchmark():
            _, steady = burst_and_steady(run, clock_of(device), seconds=settings.steady_seconds)
        row["steady_ms"][name] = 1e3 * steady.median
    return row


def variants_of(settings: Settings, layer: Layer) -> list[Provider]:
    """Our 3x3 convolution in the variants but the one that is chosen."""
    if "conv3x3" not in layer.op:
        return []

    def prepare(candidate: Any, inputs: dict[str, Tensor]) -> Run:
        run = case_run(parity.Case(layer.op, layer.shapes), inputs, "triton", "forward")

        def overridden() -> Any:
            with autotune.overriding(config.CONV3X3, candidate):
                return run()

        return overridden

    (_, c1, height, width), *others = layer.inputs.values()
    c2, c_out = others[0][1] if others else 0, layer.shapes["weight"][0]
    shape = config.ConvShape(c1, c2, c_out, height, width, config.aligned(c1, c2, c_out))
    dtype, target = settings.torch_dtype, gpu.target(settings.torch_device)
    chosen = config.conv_config(shape, dtype, target, allow_tf32=False)
    found = config_search.conv_variants(shape, dtype, target, allow_tf32=False)
    return [
        Provider(f"{OURS}, {variant} variant", "NHWC", "bfloat16", functools.partial(prepare, candidate))
        for variant, candidate in found.items()
        if variant != chosen.variant
    ]


# --- within a budget, in a process ---


def answer(settings: Settings, step: Step, measure: Measure | None = None) -> tuple[Row, bool]:
    """The step's row, and whether this process can go on: not where an error has left the GPU's context unusable."""
    row = run_step(settings, step, measure)
    if settings.device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # The next step's memory.
        except RuntimeError:
            return row, False
    return row, True


def run_steps(
    settings: Settings, steps: Sequence[Step], budget: Budget, save: Callable[[list[Row]], None], known: Sequence[Row]
) -> list[Row]:
    """A row for each step, "skipped" where the budget does not reach; save gets all rows there are after each.

    known: rows of steps that are not to be measured again.
    """
    rows: list[Row] = []
    by_step = {(row["kind"], row["name"], row["variant"]): row for row in known}
    with Spawned(answer, settings) as process:
        for step in steps:
            left = budget.left()
            limit = min(_COMPILED_NET_LIMIT if step.kind == "net" and step.variant else STEP_LIMIT, left)
            row = describe(settings, step)
            if (earlier := by_step.get((row["kind"], row["name"], row["variant"]))) is not None:
                rows.append(earlier)
                continue
            if left < LEAST:
                rows.append(row | {"status": "skipped", "reason": "no time left"})
                continue
            try:
                row, is_usable = process.ask(step, limit)
                if not is_usable:
                    process.close()
            except TimeoutError as error:
                row |= {"status": "timed out", "reason": str(error)}
            except ChildProcessError as error:
                row |= {"status": "failed", "reason": str(error)}
            rows.append(row)
            print(f"{budget.left():6.0f} s left  {step}: {row['status']} {row['reason'][:200]}".rstrip(), flush=True)
            save(rows)
    save(rows)
    return rows
