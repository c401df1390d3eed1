"""Every public op, forward and backward: ours, and torch's composition of the same, in turn.

Nothing is timed before its result is right, and calls take sets of inputs in turn that together pass the cache.
`pytest benchmarks/ --benchmark-only` times the same with pytest-benchmark.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastunet
from fastunet import ops
from fastunet.files import write_json
from fastunet.reference import functional as reference
from fastunet.testing import parity

from .cases import DIRECTIONS, DTYPES, Settings, add_settings, settings_of, usual_device
from .harness.environment import environment
from .providers import Provider, Run, dtype_name, our_backends
from .results import Row, markdown, ratio_text, times_ms
from .runs import case_run, input_sets, measured, prepared

# n, c, h, w, c_out.
SIZES = {"cpu": (2, 32, 64, 64, 32), "cuda": (4, 64, 256, 256, 64)}
TORCH = "torch"


@dataclass(frozen=True)
class Work:
    """An op to time in a dtype and a direction."""

    case: parity.Case
    dtype: torch.dtype
    direction: str

    @property
    def group(self) -> str:
        """What it is compared within. Batch norm comes in two forms, convolutions also by stride 2."""
        given = "-given-statistics" if self.case.options.get("training") is False else ""
        given += "-stride-2" if self.case.options.get("stride") == 2 else ""
        return f"{self.case.op}{given} {dtype_name(self.dtype)} {self.direction}"

    def providers(self, device: torch.device) -> list[Provider]:
        """Ours, then torch's composition. prepare: () -> a run for each set of inputs; AssertionError if wrong."""
        return [
            Provider(name, "NHWC", dtype_name(self.dtype), functools.partial(self._prepare, device, name, backend), why)
            for name, backend, why in [*our_backends(device, self.dtype), (TORCH, "aten", "")]
        ]

    def _prepare(self, device: torch.device, name: str, backend: str) -> list[Run]:
        function = run_reference if name == TORCH else parity.run_op
        # Torch's composition rounds after every step, as ours does where ATen runs it; the bounds are to know that.
        with fastunet.backend(backend):
            parity.check(self.case, self.dtype, device, allow_tf32=device.type == "cuda", run=function)
        sets = input_sets(parity.make_inputs(self.case.shapes, self.dtype, device), device)
        return [case_run(self.case, each, backend, self.direction, function=function) for each in sets]


def works(device: torch.device, dtypes: list[torch.dtype] | None = None) -> Iterator[Work]:
    """Yield every op's. By default in the dtypes worth timing: a CPU has no float16 products."""
    if dtypes is None:
        dtypes = [torch.float32, torch.bfloat16, *([torch.float16] if device.type == "cuda" else [])]
    for case, dtype in itertools.product(parity.cases_of(*SIZES[device.type]), dtypes):
        yield from (Work(case, dtype, direction) for direction in DIRECTIONS[: 2 if case.backward else 1])


def run_reference(op: str, inputs: Mapping[str, Tensor], buffers: Mapping[str, Tensor], options: Any) -> Any:
    """Compute as parity.run_op, by torch's functions."""
    if op != "double_conv3x3_bias_relu":
        return getattr(reference, op)(*inputs.values(), *buffers.values(), **options)
    x, weight1, bias1, weight2, bias2 = inputs.values()
    second = reference.conv3x3_bias_relu_pool if options.get("pool") else reference.conv3x3_bias_relu
    return second(reference.conv3x3_bias_relu(x, weight1, bias1), weight2, bias2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, Settings(usual_device(), rounds=30, seconds=2.0), "device", "rounds", "seconds")
    parser.add_argument("--dtype", dest="dtypes", choices=[*DTYPES], nargs="+")
    parser.add_argument("--only", choices=ops.__all__, nargs="+", metavar="OP")
    parser.add_argument("--out", type=Path, metavar="JSON")


def run(options: argparse.Namespace) -> int:
    """Time and print; return 0, or 1 if something of ours is wrong."""
    settings = settings_of(options)
    dtypes = None if options.dtypes is None else [DTYPES[name] for name in options.dtypes]
    rows = [
        compare(work, settings)
        for work in works(settings.torch_device, dtypes)
        if options.only is None or work.case.op in options.only
    ]
    names = list(dict.fromkeys(name for row in rows for name in row.get("samples_ms", {})))
    print(markdown(["op", *(f"{name}, ms" for name in names), "torch / ours"], [_line(row, names) for row in rows]))
    if options.out is not None:
        write_json(options.out, {"environment": environment(options.device), "rows": rows})
    return 1 if any(row["status"] == "parity failed" for row in rows) else 0


def compare(work: Work, settings: Settings) -> Row:
    """Time an op's providers in turn: the row, without a time for what is not right or does not run."""
    row, runs = prepared(work.providers(settings.torch_device), lambda each: each.prepare(), lambda *_: None)
    return measured(settings, {"kind": "op", "name": work.group} | row, runs)


def _line(row: Row, names: list[str]) -> list[str]:
    times = times_ms(row)
    cells = [f"{times[name].median:.3f}" if name in times else "" for name in names]
    reasons = "; ".join(row["missing"].values()) if row["status"] != "ok" else ""
    return [row["name"], *cells, reasons or ratio_text(row.get("ratios", {}).get(TORCH))]
