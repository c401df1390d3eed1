"""Measure which configurations are fastest on this GPU, and where they are faster than ATen: the table that
`kernels/tuned/` holds of it.

    python -m benchmarks tune --out FILE [--minutes 30] [--size 512] [--batch 16]

For every 3x3 convolution of UNet(3, 2), forward and both gradients, in bfloat16: the possible configurations, the
derived one's neighbours first, compared with float64 and timed in turn (see search); then, with the fastest, the layers
of such nets beside ATen, by which `auto` chooses. FILE is written anew after each shape, so that what is
measured is never lost; rows of other shapes that FILE has already stay. `cp FILE kernels/tuned/` puts it to use:
`--tuned` writes it there at once.

Margins: the layers of a U-Net as the net runs them, norms and all, ours and ATen's in turn. An upsampling with the
convolution after it, of which one kernel computes both ops, is measured beside the two as `auto` runs them by the table
there is. In inference a layer is one call without gradients; in training it is the call and its backward, because the
two are chosen together (but by ops that do not know in their forward whether a backward follows: that goes by
inference).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from fastunet.kernels import gpu, tuning
from torch import Tensor

import fastunet
from fastunet import dispatch
from fastunet.files import write_json
from fastunet.testing import parity
from fastunet.testing.parity import Case

from .cases import DTYPE, TASKS, UPSAMPLE, Layer, Settings
from .gpu_steps import Step, Worker, run_steps
from .harness.environment import environment
from .harness.timing import clock_of, cudnn_benchmark, interleaved_samples, ratio
from .harness.worker import Budget
from .results import Row
from .runs import input_sets
from .search import STEP_UP_OP, step_up_cases, step_up_runs, step_up_unsupported, tune_steps

_RESERVE = 6.0
# The share of the time in which configurations are searched for.
_SEARCH = 0.6
# The parts of a table, and the rows' keys under which they have their entries.
_PARTS = {"configs": "entry", "layers": "layer"}
_PLAIN = "conv3x3_bias_relu"
_EPS = 1e-5
_NORMS = ("conv3x3_batch_norm_relu", "conv3x3_instance_norm_relu")


# --- margins ---


def margin_steps(settings: Settings) -> list[Step]:
    """Of each op and size one, in inference and in training; those first in whose layers there is most work."""
    cases = margin_cases(settings)
    return [Step("margin", name, task) for task in TASKS for name, case in cases.items() if _has(case, task)]


def _has(case: Case, task: str) -> bool:
    return task == "inference" or case.backward


def margin_cases(settings: Settings) -> dict[str, Case]:
    """By name, the ops that nets of batch norm, of instance norm and without norm call, for the settings' images."""
    cases: dict[str, Case] = {}
    layers = [layer for layer in settings.net_layers() if layer.op != UPSAMPLE]
    for layer in sorted(layers, key=lambda layer: -layer.flops):
        for case in _cases_of(layer, settings):
            taken = [(each.op, dict(each.shapes)) for each in cases.values()]
            if (case.op, dict(case.shapes)) not in taken:
                cases[f"{layer.name} {case.op}"] = case
    # After their steps, against which they are measured.
    return cases | {f"{name} {case.op}": case for name, case in step_up_cases(settings.net_layers()).items()}


def _cases_of(layer: Layer, settings: Settings) -> list[Case]:
    if _PLAIN not in layer.op:
        cases = [Case(layer.op, layer.shapes)]
        if layer.op == "conv1x1":
            logits = layer.outputs["y"]
            cases.append(Case("segmentation_sums", {"logits": logits, "target": logits}, {"entropy": True}))
        return cases
    channels = layer.shapes["bias"]
    affine = {name: shape for name, shape in layer.shapes.items() if name != "bias"}
    affine |= {"gamma": channels, "beta": channels}
    batch_norm, instance_norm = (layer.op.replace(_PLAIN, norm) for norm in _NORMS)
    cases = [
        Case(batch_norm, affine, {"eps": _EPS, "momentum": 0.1, "training": True}, channels),
        Case(layer.op, layer.shapes),
        Case(instance_norm, affine, {"eps": _EPS}),
    ]
    if layer.name == f"up{len(settings.features) - 1}.c2":
        head = {"head_weight": (settings.out_channels, *channels, 1, 1), "head_bias": (settings.out_channels,)}
        cases.append(Case("conv3x3_relu_conv1x1", {**layer.shapes, **head}, backward=False))
    return cases


def margin(settings: Settings, step: Step) -> Row:
    """Measure one: "layer", a row of a table's "layers". AssertionError where an image comes out wrong."""
    table = nullcontext() if settings.table is None else tuning.reading(Path(settings.table))
    with table:
        return _margin(margin_cases(settings)[step.name], step.variant, settings)


def _margin(case: Case, task: str, settings: Settings) -> Row:
    device, training = torch.device(settings.device), task == "training"
    if "training" in case.options:  # Batch norm: of the batch's statistics, or of the running ones.
        case = replace(case, options={**case.options, "training": training})
    if case.op == STEP_UP_OP and (reason := step_up_unsupported(case, device)) is not None:
        return {"status": "skipped", "reason": reason}
    one_image = {name: (1, *shape[1:]) if _is_image(name) else shape for name, shape in case.shapes.items()}
    with fastunet.backend("triton"):
        parity.check(replace(case, shapes=one_image, backward=training), DTYPE, device)
    inputs = parity.make_inputs(case.shapes, DTYPE, device)
    images = {name: t.contiguous(memory_format=torch.channels_last) for name, t in inputs.items() if t.dim() == 4}
    sets = input_sets(inputs | images, device)
    runs = {backend: [run_of(case, each, backend, training) for each in sets] for backend in ("triton", "aten")}
    if case.op == STEP_UP_OP:
        runs["triton"], runs["aten"] = step_up_runs(case, device)
    with cudnn_benchmark():
        samples = interleaved_samples(runs, clock_of(device), rounds=settings.rounds, seconds=settings.seconds)
    image, weight = next(iter(inputs.values())), inputs.get("weight")
    layer = tuning.layer(parity.registered(case.op), image, weight, training=training)
    found = asdict(ratio(samples, "aten", "triton"))
    return {"layer": tuning.as_layer_row(layer, DTYPE, False) | {"margin_over_aten": found}}


def _is_image(name: str) -> bool:
    return name in ("x", "skip", "up", "low", "logits", "target")


def run_of(case: Case, inputs: Mapping[str, Tensor], backend: str, training: bool) -> Callable[[], Any]:
    """One call of the case's op under that backend; in training with its backward, for random cotangents."""
    leaves = {name: t.detach().requires_grad_(training and name != "target") for name, t in inputs.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]
    device = next(iter(leaves.values())).device
    buffers = {}
    if case.buffers is not None:
        buffers = {
            "mean": torch.zeros(case.buffers, device=device),
            "variance": torch.ones(case.buffers, device=device),
        }
    cotangents: Sequence[Tensor] = ()
    if training:
        with torch.no_grad():
            cotangents = [torch.randn_like(y) for y in parity.outputs_of(_call(case, inputs, buffers))]

    def run() -> None:
        gradients: AbstractContextManager[Any] = torch.enable_grad() if training else torch.no_grad()
        with gradients, fastunet.backend(backend):
            outputs = parity.outputs_of(_call(case, leaves, buffers))
            if training:
                torch.autograd.grad(outputs, wanted, cotangents)

    return run


def _call(case: Case, inputs: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Any:
    return parity.run_op(case.op, inputs, buffers, case.options)


# --- the table ---


def table(
    rows: Sequence[Row], name: str, found: dict[str, Any], before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The table of a GPU of that name from the rows of searches and margins: an entry for each, with what it was
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


def write_table(path: Path, rows: Sequence[Row], device: str) -> None:
    """Write the table whole, unless nothing has given an entry."""
    if any(key in row for row in rows for key in _PARTS.values()):
        before = json.loads(path.read_text()) if path.is_file() else None
        name = gpu.target(torch.device(device)).name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, table(rows, name, environment(device), before))


def table_name(device: str) -> str:
    """The name of the file by which `tuning` finds the device's table."""
    return tuning.table_path(gpu.target(torch.device(device)).name).name


def line(row: Row) -> str:
    """One search or margin as text, the configurations it dropped below it."""
    name = f"{row['name']} {row['variant']}"
    if "layer" in row:
        return f"{name}: {_margin_text(row['layer'], 'margin_over_aten')}"
    if "entry" not in row:
        return f"{name}: {row['status']}: {row['reason'][:200]}"
    blocks = " ".join(f"{key}={value}" for key, value in row["entry"]["config"].items())
    margins = ", ".join(_margin_text(row, key) for key in ("margin_over_derived", "margin_over_aten") if key in row)
    dropped = "".join(f"\n  dropped {each['config']}: {each['reason'][:200]}" for each in row["dropped"])
    return f"{name}: {blocks}; of {row['tried']}; {margins}{dropped}"


def _margin_text(row: Row, key: str) -> str:
    found = row[key]
    return f"{found['median']:.3f} [{found['p10']:.3f}, {found['p90']:.3f}] x {key.removeprefix('margin_over_')}"


def measure_table(
    settings: Settings, path: Path, budget: Budget, save: Callable[[list[Row]], None] | None = None
) -> list[Row]:
    """Search for configurations in a share of the time, and measure margins in the rest; the rows of both.

    Both go into the table at path. save: gets the rows there are after each.
    """
    rows: list[Row] = []

    def keep(found: list[Row]) -> None:
        write_table(path, found, settings.device)
        if save is not None:
            save([*rows, *found])

    searching = Budget(_SEARCH * budget.left())
    rows += run_steps(settings, tune_steps(settings), Worker(settings), searching, keep)
    tuned = replace(settings, table=str(path))
    return rows + run_steps(tuned, margin_steps(settings), Worker(tuned), budget, keep)


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
    print("\n".join(line(row) for row in rows))
    if not path.is_file():
        return 1
    if not options.tuned:
        print(f"cp {path} {tuning.TUNED / table_name(options.device)}")
    return 0
