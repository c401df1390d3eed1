"""One measurement: an op's parity, a layer's time, a net's time. Each gives a row for the report.

A layer or net is timed only after its results were compared with float64; one that is off has no time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

import fastunet
from fastunet import dispatch
from fastunet.testing import float32_precision

from . import parity
from .layer_runs import prepare_layer
from .net_runs import peak_bytes, prepare_net
from .steps import DTYPE, Row, Settings, Step, describe, layer_of
from .timing import Quantiles, clock_of, cudnn_benchmark, interleave


def run_step(settings: Settings, step: Step) -> Row:
    """Measure: the row, with "status" "ok" or "parity failed" and a "reason". Errors of the op pass through."""
    row = describe(settings, step)
    measure = {"parity": _parity, "layer": _layer_times, "net": _net_times}[step.kind]
    try:
        with float32_precision("tf32" if step.variant == "tf32" else "ieee"):
            found = measure(settings, step, row)
    except AssertionError as error:
        return row | {"status": "parity failed", "reason": str(error)}
    return row | {"status": "ok", "reason": ""} | found


def backends_for(op: str, device: torch.device, dtype: torch.dtype = DTYPE) -> tuple[list[str], str]:
    """Under which backends to run a public op, ours first, and why "triton" is not among them."""
    obstacle = dispatch.triton_obstacle(device, dtype)
    if obstacle is not None:
        return ["aten"], obstacle
    with fastunet.backend("triton"):
        choice = parity.implementation_of(op, dtype, device)
    return (["triton", "aten"], "") if choice.implementation == "triton" else (["aten"], choice.reason)


def _parity(settings: Settings, step: Step, row: Row) -> Row:
    device, case = torch.device(settings.device), parity.cases()[int(step.name)]
    dtype, allow_tf32 = parity.FORMATS[step.variant]
    (ours, *_), reason = backends_for(case.op, device, dtype)
    # Known before the check, so that a failing row has it too.
    row["implementation"], row["why_no_triton"] = ours, reason
    with fastunet.backend(ours):
        parity.check(case, dtype, device, allow_tf32=allow_tf32)
    return {}


def _layer_times(settings: Settings, step: Step, row: Row) -> Row:
    device, layer = torch.device(settings.device), layer_of(settings, step.name)
    backends, row["why_no_triton"] = backends_for(layer.op, device)
    runs = prepare_layer(layer, device, backends, backward=step.variant == "backward")
    return _timed(settings, runs, row["flops"])


def _net_times(settings: Settings, step: Step, row: Row) -> Row:
    device = torch.device(settings.device)
    # Of the net's ops, the convolution decides: where it has no kernel that runs here, there is nothing to compare.
    backends, row["why_no_triton"] = backends_for("conv3x3_batch_norm_relu", device)
    row["parity"], runs = prepare_net(settings, backends, training=step.name == "training")
    measured = _timed(settings, {backend: [run] for backend, run in runs.items()}, row["flops"])
    for backend, times in measured["times"].items():
        times["images_per_s"] = settings.batch / times["median_ms"] * 1e3
        times["peak_bytes"] = peak_bytes(runs[backend], device)
    return measured


def _timed(settings: Settings, runs: Mapping[str, list[Callable[[], Any]]], flops: int) -> Row:
    """The times of each backend's runs, and how many times as long the last one's takes as the first one's."""
    with cudnn_benchmark():
        clock = clock_of(torch.device(settings.device))
        times = interleave(runs, clock, rounds=settings.rounds, seconds=settings.seconds)
    row: Row = {"times": {name: _time_row(quantiles, flops) for name, quantiles in times.items()}}
    if len(times) > 1:
        row["speedup"] = times["aten"].median / times["triton"].median
    return row


def _time_row(quantiles: Quantiles, flops: int) -> Row:
    seconds = {f"{name}_ms": 1e3 * getattr(quantiles, name) for name in ("median", "p10", "p90")}
    return {**seconds, "samples": quantiles.samples, "tflops": flops / quantiles.median / 1e12}
