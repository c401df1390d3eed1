"""Times of layers and nets, of each implementation in turn, the first of them ours.

A layer or net is timed only after its results were compared with float64; one that is off has no time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

import fastunet
from fastunet.testing.parity import backends_for

from .cases import Settings
from .cross_check import timing_cross_check
from .harness.timing import Quantiles, burst_and_steady, clock_of, cudnn_benchmark, interleaved_samples, ratio
from .layer_runs import layer_sets, prepare_layer
from .net_runs import make_net, peak_bytes, prepare_net
from .results import Row
from .rivals import form_runs, layer_rivals, net_rivals
from .roofs import measure_roofs
from .steps import COMPILED, DTYPE, Step, is_ours, layer_of


def roofs(settings: Settings, step: Step, row: Row) -> Row:
    """The measured roofs of the device."""
    return measure_roofs(torch.device(settings.device))


def clock_check(settings: Settings, step: Step, row: Row) -> Row:
    """ "cross_check": our run of one layer, forward, by our timer and by another."""
    device, layer = torch.device(settings.device), layer_of(settings, step.name)
    backends, row["why_no_triton"] = backends_for(layer.op, device, DTYPE)
    runs = prepare_layer(layer, layer_sets(layer, device), backends[:1], backward=False)
    return {"cross_check": timing_cross_check(runs[backends[0]][0], clock=clock_of(device))}


def layer_times(settings: Settings, step: Step, row: Row) -> Row:
    """A layer in one direction under each backend; forward also in our other forms and by other libraries."""
    device, layer = torch.device(settings.device), layer_of(settings, step.name)
    backends, row["why_no_triton"] = backends_for(layer.op, device, DTYPE)
    sets = layer_sets(layer, device)
    runs = prepare_layer(layer, sets, backends, backward=step.variant == "backward")
    row["absent"] = {}
    if step.variant == "forward" and backends[0] == "triton":
        forms, missing = form_runs(layer, device, sets, runs["triton"])
        runs, row["absent"] = {**runs, **forms}, missing
    if step.variant != "backward":
        others, missing = layer_rivals(layer, device, sets, compiled=step.variant == COMPILED)
        runs, row["absent"] = {**runs, **others}, {**row["absent"], **missing}
    return _timed(settings, runs, row["flops"])


def net_times(settings: Settings, step: Step, row: Row) -> Row:
    """The net's inference or training step under each backend and by others: in turn, and each without a break."""
    device, training = torch.device(settings.device), step.name == "training"
    # Of the net's ops, the convolution decides: where it has no kernel that runs here, there is nothing to compare.
    backends, row["why_no_triton"] = backends_for("conv3x3_batch_norm_relu", device, DTYPE)
    model = make_net(settings)
    row["parity"], runs = prepare_net(settings, model, backends, training=training)
    peaks = {name: peak_bytes(run, device) for name, run in runs.items()}
    with fastunet.backend(backends[0]):
        others, row["absent"] = net_rivals(settings, model, step.variant, training=training)
    # The memory of a graph was taken when it was captured.
    peaks |= {name: peak_bytes(run, device) for name, run in others.items() if "CUDA graph" not in name}
    runs |= others
    measured = _timed(settings, {name: [run] for name, run in runs.items()}, row["flops"])
    for name, times in measured["times"].items():
        with cudnn_benchmark():
            _, steady = burst_and_steady(runs[name], clock_of(device), seconds=settings.steady_seconds)
        times["steady_ms"] = 1e3 * steady.median
        times["images_per_s"] = settings.batch / times["median_ms"] * 1e3
        times["peak_bytes"] = peaks.get(name)
    return measured


def _timed(settings: Settings, runs: Mapping[str, list[Callable[[], Any]]], flops: int) -> Row:
    """The times of each implementation, ours first, and by how many times the others take longer than that one."""
    with cudnn_benchmark():
        clock = clock_of(torch.device(settings.device))
        samples = interleaved_samples(runs, clock, rounds=settings.rounds, seconds=settings.seconds)
    ours, *rest = samples
    row: Row = {"times": {name: _time_row(Quantiles.of(values), flops) for name, values in samples.items()}}
    row["ratios"] = {name: _ratio_row(ratio(samples, name, ours)) for name in rest}
    others = [found["ratio"] for name, found in row["ratios"].items() if not is_ours(name)]
    if others:
        row["speedup"] = min(others)
    return row


def _ratio_row(found: Quantiles) -> Row:
    return {"ratio": found.median, "p10": found.p10, "p90": found.p90}


def _time_row(quantiles: Quantiles, flops: int) -> Row:
    seconds = {f"{name}_ms": 1e3 * getattr(quantiles, name) for name in ("median", "p10", "p90")}
    return {**seconds, "samples": quantiles.samples, "tflops": flops / quantiles.median / 1e12}
