"""Other people's U-Nets under torch.compile: fastunet's backend against inductor, in turn in one run.

`python -m benchmarks dropin --out FILE.json`: for each model what `fastunet.explain` finds, replaces and leaves, and
the time of inference or of a training step. Every compiled model's output is compared with float64 before it is timed.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastunet
from fastunet.checks import ConfigError
from fastunet.files import write_json

from .cases import TASKS, Settings, add_settings, settings_of
from .dropin_models import MODELS, DropInModel
from .providers import Provider
from .results import Row, ratio_text
from .runs import distance, measured, prepared
from .tables import report_of

# As many runs of one model as there are, each compiled for each of its blocks.
_MOST_COMPILES = 64

# By name, torch.compile's backend, None for eager, and whether the copy of the model is channels_last.
VARIANTS: dict[str, tuple[str | None, bool]] = {
    "fastunet": ("fastunet", False),
    "fastunet.compile": ("fastunet.compile", False),
    "eager": (None, False),
    "eager channels_last": (None, True),
    "inductor": ("inductor", False),
    "inductor channels_last": ("inductor", True),
}


def measure(model: DropInModel, settings: Settings, task: str, width: int) -> Row:
    """Return the row of a model, `width` channels in its first level: what is replaced, and its variants' times."""
    torch.manual_seed(0)
    net = model.build(width).train(task == "training")
    x = torch.randn(settings.batch, model.channels, settings.size, settings.size)
    explanation = fastunet.explain(net, x)
    left = Counter(row.reason for row in explanation.rows if not row.replaced_by).most_common()
    row: Row = {"kind": "model", "name": model.name, "found": len(explanation.rows), "left": dict(left)}
    row["replaced"] = explanation.replaced
    torch.manual_seed(0)  # Dropout is the only chance in them.
    with torch.no_grad():
        exact = flat(copy.deepcopy(net).double()(x.double()))
    allowed = _rounding(net)

    def check(provider: Provider, result: Any) -> None:
        for actual, right in zip(flat(result), exact, strict=True):
            off = distance(actual.double(), right)
            assert off <= allowed, f"relative distance from float64: expected at most {allowed}, got {off}"

    torch._dynamo.reset()
    providers = [
        Provider(name, "NHWC" if is_last else "NCHW", "float32", functools.partial(_run, backend, is_last))
        for name, (backend, is_last) in VARIANTS.items()
    ]
    with torch._dynamo.config.patch(recompile_limit=_MOST_COMPILES):
        return row | measured(settings, *prepared(providers, lambda each: [each.prepare(net, x, task)], check))


def _run(backend: str | None, channels_last: bool, net: nn.Module, x: Tensor, task: str) -> Callable[[], Any]:
    copied: Any = copy.deepcopy(net)
    forward = copied = copied.to(memory_format=torch.channels_last) if channels_last else copied
    if backend is not None:
        forward = fastunet.compile(copied) if backend == "fastunet.compile" else torch.compile(copied, backend=backend)

    def infer() -> Any:
        with torch.no_grad():
            return forward(x)

    def train() -> Any:
        copied.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        outputs = flat(forward(x))
        sum(y.square().mean() for y in outputs).backward()  # type: ignore[union-attr]
        return [y.detach() for y in outputs]

    return train if task == "training" else infer


def flat(outputs: Any) -> list[Tensor]:
    """The tensors of a model's outputs."""
    return [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def _rounding(net: nn.Module) -> float:
    """How far from float64 an output may be, relatively: 6 sqrt(2 L K) 2^-24 after L convolutions of sums of K terms,
    each with a norm that is as long a sum, whose errors are independent.
    """
    sums = [m.weight[0].numel() for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    return 6 * (2 * len(sums) * max(sums)) ** 0.5 * 2.0**-24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="JSON")
    parser.add_argument("--task", choices=TASKS, default="inference")
    add_settings(parser, Settings("cpu", size=256, batch=1, rounds=15, seconds=20.0), "size", "rounds")
    parser.add_argument("--width", type=int, default=32, help="channels of a model's first level")
    parser.add_argument("--only", nargs="+", choices=[model.name for model in MODELS], metavar="MODEL")


def run(options: argparse.Namespace) -> int:
    """Time the models that are installed; the file is whole after each. Returns 0."""
    settings = settings_of(options)
    if options.width < 2:
        raise ConfigError(f"expected --width from 2, got {options.width}")
    rows: list[Row] = []
    for model in MODELS:
        if options.only is not None and model.name not in options.only:
            continue
        if not model.is_installed():
            print(f"{model.name}: {model.package} is not installed")
            continue
        rows.append(measure(model, settings, options.task, options.width))
        print(line(rows[-1]), flush=True)
        write_json(options.out, report_of(settings, rows, task=options.task, width=options.width))
    return 0


def line(row: Row) -> str:
    """A row in a line of text."""
    times = (f"{name} / fastunet {ratio_text(found)}" for name, found in row.get("ratios", {}).items())
    failed = (f"{name}: {reason.splitlines()[0]}" for name, reason in row["missing"].items())
    return "; ".join((f"{row['name']}: {row['replaced']} of {row['found']} replaced", *times, *failed))
