"""Inference by CUDA graphs: a net's launches are recorded once for each size of image, and replayed in one go.

For small images, whose kernels are shorter than the time that Python takes to launch them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastunet import dispatch
from fastunet.checks import ConfigError, DeviceError
from fastunet.cpu.model_state import ModelState, autocast_dtype
from fastunet.cpu.weight_cache import Use, uses_recorded
from fastunet.ops.registration import check_untransformed
from fastunet.unet import check_is_of_images

# Runs before a recording: kernels are compiled, and algorithms chosen, outside of it.
_WARMUP = 3
# Threads take turns: a graph has one place for its image, and one for its result.
_turn = threading.RLock()
Recording = tuple[Callable[[], None], Tensor]


def graphed(model: nn.Module, *, most: int = 8) -> GraphedModel:
    """Return the model as a module whose calls replay CUDA graphs, for inference on images [N, C, H, W] on a GPU.

    The first call with a shape, dtype and autocast setting records its graph. At most `most` are kept, those last used;
    each holds the memory of its activations. Results are those of the model, in tensors of their own. Weights that are
    changed in place, by an optimizer or load_state_dict, are seen; where they lie elsewhere (`.to`, another parameter),
    or something was prepared of them (an upsampling composed with a convolution), the graphs are recorded again. The
    model must do the same work whatever the values of its images, and no work of its own on the CPU. Threads that call
    it take turns.

    Raises ConfigError for a UNet of volumes, and, at the call, for a model in train mode; DeviceError for images that
    are not on a GPU.
    """
    return GraphedModel(model, most=most)


@dataclass
class _Graph:
    image: Tensor
    replay: Callable[[], None]
    result: Tensor
    prepared: list[Use]
    done: torch.cuda.Event | None  # with the last replay, which may have been on another thread's stream


class GraphedModel(nn.Module):
    """See `graphed`. record: makes a replay, and the tensor it fills, of a function without arguments."""

    def __init__(
        self, model: nn.Module, *, most: int = 8, record: Callable[[Callable[[], Tensor]], Recording] | None = None
    ) -> None:
        super().__init__()
        if most < 1:
            raise ConfigError(f"graphed: most: expected at least 1 graph, got {most}")
        check_is_of_images("graphed", model)
        self.model = model
        self.training = model.training
        self._most, self._record = most, record or _record
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._state: tuple[nn.Module, ModelState] | None = None

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if self.model.training:
            raise ConfigError("a graphed model is for inference: expected eval mode, got train mode")
        check_untransformed("a graphed model")
        if self._record is _record and not x.is_cuda:
            raise DeviceError(f"graphed: expected images on a GPU, got {x.device}")
        # A graph is recorded on the current GPU, which need not be the image's.
        with _turn, torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            if self._state is None or self._state[0] is not self.model or not self._state[1].holds():
                self._graphs.clear()
                self._state = self.model, ModelState(self.model, addresses=True)
            return self._replayed(x)

    def _replayed(self, x: Tensor) -> Tensor:
        graph = self._graphs.get(self._key(x))
        # What had been prepared of weights may not be what it would be now.
        if graph is None or not all(use.holds() for use in graph.prepared):
            graph = self._recorded(x)
            self._graphs[self._key(x)] = graph  # Its first run may have measured layers, on which settings depend.
            if len(self._graphs) > self._most:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(self._key(x))
        if graph.done is not None:
            graph.done.wait()
        graph.image.copy_(x)
        graph.replay()
        result = graph.result.clone()
        if graph.done is not None:
            graph.done.record()
        return result

    def _key(self, x: Tensor) -> Any:
        return tuple(x.shape), x.dtype, x.device, autocast_dtype(x.device.type), dispatch.settings(x.device)

    def _recorded(self, x: Tensor) -> _Graph:
        # Outside of inference mode, whose tensors could not be written to by a call without it.
        with torch.inference_mode(False), torch.no_grad(), uses_recorded() as prepared:
            image = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
            replay, result = self._record(lambda: self.model(image))
        return _Graph(image, replay, result, prepared, torch.cuda.Event() if x.is_cuda else None)

    def __getstate__(self) -> dict[str, Any]:
        """Graphs are not copied or pickled: a copy records its own."""
        return {**self.__dict__, "_graphs": OrderedDict(), "_state": None}


def _record(run: Callable[[], Tensor]) -> Recording:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARMUP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Autocast keeps cast weights between calls: within a recording they would be the recording's own.
    with (
        torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False),
        torch.cuda.graph(graph),
    ):
        result = run()
    return graph.replay, result
