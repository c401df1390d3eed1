"""What a training takes where nothing is given: crops, levels and batch, planned from the images and the memory.

The rules of thumb are nnU-Net's (Isensee et al. 2021): crops as large as the middle one of the images, levels until the
bottom has 4 x 4 pixels, as large a batch as the memory then leaves room for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median_low
from typing import NamedTuple

import torch
from accelerate import Accelerator

from fastunet.checks import ConfigError
from fastunet.data import DataSummary
from fastunet.data.picture import free_memory
from fastunet.train.config import PLANNED, TrainConfig, too_small
from fastunet.train.distributed import least_of_ranks
from fastunet.unet import UNet

BOTTOM = 4  # pixels: the edge that a crop keeps at the lowest level
FEWEST = 2  # crops in a batch, of which batch norm takes its statistics
SMALLEST = 64  # pixels: to this edge crops shrink for lack of memory
MARGIN = 0.7  # of what is free: kernels have workspaces, and memory is lost between blocks
SHARE = 0.05  # of all pixels that a batch sees, at most


class Plan(NamedTuple):
    """The settings that are planned."""

    crop: int
    features: tuple[int, ...]
    batch_size: int


@dataclass(frozen=True)
class Scale:
    """How large a training may be on a device."""

    crop: int
    features: tuple[int, ...]
    batch_size: int  # as many where the memory has room, of few images too
    largest_batch: int


CPU = Scale(256, (16, 32, 64, 128, 256), 4, 4)
# Not a level more: each doubles the halo of validation's tiles, 192 pixels with six.
GPU = Scale(512, (32, 64, 128, 256, 512, 512), 4, 16)


@dataclass(frozen=True)
class Machine:
    """What a training runs on."""

    scale: Scale
    free: int  # bytes, for each process
    value_bytes: int = 4  # of an activation
    ranks: int = 1


def machine_of(accelerator: Accelerator) -> Machine:
    """Ask what is free where a training runs: of several processes, the least."""
    device = accelerator.device
    if device.type == "cuda":
        # What torch keeps of trainings before is free too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + kept
    else:
        free = free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return Machine(
        GPU if device.type == "cuda" else CPU,
        least_of_ranks(free, accelerator),
        4 if accelerator.mixed_precision == "no" else 2,
        accelerator.num_processes,
    )


def planned(
    config: TrainConfig, sizes: Sequence[tuple[int, int]], summary: DataSummary, machine: Callable[[], Machine]
) -> tuple[Plan, str]:
    """Plan what is None of the settings, and say in a line why; "" where nothing is.

    What is given stays, and the others are planned around it; with given crops the levels are the usual ones.

    Args:
        sizes: (height, width) of each image.
        machine: is asked where something is to be planned.

    Raises:
        ConfigError: the memory has no room for a step, however small.
    """
    if config.crop is not None and config.features is not None and config.batch_size is not None:
        return Plan(config.crop, config.features, config.batch_size), ""
    on = machine()
    room = MARGIN * on.free
    middle = median_low(height for height, _ in sizes), median_low(width for _, width in sizes)

    def needed(plan: Plan) -> int:
        return step_bytes(plan, summary.channels, summary.classes, on.value_bytes)

    fewest = config.batch_size or FEWEST
    for edge, features in _candidates(config, min(middle), summary, on.scale):
        plan = Plan(edge, features, fewest)
        if needed(plan) <= room:
            break
    else:
        raise ConfigError(
            f"memory: expected {needed(plan) / MARGIN / 2**20:.0f} MiB free for a training step of "
            f"{_text(plan, PLANNED)}, got {on.free / 2**20:.0f} MiB: free some, or give smaller ones"
        )
    if config.batch_size is None:
        share = round(SHARE * sum(height * width for height, width in sizes) / plan.crop**2 / on.ranks)
        most = min(max(share, on.scale.batch_size), on.scale.largest_batch)
        larger = (plan._replace(batch_size=batch) for batch in range(fewest, most + 1))
        plan = max(each for each in larger if needed(each) <= room)
    text = _text(plan, [name for name in PLANNED if getattr(config, name) is None])
    (height, width), (least_height, least_width) = middle, summary.size_min
    images = f"images of {height} x {width} in the middle and {least_height} x {least_width} at the least"
    memory = f"a step takes about {needed(plan) / 2**30:.2f} GiB of {on.free / 2**30:.1f} that are free"
    return plan, f"planned: {text} ({images}; {memory})"


def _text(plan: Plan, names: Sequence[str]) -> str:
    values = plan._asdict() | {"features": ",".join(map(str, plan.features))}
    return " ".join(f"--{name.replace('_', '-')} {values[name]}" for name in names)


def _candidates(
    config: TrainConfig, side: int, summary: DataSummary, scale: Scale
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """List edges of crops with their features, from the largest down; at least one."""
    if config.crop is not None:
        # Who chose crops hears of levels that they have no room for, instead of getting another net than usual.
        yield config.crop, config.features or scale.features
        return
    # Of given features more than a pixel has to remain at the bottom, for norms to take statistics of.
    least = 2 ** len(config.features or (0, 0))
    largest = max(min(side, scale.crop), least)
    for edge in range(largest, max(min(SMALLEST, largest // 2), least) - 1, -1):
        features = config.features or _features_for(edge, summary, config.norm, scale)
        if edge % 2 ** (len(features) - 1) == 0:
            yield edge, features


def _features_for(edge: int, summary: DataSummary, norm: str, scale: Scale) -> tuple[int, ...]:
    """Take as many levels as leave BOTTOM pixels of a crop, and go with the smallest image; two at the least."""
    levels = len(scale.features)
    while levels > 2 and (edge >> (levels - 1) < BOTTOM or too_small(*summary.size_min, levels, norm)):
        levels -= 1
    return scale.features[:levels]


def step_bytes(plan: Plan, channels: int, classes: int, value_bytes: int) -> int:
    """Estimate what a training step takes at its peak, the first moment of the backward.

    By then each double convolution keeps four maps of its channels (what its norms and activations read again), each
    step up the two that it joined, and each pooling its result with indices of 8 bytes. Beside them are some eight maps
    of gradients of the first level, and copies of images, labels and logits in float32 or as indices.
    """
    pixels = plan.batch_size * plan.crop**2
    *upper, bottom = (width * pixels / 4**level for level, width in enumerate(plan.features))
    kept = value_bytes * (10 * sum(upper) + 4 * bottom) + sum(upper) / 4 * (value_bytes + 8)
    gradients = 8 * value_bytes * upper[0]
    copies = pixels * (4 * (4 * channels + 6 * max(classes, 2)) + 4 * 8)
    # float32: weights, their gradients, AdamW's two moments; moving average; buckets of several processes.
    return round(kept + gradients + copies + 6 * 4 * _parameters(channels, classes, plan.features))


@cache
def _parameters(channels: int, classes: int, features: tuple[int, ...]) -> int:
    with torch.device("meta"):
        return sum(each.numel() for each in UNet(channels, classes, features=features).parameters())
