"""The sums of the segmentation losses, and their gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from fastunet.kernels import config_passes, gpu

from . import Job

OPS = ("loss_sums", "loss_sums_grad")


class Shape(NamedTuple):
    """What a launch depends on. indices: the target is of class indices; target: the dtype of either kind."""

    channels: int
    softmax: bool
    indices: bool
    masked: bool
    squared: bool
    entropy: bool
    target: torch.dtype


def jobs(target: gpu.Target, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    """In bfloat16 every config, each with one of the variants in turn; float32 and float16 with few channels."""
    if allow_tf32:
        return
    # Three is no power of two.
    channel_counts = (*config_passes.pixel_configs().values(), 3) if dtype == torch.bfloat16 else (3,)
    for number, channels in enumerate(channel_counts):
        for op in OPS:
            yield Job(op, dtype, False, target.capability, _variant(number, channels))


def _variant(number: int, channels: int) -> Shape:
    """The bits of number: activation, kind of target, mask. One channel has neither a softmax nor indices."""
    softmax, indices, masked = ((number >> bit) % 2 == 0 for bit in range(3))
    indices = indices and channels > 1
    kinds = (torch.int64, torch.uint8) if indices else (torch.float32, torch.uint8)
    return Shape(
        channels,
        softmax and channels > 1,
        indices,
        masked,
        squared=number % 3 == 1,
        entropy=number % 5 != 4,
        target=kinds[number % 2],
    )


def launch(job: Job) -> gpu.Launch:
    """The launch of one job: logits of few channels contiguous, others channels_last."""
    from fastunet.kernels import segmentation_loss  # Late: triton is imported by the compiling process alone.

    shape: Shape = job.shape
    layout = torch.contiguous_format if shape.channels < 16 else torch.channels_last
    logits = job.tensor(2, shape.channels, 64, 64, layout=layout)
    sizes = (2, 1 if shape.indices else shape.channels, 64, 64)
    target = torch.empty(sizes, dtype=shape.target, device="meta")
    mask = torch.empty((2, 1, 64, 64), dtype=torch.uint8, device="meta") if shape.masked else None
    rows = 3 if not shape.entropy else 4 if shape.softmax else 5
    sums = torch.empty((rows, 2, shape.channels), device="meta")
    options = {"softmax": shape.softmax, "squared": shape.squared}
    if job.op == "loss_sums":
        return segmentation_loss.segmentation_sums_launches(logits, target, mask, sums, **options)[0]
    return segmentation_loss.segmentation_sums_grad_launch(sums, logits, target, mask, logits, **options)
