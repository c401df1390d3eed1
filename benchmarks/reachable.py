"""Every configuration that the kernels' choices can give, each with a shape, or channels, that lead to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from fastunet.kernels import config_passes, config_pixels
from fastunet.kernels.config_passes import PassConfig
from fastunet.kernels.config_pixels import PixelProductConfig, PixelWeightGradConfig
from fastunet.kernels.conv3x3 import config, config_grad
from fastunet.kernels.conv3x3.config import DESCRIPTOR, ConvConfig, ConvShape
from fastunet.kernels.conv3x3.config_grad import WeightGradConfig
from fastunet.kernels.gpu import Target, row_unit

Config = TypeVar("Config")
# By configuration, and whether rows load in vectors, which code depends on too.
Convolutions = dict[tuple[Config, bool], ConvShape]
Channels = tuple[int, int]  # in and out
Case = TypeVar("Case")

# They lead to the three heights of tiles.
_IMAGES = ((512, 512), (33, 128), (8, 8))
# They lead to the runs of pixels, whole and cut; the last to none.
_RUNS = ((64, 64), (2, 32), (4, 16), (8, 8), (1, 32), (2, 16), (4, 8), (1, 16), (2, 8), (63, 63))
# They lead to every config for conv_transpose2x2.
_CHANNELS = tuple(itertools.product((17, 64, 128), (3, 17, 32, 64, 128)))
_POWERS = [1 << power for power in range(config_passes.MOST_CHANNELS.bit_length())]


def _first(choose: Callable[[Case], Config], cases: Iterable[Case]) -> dict[Config, Case]:
    """Return what is chosen for the cases, each with the first of those that lead to it."""
    found: dict[Config, Case] = {}
    for case in cases:
        found.setdefault(choose(case), case)
    return found


def _shapes(c_in: Iterable[int], c_out: Iterable[int], images: Iterable[tuple[int, int]]) -> list[ConvShape]:
    cases = itertools.product(c_in, c_out, images)
    return [ConvShape(i, 0, o, *image, row_unit(i, o) == 8) for i, o, image in cases]


def convolutions(dtype: torch.dtype, target: Target, *, allow_tf32: bool) -> Convolutions[ConvConfig]:
    """Those of a 3x3 convolution."""

    def choose(shape: ConvShape) -> tuple[ConvConfig, bool]:
        chosen = config.conv_config(shape, dtype, target, allow_tf32=allow_tf32)
        return chosen, shape.aligned or chosen.variant == DESCRIPTOR

    return _first(choose, _shapes((1, 3, 17, 16, 32, 64), (32, 64, 128, 33), _IMAGES))


def weight_grads(dtype: torch.dtype, target: Target, *, allow_tf32: bool) -> Convolutions[WeightGradConfig]:
    """Those of its weight gradient."""

    def choose(shape: ConvShape) -> tuple[WeightGradConfig, bool]:
        chosen = config_grad.weight_grad_config(shape, dtype, target, allow_tf32=allow_tf32)
        return chosen, shape.aligned or chosen.variant == DESCRIPTOR

    return _first(choose, _shapes((3, 7, 17, 33, 16, 32, 64, 128), (17, 33, 32, 64, 128), _RUNS))


def pixel_products(dtype: torch.dtype, target: Target, *, allow_tf32: bool) -> dict[PixelProductConfig, Channels]:
    """Those of a transposed convolution."""
    return _first(lambda c: config_pixels.pixel_product_config(*c, dtype, target, allow_tf32=allow_tf32), _CHANNELS)


def subpixel_tiles(dtype: torch.dtype, target: Target) -> dict[ConvConfig, Channels]:
    """Those of one through descriptors."""
    found = _first(lambda c: config_pixels.subpixel_tile_config(*c, dtype, target), _CHANNELS)
    return {chosen: channels for chosen, channels in found.items() if chosen is not None}


def pixel_weight_grads(
    dtype: torch.dtype, target: Target, *, allow_tf32: bool
) -> dict[PixelWeightGradConfig, Channels]:
    """Those of its weight gradient."""
    return _first(lambda c: config_pixels.pixel_weight_grad_config(*c, dtype, target, allow_tf32=allow_tf32), _CHANNELS)


def heads(dtype: torch.dtype, target: Target, *, allow_tf32: bool) -> dict[PixelProductConfig, Channels]:
    """Those of a 1x1 convolution, with softmax."""
    options = {"allow_tf32": allow_tf32, "softmax": True}
    return _first(
        lambda c: config_pixels.head_config(*c, dtype, target, **options), itertools.product((17, 64), (3, 17, 65))
    )


def pointwise() -> dict[PassConfig, int]:
    """Those of an elementwise pass."""
    return _first(config_passes.pointwise_config, _POWERS)


def norm_grads() -> dict[PassConfig, int]:
    """Those of a norm's gradient, for even and odd numbers of channels."""
    return _first(config_passes.norm_grad_config, [3, 7, 15, 31, 63, *_POWERS[2:]])


def pixels() -> dict[PassConfig, int]:
    """Those of a pass over whole pixels."""
    return _first(config_passes.pixel_config, _POWERS)
