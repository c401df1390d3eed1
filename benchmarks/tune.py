"""Measure which configurations are fastest on this GPU, and where they are faster than ATen: the table that
`kernels/tuned/` holds of it.

    python -m benchmarks tune --out FILE [--minutes 30] [--size 512] [--batch 16]

For every 3x3 convolution of UNet(3, 2), forward and both gradients, and every upsampling composed with the convolution
after it, in bfloat16: the possible configurations, the heuristic one's neighbours first, each compared with float64 and
timed in turn. Then, with the fastest, the layers of such nets, norms and all, beside ATen, by which `auto` chooses: in
inference a call without gradients, in training the call and its backward, because the two are chosen together (but by
ops that do not know in their forward whether a backward follows: that goes by inference). FILE is written anew after
each shape, so that what is measured is never lost; rows of other shapes that FILE has already stay. `cp FILE
kernels/tuned/` puts it to use: `--tuned` writes it there at once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from fastunet.kernels import gpu, tuning
from fastunet.kernels.conv3x3 import config, config_search
from fastunet.kernels.conv3x3.config import ConvShape

import fastunet
from fastunet import dispatch
from fastunet.files import write_json
from fastunet.testing import parity
from fastunet.testing.parity import Case
from fastunet.timing import Quantiles, ratio

from .cases import CONV, CONV_HEAD, DTYPE, TASKS, UP_CONV, Layer, Settings, up_convolutions
from .gpu_steps import Step, run_steps, tuned_run
from .harness.environment import environment
from .harness.worker import Budget
from .providers import Run, reason_of
from .results import Row
from .runs import case_inputs, case_run, samples_in_turn
from .tables import tune_table

_RESERVE = 6.0
# The share of the time in which configurations are searched for.
_SEARCH = 0.6
# Seconds for compiling and checking a layer's candidates; after them those are timed that there are.
_PREPARING = 50.0
# The parts of a table, and the rows' keys under which they have their entries.
_PARTS = {"configs": "entry", "layers": "layer"}
_EPS = 1e-5
WEIGHT_GRAD = "conv3x3_weight_grad"
KERNELS = (config.CONV3X3, config.COMPOSED, WEIGHT_GRAD, config.INPUT_GRAD)

# --- configurations ---


def tune_steps(settings: Settings) -> list[Step]:
    """Forward first, then upsampling composed, then gradients; of each, a shape once, and the most work first."""
    steps: dict[tuple[str, ConvShape], Step] = {}
    for kernel in KERNELS:
        for layer in sorted(_layers_of(settings, kernel), key=lambda layer: -layer.flops):
            if layer.input_has_grad or kernel != config.INPUT_GRAD:
                steps.setdefault((kernel, conv_shape(layer.shapes, kernel)), Step("tune", layer.name, kernel))
    return [*steps.values()]


def _layers_of(settings: Settings, kernel: str) -> list[Layer]:
    layers = settings.net_layers()
    return up_convolutions(layers) if kernel == config.COMPOSED else [each for each in layers if CONV in each.op]


def conv_shape(shapes: Mapping[str, tuple[int, ...]], kernel: str) -> ConvShape:
    """The shape by which the kernel's configurations are known, of an op with these tensors."""
    channels = [shapes[name][1] for name in ("x", "skip", "up", "low") if name in shapes]
    (c1, c2), c_out = (*channels, 0)[:2], shapes["weight"][0]
    sides = shapes.get("low", next(iter(shapes.values())))[2:]
    if kernel == config.COMPOSED:
        return ConvShape(c1, c2, c_out, *sides)
    if kernel == WEIGHT_GRAD:  # Of two inputs, which each have their own, the first.
        return ConvShape(c1, 0, c_out, *sides)
    aligned = config.aligned(c1, c2, c_out)
    if kernel == config.CONV3X3:
        return ConvShape(c1, c2, c_out, *sides, aligned)
    return ConvShape(c_out, 0, c1, *sides, aligned, c_out2=c2)


def candidates_of(kernel: str, shape: ConvShape, target: gpu.Target) -> Sequence[Any]:
    """The configurations to try, the heuristic one first."""
    if kernel == config.COMPOSED:
        return config_search.feasible_composed_configs(shape, DTYPE, target)
    if kernel == WEIGHT_GRAD:
        return config_search.feasible_weight_grad_configs(shape, DTYPE, target, allow_tf32=False)
    splits = kernel == config.CONV3X3
    return config_search.feasible_conv_configs(shape, DTYPE, target, allow_tf32=False, splits=splits)


def search(settings: Settings, step: Step) -> Row:
    """Measure the candidates for one layer's kernel: "entry", a row of a table, and what was tried and dropped.

    AssertionError if none is right.
    """
    device, kernel = settings.torch_device, step.variant
    layer = next(each for each in _layers_of(settings, kernel) if each.name == step.name)
    shape, is_grad = conv_shape(layer.shapes, kernel), kernel in (WEIGHT_GRAD, config.INPUT_GRAD)
    case = Case(layer.op, layer.shapes, backward=is_grad)
    if (reason := _unsupported(case, device)) is not None:
        return {"status": "skipped", "reason": reason}
    sets = case_inputs(case, DTYPE, device)
    parameters = ("weight", "bias")
    wanted = [name for name in layer.shapes if (name in parameters) == (kernel == WEIGHT_GRAD)] if is_grad else None

    def runs_of(backend: str) -> list[Run]:
        return [case_run(case, each, backend, "backward" if is_grad else "forward", wanted) for each in sets]

    ours = runs_of("triton")

    def prepare(candidate: Any) -> list[Run]:
        with fastunet.backend("triton"), tuning.pinned(kernel, candidate):
            parity.check(_one_image(case), DTYPE, device)
        return [tuned_run(kernel, candidate, run) for run in ours]

    found = choose(candidates_of(kernel, shape, gpu.target(device)), prepare, runs_of("aten"), settings)
    entry = tuning.as_row(kernel, shape, DTYPE, False, found.pop("winner"))
    return {"entry": entry | {name: found[name]["median"] for name in found if name.startswith("margin")}, **found}


def choose(
    candidates: Sequence[Any],
    prepare: Callable[[Any], list[Run]],
    aten: list[Run],
    settings: Settings,
    now: Callable[[], float] = time.monotonic,
    timer: Callable[[Settings, Mapping[str, Sequence[Run]]], dict[str, list[float]]] = samples_in_turn,
) -> Row:
    """The fastest right candidate as "winner", how many were "tried", those "dropped", and by how many times the
    heuristic one, candidates[0], and ATen take longer, as quantiles of the rounds' ratios.

    The winner of the first timing is timed again, against those two alone: the best of many samples is always
    flattered. The heuristic one stays where it is right and no other is faster in nine rounds of ten. AssertionError if
    none is right.
    """
    end = now() + _PREPARING
    right: dict[int, list[Run]] = {}
    dropped: list[Row] = []
    for i, candidate in enumerate(candidates):
        if i and now() >= end:
            break
        try:
            right[i] = prepare(candidate)
        except Exception as error:  # The parity check's, a compiler's, or too many resources: the others may still run.
            dropped.append({"config": asdict(candidate), "reason": reason_of(error)})
    if not right:
        raise AssertionError(f"none of {len(dropped)} configurations is right: {dropped[0]['reason']}")
    first = timer(settings, {str(i): runs for i, runs in right.items()})
    best = min(right, key=lambda i: Quantiles.of(first[str(i)]).median)
    heuristic = {"derived": right[0]} if 0 in right else {}
    samples = timer(settings, {"winner": right[best], "aten": aten, **heuristic})
    if heuristic and (best == 0 or ratio(samples, "derived", "winner").p10 <= 1):
        best, samples["winner"] = 0, samples["derived"]
    margins = {f"margin_over_{name}": asdict(ratio(samples, name, "winner")) for name in samples if name != "winner"}
    return {"winner": candidates[best], "tried": len(right) + len(dropped), "dropped": dropped, **margins}


# --- the layers of nets, ours and ATen's ---


def speedup_steps(settings: Settings) -> list[Step]:
    """Of each op and size one, in inference and in training; those first in whose layers there is most work."""
    cases = net_cases(settings).items()
    return [
        Step("speedup", name, task) for task in TASKS for name, case in cases if task == "inference" or case.backward
    ]


def net_cases(settings: Settings) -> dict[str, Case]:
    """By name, the ops that nets of batch norm, of instance norm and without norm call, for the settings' images."""
    layers = settings.net_layers()
    cases: dict[str, Case] = {}
    for layer in sorted(layers, key=lambda layer: -layer.flops):
        for case in _cases_of(layer, settings):
            if not any(case.op == each.op and case.shapes == each.shapes for each in cases.values()):
                cases[f"{layer.name} {case.op}"] = case
    # After their steps, against which they are measured.
    for layer in up_convolutions(layers):
        cases[f"{layer.name} {layer.op}"] = Case(layer.op, layer.shapes, backward=False)
    return cases


def _cases_of(layer: Layer, settings: Settings) -> list[Case]:
    cases = [Case(layer.op, layer.shapes)]
    if layer.op == "conv1x1":
        logits = layer.outputs["y"]
        cases.append(Case("segmentation_sums", {"logits": logits, "target": logits}, {"entropy": True}))
    if CONV not in layer.op:
        return cases
    channels = layer.shapes["bias"]
    affine = {name: shape for name, shape in layer.shapes.items() if name != "bias"}
    affine |= {"gamma": channels, "beta": channels}
    batch, instance = (layer.op.replace(CONV, f"conv3x3_{norm}_norm_relu") for norm in ("batch", "instance"))
    cases.insert(0, Case(batch, affine, {"eps": _EPS, "momentum": 0.1, "training": True}, channels))
    cases.append(Case(instance, affine, {"eps": _EPS}))
    if layer.name == f"up{len(settings.features) - 1}.c2":
        head = {"head_weight": (settings.out_channels, *channels, 1, 1), "head_bias": (settings.out_channels,)}
        cases.append(Case(CONV_HEAD, {**layer.shapes, **head}, backward=False))
    return cases


def speedup(settings: Settings, step: Step) -> Row:
    """Measure one: "layer", a row of a table's "layers". AssertionError where an image comes out wrong.

    An upsampling composed with the convolution after it is measured beside the two as `auto` runs them by the table
    there is.
    """
    table = nullcontext() if settings.table is None else tuning.reading(Path(settings.table))
    device, training = settings.torch_device, step.variant == "training"
    case = replace(net_cases(settings)[step.name], backward=training)
    if "training" in case.options:  # Batch norm: of the batch's statistics, or of the running ones.
        case = replace(case, options={**case.options, "training": training})
    with table:
        if (reason := _unsupported(case, device)) is not None:
            return {"status": "skipped", "reason": reason}
        with fastunet.backend("triton"):
            parity.check(_one_image(case), DTYPE, device)
        direction, sets = "both" if training else "forward", case_inputs(case, DTYPE, device)
        runs = {backend: [case_run(case, each, backend, direction) for each in sets] for backend in ("triton", "aten")}
        if case.op == UP_CONV:
            runs["aten"] = [case_run(case, each, "auto", direction, function=_in_two) for each in sets]
        samples = samples_in_turn(settings, runs)
    image, weight = next(iter(sets[0].values())), sets[0].get("weight")
    layer = tuning.layer(parity.registered(case.op), image, weight, training=training)
    margin = asdict(ratio(samples, "aten", "triton"))
    return {"layer": tuning.as_layer_row(layer, DTYPE, False) | {"margin_over_aten": margin}}


def _in_two(op: str, inputs: Mapping[str, Any], buffers: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    skip, low, up_weight, up_bias, weight, bias = inputs.values()
    up = fastunet.ops.conv_transpose2x2(low, up_weight, up_bias)
    return fastunet.ops.concat_conv3x3_bias_relu(skip, up, weight, bias)


def _one_image(case: Case) -> Case:
    images = ("x", "skip", "up", "low", "logits", "target")
    return replace(case, shapes={k: (1, *shape[1:]) if k in images else shape for k, shape in case.shapes.items()})


def _unsupported(case: Case, device: torch.device) -> str | None:
    """Why no kernel composes an upsampling with the convolution after it there, or None."""
    if case.op != UP_CONV:
        return None
    asked = [torch.empty(_one_image(case).shapes[name], device=device, dtype=DTYPE) for name in ("skip", "weight")]
    with fastunet.backend("triton"):
        choice = dispatch.choose(UP_CONV, *asked)
    return None if choice.implementation == "triton" else choice.reason


# --- the table ---


def table(
    rows: Sequence[Row], name: str, found: dict[str, Any], before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The table of a GPU of that name from the rows of searches and speedups: an entry for each, with what it was
    measured with. before: a table whose other entries stay.
    """
    measured = {key: found.get(key) for key in ("commit", "dirty", "torch", "triton", "cudnn", "driver")}
    tables: dict[str, Any] = {"gpu": name}
    for part, key in _PARTS.items():
        entries = [row[key] | {"name": row["name"], "measured": measured} for row in rows if key in row]
        taken = [_identity(entry) for entry in entries]
        kept = [entry for entry in (before or {}).get(part, ()) if _identity(entry) not in taken]
        tables[part] = [*entries, *kept]
    return tables


def _identity(entry: dict[str, Any]) -> dict[str, Any]:
    """What an entry is of: layers that differ in pooling alone are told by their names."""
    named = ("op", "dtype", "shape") if "shape" in entry else ("name", "dtype", "height", "width", "training")
    return {key: entry[key] for key in named}


def table_name(device: str) -> str:
    """The name of the file by which `tuning` finds the device's table."""
    return tuning.table_path(gpu.target(torch.device(device)).name).name


def measure_table(settings: Settings, path: Path, budget: Budget) -> list[Row]:
    """Search for configurations in a share of the time, and measure speedups in the rest; the rows of both.

    Both go into the table at path, whole after each row.
    """
    name = gpu.target(settings.torch_device).name

    def keep(rows: list[Row]) -> None:
        if any(key in row for row in rows for key in _PARTS.values()):
            before = json.loads(path.read_text()) if path.is_file() else None
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, table(rows, name, environment(settings.device), before))

    searching = Budget(_SEARCH * budget.left())
    rows = run_steps(settings, tune_steps(settings), searching, keep)
    tuned = replace(settings, table=str(path))
    return rows + run_steps(tuned, speedup_steps(settings), budget, keep)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="FILE")
    where.add_argument("--tuned", action="store_true", help="write kernels/tuned/<gpu>.json")
    parser.add_argument("--minutes", type=float, default=30.0, help="after which the search has ended")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", type=int, default=512, help="side of the square images")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--features", type=int, nargs="+", default=Settings().features)


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure and write the table; return 0 if there is one, else 1."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here")
    unsupported = dispatch.triton_unsupported(torch.device(options.device), DTYPE)
    if unsupported is not None:
        parser.error(f"there is nothing to tune: {unsupported}")
    settings = Settings(device=options.device, size=options.size, batch=options.batch, features=tuple(options.features))
    path = tuning.TUNED / table_name(options.device) if options.tuned else options.out
    rows = measure_table(settings, path, Budget(60 * options.minutes - _RESERVE))
    print(tune_table(rows))
    if not path.is_file():
        return 1
    if not options.tuned:
        print(f"cp {path} {tuning.TUNED / table_name(options.device)}")
    return 0
