"""The bytes that a launch of a forward kernel moves, from its grid and blocks, without running it.

Two borders are counted. Between multiprocessors and L2: what all programs together load and store, lanes that are
masked, and the parts of a box outside its tensor, left out. No load is taken to hit L1, so for kernels that gather
through pointers it is an upper bound; boxes do not pass through L1. Between L2 and memory: each distinct byte once a
launch. That takes L2 to keep a tile of pixels and its halo while its neighbours run, which launch orders see to, and
the weights throughout (at most 19 MB in the classic net): a lower bound, as near as that holds. Sectors that are
fetched for part of their 32 bytes are counted by that part.

The counts are exact: tests run the kernels in Triton's interpreter, Gluon's on a model of the hardware, and count every
access.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastunet.kernels.conv3x3.config import TILE_W
from fastunet.kernels.gpu import Launch, cdiv
from torch import Tensor


class Accesses(NamedTuple):
    """Elements that all programs together load and store, by the kernel's parameter; of a tensor that is not there, no
    matter how many. distinct: how many different ones, where that is neither all of them nor all of the tensor.
    """

    loads: Mapping[str, int]
    stores: Mapping[str, int]
    distinct: Mapping[str, int]


def tensor_of(argument: Any) -> Tensor | None:
    """The tensor of a kernel's argument, pointer or descriptor; None where it is none."""
    found = getattr(argument, "base", argument)
    return found if isinstance(found, Tensor) else None


# --- pieces ---


def tap_rows(size: int, tile: int | None = None) -> int:
    """Rows (or columns) of an image of `size` of them that its tiles load for the three taps -1, 0 and 1 in all.

    Gathered, only pixels of the image have taps, and taps outside it are masked.
    """
    return 3 * size - 2 if tile is None else _box_taps(size, tile, (-1, 0, 1))


def _box_taps(size: int, tile: int, taps: Sequence[int], covered: int | None = None) -> int:
    """The same for boxes of `tile` rows: the last one's rows past the edge have taps too, of which some are inside.

    covered: rows of all boxes, where they are not those that `size` rows need.
    """
    covered = covered or cdiv(size, tile) * tile
    return sum(min(size, covered + tap) - max(0, tap) for tap in taps)


def _taps(a: Mapping[str, Any], desc: str) -> int:
    """Pixels of one image that the taps of its tiles load in all, for a kernel that may have the operand `desc`."""
    if desc in a:
        return tap_rows(a["H"], a["TILE_H"]) * tap_rows(a["W"], a["TILE_W"])
    return tap_rows(a["H"]) * tap_rows(a["W"])


def _images(a: Mapping[str, Any], name: str) -> int:
    tensor = tensor_of(a[name])
    assert tensor is not None
    return tensor.shape[0]


def _box_rows(first: int, size: int, box: int, limit: int) -> int:
    """Rows that boxes at first, first + box, ... load to cover `size` rows of a tensor that has `limit`."""
    return sum(min(limit, first + at + box) - (first + at) for at in range(0, size, box))


def _numel(a: Mapping[str, Any], name: str) -> int:
    tensor = tensor_of(a[name])
    return 0 if tensor is None else tensor.numel()


# --- conv3x3 ---


def _conv3x3(a: Mapping[str, Any], grid: int) -> Accesses:
    suffix = "desc" if "x_desc" in a else "ptr"
    epilogue = _epilogue(a, grid, f"y_{suffix}", f"pooled_{suffix}")
    scales = {name: grid for name in ("y_scale_ptr", "pooled_scale_ptr") if name in a}
    return Accesses({**_operands(a, grid), **epilogue.loads, **scales}, epilogue.stores, {})


def _operands(a: Mapping[str, Any], grid: int) -> dict[str, int]:
    """What the sums of a convolution load. Splits share the channels of a tile: together they load them once."""
    suffix, channels = "desc" if "x_desc" in a else "ptr", a["COUT"]
    images, blocks, taps = _images(a, f"x_{suffix}"), cdiv(channels, a["BLOCK_N"]), _taps(a, "x_desc")
    tiles = grid // (blocks * a.get("SPLITS", 1))
    return {
        f"x_{suffix}": images * taps * a["C1"] * blocks,
        f"up_{suffix}": images * taps * a["C2"] * blocks,
        f"weight_{suffix}": tiles * 9 * (a["C1"] + a["C2"]) * channels,
    }


def _epilogue(a: Mapping[str, Any], grid: int, y: str, pooled: str) -> Accesses:
    channels = a["COUT"]
    tiles = grid // cdiv(channels, a["BLOCK_N"])
    loads = {
        **dict.fromkeys(("bias_ptr", "mean_ptr", "variance_ptr", "gamma_ptr"), tiles * channels),
        "head_weight_ptr": tiles * channels * a["CLASSES"],
        "head_bias_ptr": tiles * a["CLASSES"],
    }
    stores = {
        y: _numel(a, y),
        pooled: _numel(a, pooled),
        "head_ptr": _numel(a, "head_ptr"),
        "count_ptr": tiles,
        "partial_ptr": 2 * tiles * channels,
    }
    return Accesses(loads, stores, {})


def _conv3x3_split(a: Mapping[str, Any], grid: int) -> Accesses:
    return Accesses(_operands(a, grid), {"sums_ptr": _numel(a, "sums_ptr")}, {})


def _conv3x3_finish(a: Mapping[str, Any], grid: int) -> Accesses:
    epilogue = _epilogue(a, grid, "y_ptr", "pooled_ptr")
    return Accesses({"sums_ptr": _numel(a, "sums_ptr"), **epilogue.loads}, epilogue.stores, {})


def _composed(a: Mapping[str, Any], grid: int) -> Accesses:
    images, channels = _images(a, "low_desc"), a["COUT"]
    blocks = cdiv(channels, a["BLOCK_N"])
    sides = [(a["H"], a["ODD_H"], a["TILE_H"]), (a["W"], a["ODD_W"], a["TILE_W"])]
    parities = [f"{row}{column}" for row in (0, 1) for column in (0, 1)]

    def pixels(parity: str) -> int:
        """Of skip's rows and columns of one parity: its taps of both sub-pixels, in pairs."""
        taps = {"0": (0, 0, 1), "1": (-1, 0, 0)}
        counts = []
        for of, (size, odd, tile) in zip(parity, sides, strict=True):
            limit = size + odd * (of == "0")
            counts.append(_box_taps(limit, tile, taps[of], covered=cdiv(size + odd, tile) * tile))
        return images * blocks * math.prod(counts)

    of_low = [_box_taps(n, tile, (-1, 0, 0, 1), covered=cdiv(n + odd, tile) * tile) for n, odd, tile in sides]
    programs = grid // blocks  # One for each sub-pixel of a tile.
    # The weights' last boxes of a sub-pixel run on into the next one's.
    rows = [_box_rows(sub * channels, channels, a["BLOCK_N"], 4 * channels) for sub in range(4)]
    loads = {
        **{f"skip{parity}_desc": pixels(parity) * a["C1"] for parity in parities},
        "low_desc": images * blocks * math.prod(of_low) * a["CL"],
        "skip_weight_desc": programs * 9 * a["C1"] * channels,
        "low_weight_desc": programs // 4 * 4 * a["CL"] * sum(rows),
        "border_ptr": programs * (2 + a["ODD_H"]) * (2 + a["ODD_W"]) * channels,
        **dict.fromkeys(("bias_ptr", "mean_ptr", "variance_ptr", "gamma_ptr"), programs * channels),
    }
    stores = {f"y{parity}_desc": _numel(a, f"y{parity}_desc") for parity in parities}
    return Accesses(loads, stores, {"border_ptr": 4 * (2 + a["ODD_H"]) * (2 + a["ODD_W"]) * channels})


def _hopper(a: Mapping[str, Any], grid: int) -> Accesses:
    """A tile's rows are fetched with a border, once for the three taps of each column: low boxes have the last two."""
    images, channels, blocks = _images(a, "x_desc"), a["COUT"], a["blocks_n"]
    tiles, height, tile = a["tiles"] // blocks, a["H"], a["TILE_H"]
    rows = sum(min(height, first + tile + 1) - max(0, first - 1) for first in range(0, height, tile))
    pixels = images * blocks * rows * tap_rows(a["W"], TILE_W)
    weights = tiles * 9 * (a["C1"] + a["C2"]) * channels
    loads = {"x_desc": pixels * a["C1"], "up_desc": pixels * a["C2"], "weight_desc": weights}
    # By each of the two halves of a tile.
    flags = {"bias_ptr": "BIAS", "mean_ptr": "NORM", "variance_ptr": "NORM", "gamma_ptr": "GAMMA"}
    loads |= {name: 2 * tiles * channels for name, flag in flags.items() if a[flag]}
    loads["head_weight_ptr"] = 2 * tiles * a["CLASSES"] * channels
    loads["head_bias_ptr"] = 2 * tiles * a["CLASSES"] if a["HEAD_BIAS"] else 0
    results = {"y_desc": a["STORE"], "pooled_desc": a["POOL"], "head_ptr": a["CLASSES"] > 0}
    return Accesses(loads, {name: _numel(a, name) for name, is_stored in results.items() if is_stored}, {})


def _quantise(a: Mapping[str, Any], grid: int) -> Accesses:
    return Accesses({"x_ptr": _numel(a, "x_ptr"), "scale_ptr": grid}, {"out_ptr": _numel(a, "out_ptr")}, {})


# --- conv_transpose2x2 and conv1x1 ---


def _conv_transpose2x2(a: Mapping[str, Any], grid: int) -> Accesses:
    blocks, channels = cdiv(a["COUT"], a["BLOCK_N"]), a["COUT"]
    tiles = grid // (4 * blocks)
    if "x_desc" not in a:
        weights, suffix = 4 * channels * a["C"], "ptr"
    else:  # A box of one sub-pixel's last channels runs on into the next one's.
        rows = sum(_box_rows(sub * channels, channels, a["BLOCK_N"], 4 * channels) for sub in range(4))
        weights, suffix = _numel(a, "weight_desc") // (4 * channels) * rows, "desc"
    loads = {
        f"x_{suffix}": 4 * blocks * _numel(a, f"x_{suffix}"),
        f"weight_{suffix}": tiles * weights,
        "bias_ptr": 4 * tiles * channels,
        **({"y_scale_ptr": grid} if suffix == "desc" else {}),
    }
    return Accesses(loads, {f"y_{suffix}": _numel(a, f"y_{suffix}")}, {})


def _conv1x1(a: Mapping[str, Any], grid: int) -> Accesses:
    blocks = cdiv(a["COUT"], a["BLOCK_N"])
    loads = {
        "x_ptr": blocks * _numel(a, "x_ptr"),
        "weight_ptr": grid // blocks * _numel(a, "weight_ptr"),
        "bias_ptr": grid // blocks * a["COUT"],
    }
    return Accesses(loads, {"y_ptr": _numel(a, "y_ptr")}, {})


COUNTS: dict[str, Callable[[Mapping[str, Any], int], Accesses]] = {
    "conv3x3_kernel": _conv3x3,
    "conv3x3_descriptor_kernel": _conv3x3,
    "conv3x3_split_kernel": _conv3x3_split,
    "conv3x3_split_descriptor_kernel": _conv3x3_split,
    "conv3x3_finish_kernel": _conv3x3_finish,
    "conv3x3_hopper_kernel": _hopper,
    "quantise_kernel": _quantise,
    "conv_transpose2x2_kernel": _conv_transpose2x2,
    "conv_transpose2x2_descriptor_kernel": _conv_transpose2x2,
    "conv_transpose2x2_concat_conv3x3_kernel": _composed,
    "conv1x1_kernel": _conv1x1,
}


# --- bytes ---


@dataclass(frozen=True)
class Traffic:
    """Bytes. read, written: from and to memory. loaded, stored: from and to L2 by the multiprocessors."""

    read: int = 0
    written: int = 0
    loaded: int = 0
    stored: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.read + other.read,
            self.written + other.written,
            self.loaded + other.loaded,
            self.stored + other.stored,
        )

    @property
    def memory(self) -> int:
        """Read and written."""
        return self.read + self.written


def traffic_of(launch: Launch) -> Traffic:
    """What the launch moves. KeyError for a kernel without a count."""
    accesses = COUNTS[launch.kernel.fn.__name__](launch.arguments, launch.grid)
    loaded, read = _bytes(launch, accesses.loads, accesses.distinct)
    stored, written = _bytes(launch, accesses.stores, accesses.distinct)
    return Traffic(read, written, loaded, stored)


def _bytes(launch: Launch, counts: Mapping[str, int], distinct: Mapping[str, int]) -> tuple[int, int]:
    moved = once = 0
    for name, count in counts.items():
        tensor = tensor_of(launch.arguments[name])
        if tensor is not None:
            moved += count * tensor.element_size()
            once += distinct.get(name, min(count, tensor.numel())) * tensor.element_size()
    return moved, once


def copies_of(launch: Launch, given: Iterable[Tensor | None]) -> Traffic:
    """What it took to copy tensors into the order in which the launch reads them: of all it has, those not `given`."""
    storages = {t.untyped_storage()._cdata for t in given if t is not None}
    copied = 0
    for argument in launch.arguments.values():
        tensor = tensor_of(argument)
        if tensor is not None and tensor.untyped_storage()._cdata not in storages:
            copied += tensor.numel() * tensor.element_size()
    return Traffic(copied, copied, copied, copied)
