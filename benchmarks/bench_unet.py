"""Whole nets, inference and training step, against the nets people run; peak memory in extra_info on a GPU.

Inference: batches of 1 and 16, images of 256, 512 and 1024; training: batches of 8 and 16, images of 512. On a CPU also
small ones, which end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastunet

from .cases import Layer, meta_unet, unet_layers
from .gate import NetGate
from .net_runs import peak_bytes
from .opponents import Opponent, Run, dtype_name, net_opponents
from .steps import TASKS
from .suite import Options, Work, left_to_all

CLASSIC, HALF = (64, 128, 256, 512, 1024), (32, 64, 128, 256, 512)
NETS: dict[str, dict[str, Any]] = {
    "classic": {"features": CLASSIC},
    "base 32": {"features": HALF},
    "classic instance norm": {"features": CLASSIC, "norm": "instance"},
}
# (batch, side) by task, and those that a CPU ends in addition.
SIZES = {
    "inference": [(batch, side) for side in (256, 512, 1024) for batch in (1, 16)],
    "training": [(8, 512), (16, 512)],
}
SMALL = {"inference": [(1, 64)], "training": [(2, 32)]}


def works(options: Options) -> list[Work]:
    return [
        _work(net, task, batch, side, dtype, opponent, options)
        for net, task, batch, side in _problems(options.device)
        for dtype in options.dtypes()
        for opponent in net_opponents(options.device, dtype, training=task == "training", thorough=options.everything)
        if not _is_repeated(opponent, dtype)
    ]


def _problems(device: torch.device) -> Iterator[tuple[str, str, int, int]]:
    for net in NETS:
        for task in TASKS:
            for batch, side in [*(SMALL[task] if device.type == "cpu" else []), *SIZES[task]]:
                yield net, task, batch, side


def _is_repeated(opponent: Opponent, dtype: torch.dtype) -> bool:
    """What is float32 in every list is timed with the float32 ones."""
    return opponent.dtype != dtype_name(dtype)


def _work(net: str, task: str, batch: int, side: int, dtype: torch.dtype, opponent: Opponent, options: Options) -> Work:
    device = options.device
    features = NETS[net]["features"]
    layers = unet_layers(meta_unet(3, 2, features), batch, side, side)
    training = task == "training"
    flops = sum(layer.flops + (layer.backward_flops if training else 0) for layer in layers)
    label = f"{net} {task} {batch}x{side}x{side} {dtype_name(dtype)}"
    return Work(
        name=f"{label} {opponent.name}".replace(" ", "-"),
        group=label,
        prepare=functools.partial(_prepare, net, task, batch, side, opponent, device),
        flops=flops,
        memory=memory_of(layers, features, dtype, training=training),
        info={
            "net": net,
            "task": task,
            "batch": batch,
            "side": side,
            "images": batch,
            "implementation": opponent.name,
            "layout": opponent.layout,
            "dtype": opponent.dtype,
        },
        unavailable=left_to_all(opponent, options),
        after=lambda run: {"peak_bytes": peak_bytes(run, device)},
    )


def memory_of(layers: list[Layer], features: tuple[int, ...], dtype: torch.dtype, *, training: bool) -> float:
    """Bytes: of weights, with AdamW's two states and gradients; of activations; and of the check in float64.

    Inference holds about four activations of the largest level; training, of every layer its convolution's output,
    what the norm makes of it, and the rectified. The check runs plain modules in float64, on one image or, in training,
    whose statistics are the batch's, on all.
    """
    weights = sum(_count(layer.shapes["weight"]) for layer in layers)
    batch, _, h, w = layers[0].shapes["x"]
    level = batch * features[0] * h * w
    outputs = sum(_count(_first(layer)) for layer in layers)
    if training:
        return weights * 4 * 4 + 3 * outputs * dtype.itemsize + 4 * level * 8
    return weights * 8 + 4 * level * dtype.itemsize + 4 * level / batch * 8


def _first(layer: Layer) -> tuple[int, ...]:
    """As large as the layer's output, or half of it: the input that it has beside its parameters."""
    return next(iter(layer.shapes.values()))


def _count(shape: tuple[int, ...]) -> int:
    return functools.reduce(lambda a, b: a * b, shape)


@functools.lru_cache(maxsize=1)
def _problem(
    net: str, task: str, batch: int, side: int, device: torch.device
) -> tuple[fastunet.UNet, Tensor, Tensor, NetGate]:
    """Model, images, target, gate: of the opponents that follow each other, once."""
    torch.manual_seed(0)
    model = fastunet.UNet(3, 2, **NETS[net]).to(device)
    x = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 2, (batch, 2, side, side), device=device).float()
    return model, x, target, NetGate(model, x, target, training=task == "training")


def _prepare(net: str, task: str, batch: int, side: int, opponent: Opponent, device: torch.device) -> list[Run]:
    model, x, target, gate = _problem(net, task, batch, side, device)
    run = opponent.prepare(model, x, target if task == "training" else None)
    gate.check(opponent, run())
    return [run]


def test_unet(work: Work, timed: Callable[[Work], None]) -> None:
    timed(work)
