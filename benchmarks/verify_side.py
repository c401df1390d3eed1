"""One of the two sides of a comparison of commits: what runs in its process, on whatever fastunet is imported there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

import fastunet
from fastunet import ops
from fastunet.testing import parity
from fastunet.testing.parity import backends_for

from .cases import Settings
from .harness.timing import clock_of, cudnn_benchmark
from .layer_runs import layer_sets, prepare_layer
from .measure import run_step
from .net_runs import make_net, prepare_net
from .steps import DTYPE, Row, Step, describe, failure, layer_of

_WARMUP = 3


class Side:
    """Answers one request after the other; `settings` is a Settings as a dict. Every answer is plain data."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = Settings(**{**settings, "features": tuple(settings["features"])})
        self._runs: list[Callable[[], Any]] = []

    def lacking(self) -> list[str]:
        """What the measurements need and this fastunet has not."""
        wanted = [(ops, case.op) for case in parity.cases()] + [(fastunet, "UNet"), (fastunet, "backend")]
        return sorted({f"{module.__name__}.{name}" for module, name in wanted if not hasattr(module, name)})

    def files(self) -> dict[str, str]:
        """Where each module of fastunet that is imported here lies."""
        return {
            name: str(module.__file__)
            for name, module in sys.modules.items()
            if name.partition(".")[0] == "fastunet" and getattr(module, "__file__", None)
        }

    def parity(self, case: str, variant: str) -> Row:
        """The row of one op's comparison with float64."""
        step = Step("parity", case, variant)
        try:
            return run_step(self._settings, step)
        except Exception as error:
            return describe(self._settings, step) | failure(error)

    def prepare(self, kind: str, name: str, variant: str) -> Row:
        """Get a layer or a net ready for `round`: "status" and "reason", and the "implementation" that will run."""
        step = Step(kind, name, variant)
        self._runs = []
        device = torch.device(self._settings.device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        row: Row = {"implementation": "", "status": "ok", "reason": ""}
        try:
            row["implementation"], self._runs = self._prepared(step, device)
            with cudnn_benchmark():
                for run in _WARMUP * self._runs:
                    run()
        except Exception as error:
            return row | failure(error)
        return row

    def _prepared(self, step: Step, device: torch.device) -> tuple[str, list[Callable[[], Any]]]:
        if step.kind == "net":
            (ours, *_), _ = backends_for("conv3x3_batch_norm_relu", device, DTYPE)
            _, nets = prepare_net(self._settings, make_net(self._settings), [ours], training=step.name == "training")
            return ours, [nets[ours]]
        layer = layer_of(self._settings, step.name)
        (ours, *_), _ = backends_for(layer.op, device, DTYPE)
        runs = prepare_layer(layer, layer_sets(layer, device), [ours], backward=step.variant == "backward")
        return ours, runs[ours]

    def round(self) -> float:
        """Seconds of one pass over all sets of inputs of what was prepared."""
        clock, marks = clock_of(torch.device(self._settings.device)), []
        with cudnn_benchmark():
            for run in self._runs:
                clock.prepare()
                begin = clock.mark()
                run()
                marks.append((begin, clock.mark()))
            clock.wait()
        return sum(clock.elapsed(begin, end) for begin, end in marks)
