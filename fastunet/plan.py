"""Inference as a list of launches in one block of memory.

The launches of a net are noted down once for each size of image. Their tensors are then moved into one block, where
those that are not needed at the same time take the same place: it is as large as what is needed at once. A call runs
the launches as they are: nothing is checked, chosen, described or allocated any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checks import ConfigError
from .graphs import GraphedModel, Recording

# Where vector loads and tensor descriptors may begin, in bytes, and what an allocation of torch's begins on.
_ALIGNMENT = 512
# Every floating-point number of such bytes is NaN.
_NAN_BYTE = 0xFF


def planned(model: nn.Module, *, most: int = 8) -> GraphedModel:
    """The model as a module whose calls run its kernels' launches from a list, for inference on images [N, C, H, W].

    As `fastunet.graphed`, where CUDA graphs cannot be: the first call with a shape, dtype and autocast setting makes
    the list, at most `most` are kept, each holds one block of memory for its activations. Results are the model's to
    the bit, in tensors of their own. Weights changed in place are seen; where they lie elsewhere, the lists are made
    anew. Threads and streams take turns: a call must have ended before the next begins.

    Raises, at the call, ConfigError for a model in train mode, and for one of which not all work on an image is Triton
    kernels' (`fastunet.explain` tells): a layer that runs on ATen, an upsampling that is padded to an odd size where it
    is not composed with the convolution after it, or a cast of weights, which are to have the images' dtype.
    """
    return GraphedModel(model, most=most, record=record)


class Buffer(NamedTuple):
    """Memory that launches share: its bytes, and the first and the last step that need it."""

    size: int
    first: int
    last: int


def arrange(buffers: Sequence[Buffer]) -> list[int]:
    """Each buffer's offset in a block where no two that are needed at the same time overlap: the largest first, each at
    the lowest place that is free for as long as it is needed.
    """
    offsets: dict[int, int] = {}
    for i in sorted(range(len(buffers)), key=lambda i: -buffers[i].size):
        size, first, last = buffers[i]
        taken = sorted(
            (offset, offset + _aligned(buffers[j].size))
            for j, offset in offsets.items()
            if buffers[j].first <= last and first <= buffers[j].last
        )
        place = 0
        for start, end in taken:
            if place + size <= start:
                break
            place = max(place, end)
        offsets[i] = place
    return [offsets[i] for i in range(len(buffers))]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def record(run: Callable[[], Tensor]) -> Recording:
    """A function that repeats the launches of run, and the tensor with their result: see `planned`."""
    from fastunet.kernels import gpu

    with gpu.recording() as steps:
        result = run()
    with gpu.recording() as others:
        expected = run()
    if not steps:
        raise ConfigError("planned: no Triton kernel runs for this model and image")
    # While the first run's tensors are held, those of the second lie elsewhere; what does not was there before.
    lasting = _storages(steps) & _storages(others)
    _check(steps, result, expected, lasting)
    moved, result = _moved(steps, result, lasting)
    again = repeated(moved, result.device)
    again()
    if not torch.equal(result, expected):
        raise ConfigError("planned: the list of launches does not repeat the model's result here")
    return again, result


def repeated(steps: Sequence[Any], device: torch.device) -> Callable[[], None]:
    """What runs the steps again, one after the other."""
    from fastunet.kernels import gpu

    repeats = [step.repeatable(device) for step in steps]

    def again() -> None:
        with gpu.current(device):
            for repeat in repeats:
                repeat()

    return again


def _check(steps: Sequence[Any], result: Tensor, expected: Tensor, lasting: set[int]) -> None:
    """ConfigError unless the steps alone lead to the result: what none of them writes is NaN, as is what reads it."""
    for step in steps:
        for t in (*step.tensors, result):
            if t.untyped_storage().data_ptr() not in lasting:
                t.new_empty(0, dtype=torch.uint8).set_(t.untyped_storage()).fill_(_NAN_BYTE)
    for step in steps:
        step.run(result.device)
    if not torch.equal(result, expected):
        raise ConfigError("planned: not all work of this model on this image is done by Triton kernels")


def _storages(steps: Iterable[Any]) -> set[int]:
    return {t.untyped_storage().data_ptr() for step in steps for t in step.tensors}


def _moved(steps: Sequence[Any], result: Tensor, lasting: set[int]) -> tuple[list[Any], Tensor]:
    """The steps and the result on tensors in one block, but for lasting storages, which stay."""
    spans: dict[int, tuple[Tensor, int, int]] = {}
    for i, step in enumerate(steps):
        for t in step.tensors:
            place = t.untyped_storage().data_ptr()
            if place not in lasting:
                spans[place] = (t, spans[place][1] if place in spans else i, i)
    own = result.untyped_storage().data_ptr()
    spans[own] = (result, spans[own][1], len(steps))
    buffers = [Buffer(t.untyped_storage().nbytes(), first, last) for t, first, last in spans.values()]
    offsets = arrange(buffers)
    size = max(offset + _aligned(buffer.size) for offset, buffer in zip(offsets, buffers, strict=True))
    block = torch.empty(size, dtype=torch.uint8, device=result.device)
    places = dict(zip(spans, offsets, strict=True))

    def move(t: Tensor) -> Tensor:
        offset = places.get(t.untyped_storage().data_ptr())
        if offset is None:
            return t
        start = block.storage_offset() + offset // t.element_size() + t.storage_offset()
        return t.new_empty(0).set_(block.untyped_storage(), start, t.shape, t.stride())

    return [step.on([*map(move, step.tensors)]) for step in steps], move(result)
