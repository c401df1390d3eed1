"""Which configuration of a convolution is fastest for one layer: every candidate is checked, then timed in turn.

A candidate whose results are off, or that does not run, is dropped with the reason. The winner of the first timing is
timed again, against the derived configuration and ATen (cuDNN) alone: the best of many samples is always flattered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from fastunet.kernels import gpu, tuning
from fastunet.kernels.conv3x3 import config, config_search
from fastunet.kernels.conv3x3.config import ConvShape
from torch import Tensor

import fastunet
from fastunet import dispatch, ops
from fastunet.testing import parity
from fastunet.testing.parity import Case

from .cases import DTYPE, Layer, Settings
from .gpu_steps import Step, layer_of
from .harness.timing import Clock, Quantiles, clock_of, cudnn_benchmark, interleaved_samples, ratio
from .providers import reason_of
from .results import Row
from .runs import backward_run, check_last_image, forward_run, input_sets, layer_sets

KINDS = ("forward", "weight_grad", "input_grad")
# Of an upsampling composed with the convolution after it: in inference.
STEP_UP = "step_up"
# Seconds for compiling and checking a layer's candidates; after them those are timed that there are.
_PREPARING = 50.0
_PARAMETERS = ("weight", "bias")
Runs = Sequence[Callable[[], Any]]


@dataclass(frozen=True)
class Subject:
    """The op and shape by which `tuning` knows what is searched, and the candidates, the derived one first."""

    op: str
    shape: ConvShape
    candidates: Sequence[Any]


def subject_of(layer: Layer, kind: str, target: gpu.Target) -> Subject:
    """Of a 3x3 convolution's forward pass or one of its gradients, in the dtype that layers are timed in."""
    shapes = layer.shapes
    channels = [shapes[name][1] for name in ("x", "skip", "up") if name in shapes]
    c1, c2 = (*channels, 0)[:2]
    c_out, sides = shapes["weight"][0], next(iter(shapes.values()))[2:]
    if kind == "weight_grad":  # Of two inputs, which each have their own, the first.
        shape = ConvShape(c1, 0, c_out, *sides)
        found = config_search.feasible_weight_grad_configs(shape, DTYPE, target, allow_tf32=False)
        return Subject("conv3x3_weight_grad", shape, found)
    aligned = config.aligned(c1, c2, c_out)
    if kind == "forward":
        shape = ConvShape(c1, c2, c_out, *sides, aligned)
    else:
        shape = ConvShape(c_out, 0, c1, *sides, aligned, c_out2=c2)
    splits = kind == "forward"
    found = config_search.feasible_conv_configs(shape, DTYPE, target, allow_tf32=False, splits=splits)
    return Subject(config.CONV3X3 if splits else config.INPUT_GRAD, shape, found)


def step_up_subject(case: Case, target: gpu.Target) -> Subject:
    """The same of an upsampling composed with the convolution after it."""
    (_, c1, *_), (_, c_low, *sides), (c_out, *_) = (case.shapes[name] for name in ("skip", "low", "weight"))
    shape = ConvShape(c1, c_low, c_out, *sides)
    return Subject(config.COMPOSED, shape, config_search.feasible_composed_configs(shape, DTYPE, target))


def tune_steps(settings: Settings) -> list[Step]:
    """Forward first, then steps up as one kernel, then gradients; of each, a shape once, and the most work first."""
    steps: dict[tuple[str, ConvShape], Step] = {}
    layers = [layer for layer in settings.net_layers() if "conv3x3" in layer.op]
    for kind in KINDS:
        for layer in sorted(layers, key=lambda layer: -layer.flops):
            if layer.input_has_grad or kind != "input_grad":
                found = subject_of(layer, kind, gpu.INTERPRETER)
                steps.setdefault((kind, found.shape), Step("tune", layer.name, kind))
    forward = [step for step in steps.values() if step.variant == KINDS[0]]
    steps_up = [Step("tune", name, STEP_UP) for name in reversed(step_up_cases(settings.net_layers()))]
    return [*forward, *steps_up, *(step for step in steps.values() if step not in forward)]


def search(settings: Settings, step: Step) -> Row:
    """Measure the candidates of one layer and kind: "entry", a row of a table, and what was tried, dropped and timed.

    AssertionError if none is right.
    """
    device = torch.device(settings.device)
    if step.variant == STEP_UP:
        case = step_up_cases(settings.net_layers())[step.name]
        if (reason := step_up_unsupported(case, device)) is not None:
            return {"status": "skipped", "reason": reason}
        subject = step_up_subject(case, gpu.target(device))
        ours, others = step_up_runs(case, device)

        def check(candidate: Any) -> None:
            with tuning.pinned(subject.op, candidate):
                check_step_up(case, device)

        return _searched(settings, subject, ours, others, check)
    layer = layer_of(settings, step.name)
    subject = subject_of(layer, step.variant, gpu.target(device))
    backward = step.variant != "forward"
    sets = layer_sets(layer, device)
    inputs = sets[0]

    def runs_of(backend: str) -> Runs:
        if not backward:
            return [forward_run(layer, backend, each) for each in sets]
        only = [name for name in inputs if (name in _PARAMETERS) == (step.variant == "weight_grad")]
        return [backward_run(layer, backend, each, only) for each in sets]

    def check_layer(candidate: Any) -> None:
        with fastunet.backend("triton"):
            check_last_image(layer, inputs, backward=backward, around=lambda: tuning.pinned(subject.op, candidate))

    # The graph of a backward pass is made once, by the derived configurations; a pin holds for the pass itself.
    return _searched(settings, subject, runs_of("triton"), runs_of("aten"), check_layer)


def _searched(settings: Settings, subject: Subject, ours: Runs, others: Runs, check: Callable[[Any], None]) -> Row:
    """The row of a subject by calls of the kernel, and of what people have in its place."""

    def prepare(candidate: Any) -> Runs:
        check(candidate)
        return [within(subject.op, candidate, run) for run in ours]

    with cudnn_benchmark():
        found = choose(subject.candidates, prepare, others, clock_of(torch.device(settings.device)), settings)
    winner = found.pop("winner")
    margins = {name: found[name]["median"] for name in ("margin_over_derived", "margin_over_aten") if name in found}
    return {"entry": tuning.as_row(subject.op, subject.shape, DTYPE, False, winner) | margins, **found}


def within(op: str, candidate: Any, run: Callable[[], Any]) -> Callable[[], Any]:
    """The run with that configuration pinned."""

    def pinned() -> None:
        with tuning.pinned(op, candidate):
            run()

    return pinned


def choose(
    candidates: Sequence[Any],
    prepare: Callable[[Any], Runs],
    aten: Runs,
    clock: Clock,
    settings: Settings,
    now: Callable[[], float] = time.monotonic,
) -> Row:
    """The fastest right candidate as "winner", how many were "tried", those "dropped", and the margins: by how many
    times the derived one, candidates[0], and ATen take longer, as quantiles of the rounds' ratios.

    The derived one stays where it is right and no other is faster in nine rounds of ten. AssertionError if none is
    right.
    """
    right, dropped = _right_ones(candidates, prepare, now)
    if not right:
        raise AssertionError(f"none of {len(dropped)} configurations is right: {dropped[0]['reason']}")
    limits: Mapping[str, Any] = {"rounds": settings.rounds, "seconds": settings.seconds}
    first = interleaved_samples({str(i): runs for i, runs in right.items()}, clock, **limits)
    best = min(right, key=lambda i: Quantiles.of(first[str(i)]).median)
    finalists = {"winner": right[best], "aten": aten}
    if 0 in right and best != 0:
        finalists["derived"] = right[0]
    samples = interleaved_samples(finalists, clock, **limits)
    if best == 0:
        samples["derived"] = samples["winner"]
    elif "derived" in samples and ratio(samples, "derived", "winner").p10 <= 1:
        best, samples["winner"] = 0, samples["derived"]
    found: Row = {"winner": candidates[best], "tried": len(right) + len(dropped), "dropped": dropped}
    for name in ("derived", "aten"):
        if name in samples:
            found[f"margin_over_{name}"] = asdict(ratio(samples, name, "winner"))
    found["seconds"] = {name: asdict(Quantiles.of(values)) for name, values in samples.items()}
    return found


def _right_ones(
    candidates: Sequence[Any], prepare: Callable[[Any], Runs], now: Callable[[], float]
) -> tuple[dict[int, Runs], list[Row]]:
    """The runs of the right ones by number, and the others with the reason; no further one begins after the time."""
    end = now() + _PREPARING
    right: dict[int, Runs] = {}
    dropped: list[Row] = []
    for i, candidate in enumerate(candidates):
        if i and now() >= end:
            break
        try:
            right[i] = prepare(candidate)
        except Exception as error:  # The parity check's, a compiler's, or too many resources: the others may still run.
            dropped.append({"config": asdict(candidate), "reason": reason_of(error)})
    return right, dropped


# --- an upsampling composed with the convolution after it, in inference ---

STEP_UP_OP = "conv_transpose2x2_concat_conv3x3_relu"


def step_up_cases(layers: Sequence[Layer]) -> dict[str, Case]:
    """Upsampling and the convolution after it as one case, by the convolution's name; of transposed convolutions."""
    by_name = {layer.name: layer for layer in layers}
    found = {}
    for layer in layers:
        block, _, part = layer.name.partition(".")
        up = by_name.get(f"{block}.up")
        if part == "c1" and up is not None and up.op == "conv_transpose2x2":
            of_up = {"low": up.shapes["x"], "up_weight": up.shapes["weight"], "up_bias": up.shapes["bias"]}
            shapes = {"skip": layer.shapes["skip"], **of_up, **{k: layer.shapes[k] for k in ("weight", "bias")}}
            found[layer.name] = Case(STEP_UP_OP, shapes, backward=False)
    return found


def step_up_unsupported(case: Case, device: torch.device) -> str | None:
    """Why no kernel computes it there, or None."""
    asked = [torch.empty((1, *case.shapes["skip"][1:]), device=device, dtype=DTYPE)]
    asked.append(torch.empty(case.shapes["weight"], device=device, dtype=DTYPE))
    with fastunet.backend("triton"):
        choice = dispatch.choose(STEP_UP_OP, *asked)
    return None if choice.implementation == "triton" else choice.reason


def check_step_up(case: Case, device: torch.device) -> None:
    """AssertionError unless an image comes out right."""
    one_image = {k: (1, *shape[1:]) if k in ("skip", "low") else shape for k, shape in case.shapes.items()}
    with fastunet.backend("triton"):
        parity.check(replace(case, shapes=one_image), DTYPE, device)


def step_up_runs(case: Case, device: torch.device) -> tuple[list[Callable[[], Any]], list[Callable[[], Any]]]:
    """Calls of the kernel, and of the two ops as `auto` runs them, on inputs that take turns."""
    inputs = parity.make_inputs(case.shapes, DTYPE, device)
    images = {k: t.contiguous(memory_format=torch.channels_last) for k, t in inputs.items() if t.dim() == 4}
    sets = input_sets(inputs | images, device)
    return [_composed(each) for each in sets], [_two_steps(*each.values()) for each in sets]


def _composed(inputs: Mapping[str, Tensor]) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad(), fastunet.backend("triton"):
            ops.conv_transpose2x2_concat_conv3x3_relu(*inputs.values())

    return run


def _two_steps(
    skip: Tensor, low: Tensor, up_weight: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor
) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad(), fastunet.backend("auto"):
            up = ops.conv_transpose2x2(low, up_weight, up_bias)
            ops.concat_conv3x3_bias_relu(skip, up, weight, bias)

    return run
