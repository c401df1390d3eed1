"""The steps of the GPU report: what there is to measure, in the order of its worth, and how each gives its row.

A layer or net is timed only after its results were compared with float64; one that is off has no time. Steps follow
each other within a budget of time, in a process that may hang, crash or lose its GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

import fastunet
from fastunet.testing import cpu_accumulates_in_float32, float32_precision, parity
from fastunet.testing.parity import backends_for

from .cases import DIRECTIONS, DTYPE, TASKS, Layer, Settings
from .harness.timing import burst_and_steady, clock_of, cudnn_benchmark, timing_cross_check
from .harness.worker import Budget, Spawned
from .providers import OURS, OURS_TRITON, Provider, Run, layer_providers, net_providers, reason_of
from .results import Row, failure, is_ours
from .roofline import measure_roofs
from .runs import (
    Inputs,
    NetCheck,
    Runs,
    check_last_image,
    check_layer,
    images,
    layer_sets,
    make_net,
    peak_bytes,
    prepare_layer,
    prepare_net,
    right_runs,
    target_for,
    time_in_turn,
)

# Seconds that one step may take: most go to Triton's and ptxas's first compilation, and none should take half of this.
STEP_LIMIT = 90.0
# The same where torch.compile tries every configuration of every op of a net.
_COMPILED_NET_LIMIT = 150.0
# The least that a step is begun with.
_LEAST_STEP = 2.0
# An op chooses, remembers its choice, and follows it: each way is checked.
_CALLS = 3
COMPILED = "compiled"
# What torch.compile makes of a net, by the providers' names: each takes a minute, and is a step of its own.
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
        row["flops"], row["images"] = sum(flops[TASKS.index(step.name)] for flops in work), settings.batch
    return row


def layer_of(settings: Settings, name: str) -> Layer:
    return next(layer for layer in settings.net_layers() if layer.name == name)


# --- measuring ---


def run_step(settings: Settings, step: Step) -> Row:
    """Measure: the row, with "status" "ok" or "parity failed" and a "reason". Errors of the op pass through."""
    row = describe(settings, step)
    try:
        with float32_precision("tf32" if step.variant == "tf32" else "ieee"):
            found = _measured(settings, step, row)
    except AssertionError as error:
        return row | failure(error)
    return row | {"status": "ok", "reason": ""} | found


def _measured(settings: Settings, step: Step, row: Row) -> Row:
    if step.kind == "parity":
        return _parity(settings, step, row)
    if step.kind in ("tune", "margin"):
        # Late: a commit that is compared with this one may lack what these measure beyond its ops.
        from .search import search
        from .tune import margin

        return (search if step.kind == "tune" else margin)(settings, step)
    if step.kind == "roofs":
        return measure_roofs(settings.torch_device)
    times = {"layer": layer_times, "net": net_times, "clock": clock_check}
    return times[step.kind](settings, step, row)


def _parity(settings: Settings, step: Step, row: Row) -> Row:
    device, case = torch.device(settings.device), parity.cases()[int(step.name)]
    dtype, allow_tf32 = parity.FORMATS[step.variant]
    (ours, *_), reason = backends_for(case.op, device, dtype)
    # Known before the check, so that a failing row has it too.
    row["implementation"], row["why_no_triton"] = ours, reason
    with fastunet.backend(ours):
        for _ in range(_CALLS if device.type == "cuda" else 1):
            parity.check(case, dtype, device, allow_tf32=allow_tf32)
    return {}


def clock_check(settings: Settings, step: Step, row: Row) -> Row:
    """ "cross_check": our run of one layer, forward, by our timer and by another."""
    device, layer = settings.torch_device, layer_of(settings, step.name)
    backends, row["why_no_triton"] = backends_for(layer.op, device, DTYPE)
    runs = prepare_layer(layer, layer_sets(layer, device), backends[:1], backward=False)
    return {"cross_check": timing_cross_check(runs[backends[0]][0], clock=clock_of(device))}


def layer_times(settings: Settings, step: Step, row: Row) -> Row:
    """A layer in one direction under each backend; forward also in our other variants and by other libraries."""
    device, layer = settings.torch_device, layer_of(settings, step.name)
    backends, row["why_no_triton"] = backends_for(layer.op, device, DTYPE)
    sets = layer_sets(layer, device)
    runs = prepare_layer(layer, sets, backends, backward=step.variant == "backward")
    row["missing"] = {}
    if step.variant == "forward" and backends[0] == "triton":
        variants, row["missing"] = variant_runs(layer, device, sets, runs["triton"])
        runs |= variants
    if step.variant != "backward":

        def prepare(provider: Provider) -> list[Run]:
            return [provider.prepare(each) for each in sets]

        def check(provider: Provider, result: Any) -> None:
            check_layer(layer, sets[0], result)

        found = [each for each in layer_providers(layer, device, DTYPE) if not is_ours(each.name)]
        chosen = [each for each in found if _is_compiled(each) == (step.variant == COMPILED)]
        others, missing = right_runs(chosen, prepare, check)
        runs, row["missing"] = {**runs, **others}, {**row["missing"], **missing}
    return time_in_turn(settings, runs)


def _is_compiled(provider: Provider) -> bool:
    return provider.name.startswith("compile")


def net_times(settings: Settings, step: Step, row: Row) -> Row:
    """The net's inference or training step under each backend and by others: in turn, and each without a break.

    "steady_ms", "peak_bytes": by name. The variant is one provider by its name; else all but what torch.compile makes.
    """
    device, training = settings.torch_device, step.name == "training"
    # Of the net's ops, the convolution decides: where it has no kernel that runs here, there is nothing to compare.
    backends, row["why_no_triton"] = backends_for("conv3x3_batch_norm_relu", device, DTYPE)
    model = make_net(settings)
    row["parity"], ours = prepare_net(settings, model, backends, training=training)
    peaks = {name: peak_bytes(run, device) for name, run in ours.items()}
    x = images(settings, settings.batch, settings.size)
    target = target_for(settings, x)

    def prepare(provider: Provider) -> list[Run]:
        return [provider.prepare(copy.deepcopy(model), x, target if training else None)]

    with fastunet.backend(backends[0]):
        found = net_providers(device, DTYPE, training=training)
        # Ours under a backend is timed already.
        found = [each for each in found if each.name not in (OURS, OURS_TRITON)]
        chosen = [e for e in found if (e.name == step.variant if step.variant else not _is_compiled(e))]
        others, row["missing"] = right_runs(chosen, prepare, NetCheck(model, x, target, training=training).check)
    # The memory of a graph was taken when it was captured.
    peaks |= {name: peak_bytes(run, device) for name, (run,) in others.items() if "CUDA graph" not in name}
    runs: Runs = {**{name: [run] for name, run in ours.items()}, **others}
    measured = time_in_turn(settings, runs)
    steady = {}
    for name, (run,) in runs.items():
        with cudnn_benchmark():
            _, found_steady = burst_and_steady(run, clock_of(device), seconds=settings.steady_seconds)
        steady[name] = 1e3 * found_steady.median
    return {**measured, "steady_ms": steady, "peak_bytes": peaks}


def variant_runs(
    layer: Layer, device: torch.device, sets: Sequence[Inputs], ours: Sequence[Run]
) -> tuple[Runs, dict[str, str]]:
    """Our runs of a 3x3 convolution, forward, in the variants but the one that is chosen; only those that are right."""
    runs: Runs = {}
    absent: dict[str, str] = {}
    if "conv3x3" not in layer.op:
        return runs, absent
    from fastunet.kernels import gpu, tuning
    from fastunet.kernels.conv3x3 import (
        config,
        config_search,  # Late, as triton: it may be absent.
    )

    from .search import subject_of, within

    target = gpu.target(device)
    subject = subject_of(layer, "forward", target)
    chosen = config.conv_config(subject.shape, DTYPE, target, allow_tf32=False)
    for variant, candidate in config_search.conv_variants(subject.shape, DTYPE, target, allow_tf32=False).items():
        if variant == chosen.variant:
            continue
        name = f"triton, {variant} form"
        try:
            with fastunet.backend("triton"), tuning.pinned(subject.op, candidate):
                check_last_image(layer, sets[0], backward=False)
            runs[name] = [within(subject.op, candidate, run) for run in ours]
        except Exception as error:
            absent[name] = reason_of(error)
    return runs, absent


# --- within a budget, in a process ---


class Worker:
    """Runs steps in a process of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process = Spawned(serve, settings)

    def run(self, step: Step, timeout: float) -> Row:
        """The step's row within `timeout` seconds; of a step that gives none, one that says why."""
        try:
            row, is_usable = self._process.ask(step, timeout)
        except (TimeoutError, ChildProcessError) as error:
            status = "timed out" if isinstance(error, TimeoutError) else "failed"
            return describe(self._settings, step) | {"status": status, "reason": str(error)}
        if not is_usable:
            self.close()
        return row

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.close()


def serve(settings: Settings, connection: Connection) -> None:
    """Answer each step with its row and whether this process can go on."""
    while True:
        try:
            step = connection.recv()
        except EOFError:  # The report is gone.
            return
        try:
            row = run_step(settings, step)
        except Exception as error:
            row = describe(settings, step) | failure(error)
        connection.send((row, _clean_up(settings)))


def _clean_up(settings: Settings) -> bool:
    """Free the step's memory; False where an error has left the GPU's context unusable."""
    if settings.device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


class StepRunner(Protocol):
    """What `measure` needs of a Worker."""

    def run(self, step: Step, timeout: float) -> Row: ...

    def close(self) -> None: ...


def run_steps(
    settings: Settings, steps: Sequence[Step], worker: StepRunner, budget: Budget, save: Callable[[list[Row]], None]
) -> list[Row]:
    """A row for each step, "skipped" where the budget does not reach; save gets all rows there are after each."""
    rows: list[Row] = []
    try:
        for step in steps:
            left = budget.left()
            if left < _LEAST_STEP:
                rows.append(describe(settings, step) | {"status": "skipped", "reason": "no time left"})
                continue
            rows.append(worker.run(step, min(limit_of(step), left)))
            print(_progress(rows[-1], budget), flush=True)
            save(rows)
    finally:
        worker.close()
    save(rows)
    return rows


def limit_of(step: Step) -> float:
    """Seconds that the step may take."""
    return _COMPILED_NET_LIMIT if step.kind == "net" and step.variant else STEP_LIMIT


def _progress(row: Row, budget: Budget) -> str:
    what = f"{row['kind']} {row['name']} {row['variant']}".strip()
    return f"{budget.left():6.0f} s left  {what}: {row['status']} {row['reason'][:200]}".rstrip()
