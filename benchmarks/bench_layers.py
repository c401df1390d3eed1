"""The layers of the classic U-Net, forward: ours, cuDNN (oneDNN) eager, its graph API, torch.compile.

On a GPU for 16 images of 512x512, as a roofline of the net has them; on a CPU the same layers for one of 64x64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from .cases import Layer, meta_unet, unet_layers
from .gate import check_layer
from .layer_runs import device_inputs, input_sets
from .opponents import Opponent, Run, dtype_name, layer_opponents
from .suite import Options, Work, left_to_all

# batch, side.
SIZES = {"cpu": (1, 64), "cuda": (16, 512)}
FEATURES = (64, 128, 256, 512, 1024)


def works(options: Options) -> list[Work]:
    batch, side = SIZES[options.device.type]
    return [
        _work(layer, opponent, options, dtype)
        for layer in unet_layers(meta_unet(3, 2, FEATURES), batch, side, side)
        for dtype in options.dtypes()
        for opponent in layer_opponents(layer, options.device, dtype, thorough=options.everything)
    ]


def _work(layer: Layer, opponent: Opponent, options: Options, dtype: torch.dtype) -> Work:
    elements = sum(math.prod(shape) for shape in layer.shapes.values())
    return Work(
        name=f"{layer.name}-{dtype_name(dtype)}-{opponent.name}",
        group=f"{layer.name} {dtype_name(dtype)}",
        prepare=functools.partial(_prepare, layer, opponent, options.device, dtype),
        flops=layer.flops,
        # Inputs and outputs, as often as they pass the cache twice; the check looks at one image.
        memory=4.0 * elements * dtype.itemsize,
        info={
            "layer": layer.name,
            "op": layer.op,
            "shapes": {name: list(shape) for name, shape in layer.shapes.items()},
            "input_bytes": elements * dtype.itemsize,
            "implementation": opponent.name,
            "layout": opponent.layout,
            "dtype": opponent.dtype,
        },
        unavailable=left_to_all(opponent, options),
    )


def _prepare(layer: Layer, opponent: Opponent, device: torch.device, dtype: torch.dtype) -> list[Run]:
    inputs = device_inputs(layer, device, dtype)
    runs = [opponent.prepare(each) for each in input_sets(inputs, device)]
    check_layer(layer, inputs, runs[0](), allow_tf32=device.type == "cuda")
    return runs


def test_layer(work: Work, timed: Callable[[Work], None]) -> None:
    timed(work)
