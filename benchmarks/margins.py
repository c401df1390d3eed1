"""Where the kernels are faster than ATen: the layers of a U-Net as the net runs them, norms and all, ours and ATen's in
turn. Of these `tuning` keeps a table by which `auto` chooses.

A step up, of which one kernel computes both ops, is measured beside the two as `auto` runs them by the table there is.
In inference a layer is one call without gradients; in training it is the call and its backward, because the two are
chosen together (but by ops that do not know in their forward whether a backward follows: that goes by inference). The
kernels have the configurations that the table already holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from fastunet.kernels import tuning
from torch import Tensor

import fastunet
from fastunet.testing import parity
from fastunet.testing.parity import Case

from . import step_up
from .cases import UPSAMPLE, Layer, Settings
from .harness.timing import clock_of, cudnn_benchmark, interleaved_samples, ratio
from .layer_runs import input_sets
from .results import Row
from .steps import DTYPE, TASKS, Step

_PLAIN = "conv3x3_bias_relu"
_EPS = 1e-5
_NORMS = ("conv3x3_batch_norm_relu", "conv3x3_instance_norm_relu")


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
    return cases | {f"{name} {case.op}": case for name, case in step_up.cases(settings.net_layers()).items()}


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
    if case.op == step_up.OP and (reason := step_up.obstacle(case, device)) is not None:
        return {"status": "skipped", "reason": reason}
    one_image = {name: (1, *shape[1:]) if _is_image(name) else shape for name, shape in case.shapes.items()}
    with fastunet.backend("triton"):
        parity.check(replace(case, shapes=one_image, backward=training), DTYPE, device)
    inputs = parity.make_inputs(case.shapes, DTYPE, device)
    images = {name: t.contiguous(memory_format=torch.channels_last) for name, t in inputs.items() if t.dim() == 4}
    sets = input_sets(inputs | images, device)
    runs = {backend: [run_of(case, each, backend, training) for each in sets] for backend in ("triton", "aten")}
    if case.op == step_up.OP:
        runs["triton"], runs["aten"] = step_up.runs(case, device)
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
