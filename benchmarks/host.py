"""What a net costs the host: `fastunet.UNet` and the same net in plain modules, with next to nothing to compute.

Images of 16x16 pixels and few channels leave the calls alone to be timed: the classic net of 64 to 1024 channels
multiplies 31 million weights even for one pixel. One thread, float32, channels_last. A training step is forward and
backward from a random cotangent; loss and optimiser, which both nets would share, are left out. It takes two images:
at the bottom one has a single pixel, from which batch norm has no variance. Rounds alternate, as in every comparison.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastunet
from fastunet.testing import random_cotangent

from .harness import timing
from .harness.environment import environment

OURS, PLAIN = "fastunet", "eager channels_last"
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """The net UNet(in_channels, out_channels, features=features) on images of size x size; at most `rounds` samples."""

    features: tuple[int, ...] = (4, 8, 8, 8, 8)
    in_channels: int = 3
    out_channels: int = 2
    size: int = 16
    batch: int = 1
    rounds: int = 400
    warmup: int = 30
    seconds: float = 60.0


def compare(settings: Settings) -> Row:
    """Return what the JSON file holds: a row for each task, with every sample, and the summary of their ratios."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [_row(settings, task) for task in ("inference", "training")]
    finally:
        torch.set_num_threads(threads)
    return {
        "summary": {row["name"]: row["ratios"] for row in rows},
        "environment": environment("cpu"),
        "settings": {**asdict(settings), "threads": 1, "dtype": "float32", "device": "cpu"},
        "rows": rows,
    }


def _row(settings: Settings, task: str) -> Row:
    torch.manual_seed(0)
    model = fastunet.UNet(settings.in_channels, settings.out_channels, features=settings.features)
    plain: Any = model.to_reference()
    images = settings.batch if task == "inference" else max(2, settings.batch)
    x = torch.randn(images, settings.in_channels, settings.size, settings.size)
    x = x.contiguous(memory_format=torch.channels_last)
    make = _inference if task == "inference" else _training_step
    runs = {OURS: [make(model, x)], PLAIN: [make(plain.to(memory_format=torch.channels_last), x)]}
    samples = timing.interleaved_samples(
        runs, timing.CpuClock(), rounds=settings.rounds, warmup=settings.warmup, seconds=settings.seconds
    )
    found = timing.ratio(samples, PLAIN, OURS)
    return {
        "kind": "net",
        "name": task,
        "images": images,
        "times_ms": {name: _in_ms(timing.Quantiles.of(values)) for name, values in samples.items()},
        "ratios": {PLAIN: {"ratio": found.median, "p10": found.p10, "p90": found.p90, "rounds": found.samples}},
        "samples_ms": {name: [1e3 * seconds for seconds in values] for name, values in samples.items()},
    }


def _in_ms(times: timing.Quantiles) -> Row:
    return {name: 1e3 * getattr(times, name) for name in ("median", "p10", "p90")}


def _inference(net: nn.Module, x: Tensor) -> Callable[[], Any]:
    net = copy.deepcopy(net).eval()

    def run() -> None:
        with torch.no_grad():
            net(x)

    return run


def _training_step(net: nn.Module, x: Tensor) -> Callable[[], Any]:
    net = copy.deepcopy(net).train()
    with torch.no_grad():
        cotangent = random_cotangent(net(x))

    def run() -> None:
        net.zero_grad()
        net(x).backward(cotangent)

    return run


def line(row: Row) -> str:
    """One task as text."""
    times = (f"{name} {t['median']:.3f} ms ({t['p10']:.3f} to {t['p90']:.3f})" for name, t in row["times_ms"].items())
    ratio = row["ratios"][PLAIN]
    return f"{row['name']}: {'; '.join(times)}; ratio {ratio['ratio']:.2f} ({ratio['p10']:.2f} to {ratio['p90']:.2f})"
