"""`fastunet.tune`: measure the layers of a model ahead of its first call, those first that have most to gain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastunet import dispatch, measuring
from fastunet.explanation import Explanation, calls, explain, has_own_blocks
from fastunet.kernels import autotune, gpu
from fastunet.measuring.timing import Quantiles, clock_of, interleaved_samples
from fastunet.ops.registration import Op
from fastunet.unet import check_is_of_images

# Layers that could not gain this share of their time are not measured.
_LEAST_GAIN = 0.05
# Of the square matrices and of the copied tensor that tell the GPU's peak rates; timed so many times.
_SIDE, _BYTES, _ROUNDS = 8192, 1 << 28, 5


def tune(
    model: nn.Module,
    example: Tensor,
    *,
    seconds: float | None = None,
    neighbours: int | None = measuring.FEW,
    on_layer: Callable[[int, int, str], None] = lambda done, total, layer: None,
) -> Explanation:
    """Measure the layers of model(example) on its GPU that are not measured yet; return what runs each from now on.

    The model's mode counts: in train mode its layers are measured forward and backward, in eval as for inference. Of a
    model that is not fastunet's, those that torch.compile(model, backend="fastunet") could replace, and what inductor
    makes of them beside. Layers that ATen
    runs in about the least time that the GPU's peak rates allow are left to it. What is found is kept for later
    processes. With several ranks the first one measures and tells the others, which have to call this as well. On a CPU
    nothing is measured.

    seconds: to measure in; by default what is left to this process of FASTUNET_TUNE_SECONDS. neighbours: how many
    configurations of each kernel are tried beside the heuristic one, None for all. on_layer: is told how many layers
    are done, of how many, and which is next. Raises ConfigError for a UNet of volumes.
    """
    check_is_of_images("tune", model)
    if example.device.type == "cuda" and dispatch.triton_unsupported(example.device, torch.float32) is None:
        budget = measuring.process_budget if seconds is None else measuring.Budget(seconds)
        try:
            if dispatch.ranks() == 1 or torch.distributed.get_rank() == 0:
                _measure(model, example, budget, neighbours, on_layer)
        finally:  # The others wait.
            share(gpu.target(example.device).name)
    return explain(model, example)


def share(name: str) -> None:
    """Have all ranks know of the GPU of that name what the first one knows."""
    if dispatch.ranks() > 1:
        known: list[Any] = [[*autotune.table(name).values()]]
        torch.distributed.broadcast_object_list(known)
        autotune.put(name, known[0], keep=False)


def _measure(
    model: nn.Module,
    example: Tensor,
    budget: measuring.Budget,
    neighbours: int | None,
    on_layer: Callable[[int, int, str], None],
) -> None:
    rates, compiles = None, not has_own_blocks(model)
    autotune.forget_skipped(gpu.target(example.device).name, measuring.NO_TIME)
    for _ in range(2):  # Where an upsampling loses to its two steps, those are to be measured then.
        layers: dict[tuple[autotune.Layer, torch.dtype], tuple[Op, Any]] = {}
        for op, args in calls(model, example):
            layer = args.choice(training=model.training).unmeasured
            if layer is not None:
                layers.setdefault((layer, args[0].dtype), (op, args))
        if not layers:
            return
        with budget.spend():
            rates = rates or peak_rates(example.device)
            gains = {
                key: gain_of(op.invoke, args, key[0], *rates) for key, (op, args) in layers.items() if budget.left > 0
            }
        order = sorted(layers, key=lambda key: -gains.get(key, (0.0, 0.0))[0])
        for done, (layer, dtype) in enumerate(order):
            on_layer(done, len(order), f"{layer.op} {layer.c_in} to {layer.c_out} at {layer.height}x{layer.width}")
            op, args = layers[layer, dtype]
            if gains.get((layer, dtype), (0.0, 1.0))[1] < _LEAST_GAIN:
                measuring.skip(args, layer, "ATen takes about the least time that the GPU's peak rates allow")
                continue
            compiled: Any = torch.compile(op.composition, dynamic=False) if compiles else None
            measuring.measure(op.invoke, args, layer, budget, neighbours, compiled)
            if compiles:  # Each is a function that torch.compile knows already, of which it compiles only so many.
                torch.compiler.reset()
        on_layer(len(order), len(order), "")


def gain_of(
    call: measuring.Call, args: Any, layer: autotune.Layer, flops_per_second: float, bytes_per_second: float
) -> tuple[float, float]:
    """Return by how many seconds ATen takes longer for the layer than the peak rates demand, and which share of its
    time that is; of a layer that does not fit into memory, all of it: `measure` will say so.
    """
    from torch.utils.flop_counter import FlopCounterMode  # Late: it imports triton, if there is one.

    def measured(batch: int) -> tuple[float, float]:
        inputs = measuring.synthetic(args, batch)
        run = measuring.run_of(call, inputs, layer, "aten")
        with FlopCounterMode(display=False) as counter:
            outputs, gradients = run()
        tensors = [t for t in (*inputs, *outputs, *outputs, *gradients) if isinstance(t, Tensor)]
        moved = sum(t.numel() * t.element_size() for t in tensors)
        least = max(counter.get_total_flops() / flops_per_second, moved / bytes_per_second)
        seconds = seconds_of(run, args[0].device)
        return max(0.0, seconds - least), max(0.0, 1 - least / seconds)

    try:
        return measuring.within_memory(measured, args)
    except torch.OutOfMemoryError:
        return 0.0, 1.0


def peak_rates(device: torch.device) -> tuple[float, float]:
    """Return measured FLOP/s, of a product of matrices in 16 bits, and bytes/s that a copy reads and writes."""
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(_SIDE, _SIDE, generator=generator, device=device).half()
    source = torch.empty(_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product, copy = seconds_of(lambda: a @ a, device), seconds_of(lambda: target.copy_(source), device)
    return 2 * _SIDE**3 / product, 2 * _BYTES / copy


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Return the median of a few runs."""
    return Quantiles.of(interleaved_samples({"run": [run]}, clock_of(device), rounds=_ROUNDS)["run"]).median
