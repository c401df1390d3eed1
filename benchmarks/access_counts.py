"""The bytes one launch of a kernel moves, from its grid and blocks, without running it.

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

from fastunet.kernels.config import TILE_W
from fastunet.kernels.gpu import Launch, cdiv
from torch import Tensor

# Values of ACTIVATION in the kernels of conv1x1, whose module would import triton.
_LINEAR, _SOFTMAX = 0, 2


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


def _tiles(a: Mapping[str, Any], images: int) -> int:
    return images * cdiv(a["H"], a["TILE_H"]) * cdiv(a["W"], a["TILE_W"])


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


def _conv3x3_input_grad(a: Mapping[str, Any], grid: int) -> Accesses:
    suffix = "desc" if "grad_desc" in a else "ptr"
    images, c1, c2, block = _images(a, f"grad_{suffix}"), a["C1"], a["C2"], a["BLOCK_N"]
    tiles = _tiles(a, images)
    rows = c1 + c2
    if suffix == "desc":  # A box of the first input's last channels runs on into the second's.
        rows = _box_rows(0, c1, block, c1 + c2) + _box_rows(c1, c2, block, c1 + c2)
    loads = {
        f"grad_{suffix}": images * _taps(a, "grad_desc") * a["COUT"] * (grid // tiles),
        f"weight_{suffix}": tiles * 9 * a["COUT"] * rows,
        f"x_{suffix}": _numel(a, f"x_{suffix}"),
    }
    return Accesses(loads, {name: _numel(a, name) for name in (f"out_{suffix}", f"out_up_{suffix}")}, {})


def _conv3x3_weight_grad(a: Mapping[str, Any], grid: int) -> Accesses:
    suffix = "desc" if "x_desc" in a else "ptr"
    # A folded program takes all taps; its block holds all of their channels.
    programs_in = 1 if a.get("FOLDED") else 9 * cdiv(a["C"], a["BLOCK_IN"])
    blocks_out = cdiv(a["COUT"], a["BLOCK_OUT"])
    loads = {
        f"grad_{suffix}": _numel(a, f"grad_{suffix}") * programs_in,
        f"x_{suffix}": _images(a, f"x_{suffix}") * _taps(a, "x_desc") * a["C"] * blocks_out,
    }
    return Accesses(loads, {"partial_ptr": _numel(a, "partial_ptr")}, {})


def _activation_grad(a: Mapping[str, Any], grid: int) -> Accesses:
    return _once(a, loads=("y_ptr", "grad_y_ptr", "grad_pooled_ptr"), stores=("out_ptr",))


# --- passes over pixels and windows ---


def _once(a: Mapping[str, Any], loads: Iterable[str], stores: Iterable[str]) -> Accesses:
    """Every element of these tensors once."""
    return Accesses({name: _numel(a, name) for name in loads}, {name: _numel(a, name) for name in stores}, {})


def _max_pool2x2(a: Mapping[str, Any], grid: int) -> Accesses:
    return Accesses({"x_ptr": 4 * a["windows"] * a["C"]}, {"y_ptr": a["windows"] * a["C"]}, {})


def _affine(a: Mapping[str, Any], lookups: int, channels_alone: int) -> dict[str, int]:
    """Mean and invstd at so many windows or blocks, gamma and beta at so many blocks, for all channels."""
    statistics = dict.fromkeys(("mean_ptr", "invstd_ptr"), lookups * a["C"])
    return statistics | dict.fromkeys(("gamma_ptr", "beta_ptr"), channels_alone * a["C"])


def _lookups(a: Mapping[str, Any], grid: int) -> tuple[int, int]:
    """How often a pass over windows looks up what it knows by image, and by channel alone, for each channel."""
    blocks = grid // cdiv(a["C"], a["BLOCK_C"])
    return blocks * (a["BLOCK_P"] if a["PER_IMAGE"] else 1), blocks


def _normalise(a: Mapping[str, Any], grid: int) -> Accesses:
    once = _once(a, loads=("raw_ptr",), stores=("y_ptr", "pooled_ptr"))
    return once._replace(loads={**once.loads, **_affine(a, *_lookups(a, grid))})


def _norm_sums(a: Mapping[str, Any], grid: int) -> Accesses:
    once = _once(a, loads=("raw_ptr", "grad_y_ptr", "grad_pooled_ptr"), stores=("partial_ptr",))
    programs = grid // cdiv(a["C"], a["BLOCK_C"])
    return once._replace(loads={**once.loads, **_affine(a, programs, programs)})


def _norm_grad(a: Mapping[str, Any], grid: int) -> Accesses:
    once = _once(a, loads=("raw_ptr", "grad_y_ptr", "grad_pooled_ptr"), stores=("out_ptr",))
    lookups, blocks = _lookups(a, grid)
    sums = 0 if a["GIVEN"] else 2 * lookups * a["C"]
    return once._replace(loads={**once.loads, **_affine(a, lookups, blocks), "sums_ptr": sums})


def _merging(a: Mapping[str, Any], programs: int, rows: Iterable[int]) -> dict[str, int]:
    """Loads of merging so many rows of statistics each, by channel blocks that all read the counts."""
    rows = list(rows)
    blocks = programs // len(rows)
    # Of each block of rows, the first one's mean is loaded again, as pivot.
    pivots = sum(cdiv(n, a["BLOCK_R"]) for n in rows)
    return {"count_ptr": sum(rows) * blocks, "partial_ptr": (2 * sum(rows) + pivots) * a["C"]}


def _merge_statistics(a: Mapping[str, Any], grid: int) -> Accesses:
    outs = grid // cdiv(a["C"], a["BLOCK_C"])
    rows = [min(a["per_split"], a["per_group"] - i % a["splits"] * a["per_split"]) for i in range(outs)]
    # The programs of all channel blocks store the same count.
    stores = {"out_count_ptr": grid, "out_partial_ptr": 2 * outs * a["C"]}
    return Accesses(_merging(a, grid, rows), stores, {})


def _finish_statistics(a: Mapping[str, Any], grid: int) -> Accesses:
    groups = grid // cdiv(a["C"], a["BLOCK_C"])
    running = dict.fromkeys(("running_mean_ptr", "running_var_ptr"), a["C"])
    stores = {"mean_ptr": groups * a["C"], "invstd_ptr": groups * a["C"], **running}
    return Accesses(_merging(a, grid, [a["per_group"]] * groups) | running, stores, {})


def _sum_rows(a: Mapping[str, Any], grid: int) -> Accesses:
    return _once(a, loads=("partial_ptr",), stores=("first_ptr", "second_ptr"))


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


def _conv_transpose2x2_input_grad(a: Mapping[str, Any], grid: int) -> Accesses:
    blocks = cdiv(a["C"], a["BLOCK_N"])
    loads = {"grad_ptr": _numel(a, "grad_ptr") * blocks, "weight_ptr": grid // blocks * _numel(a, "weight_ptr")}
    return Accesses(loads, {"out_ptr": _numel(a, "out_ptr")}, {})


def _conv1x1(a: Mapping[str, Any], grid: int) -> Accesses:
    blocks = cdiv(a["COUT"], a["BLOCK_N"])
    loads = {
        "x_ptr": blocks * _numel(a, "x_ptr"),
        "weight_ptr": grid // blocks * _numel(a, "weight_ptr"),
        "bias_ptr": grid // blocks * a["COUT"],
    }
    return Accesses(loads, {"y_ptr": _numel(a, "y_ptr")}, {})


def _conv1x1_input_grad(a: Mapping[str, Any], grid: int) -> Accesses:
    blocks = cdiv(a["C"], a["BLOCK_N"])
    # A softmax takes the products of gradient and output first.
    passes = blocks * (2 if a["ACTIVATION"] == _SOFTMAX else 1)
    outputs = 0 if a["ACTIVATION"] == _LINEAR else passes * _numel(a, "y_ptr")
    loads = {
        "grad_ptr": passes * _numel(a, "grad_ptr"),
        "y_ptr": outputs,
        "weight_ptr": grid // blocks * _numel(a, "weight_ptr"),
    }
    return Accesses(loads, {"out_ptr": _numel(a, "out_ptr")}, {})


def _pixel_weight_grad(a: Mapping[str, Any], grid: int) -> Accesses:
    blocks_in, blocks_out = cdiv(a["C"], a["BLOCK_IN"]), cdiv(a["COUT"], a["BLOCK_OUT"])
    dots = blocks_in * blocks_out if a["ACTIVATION"] == _SOFTMAX else 0
    grads = (blocks_in + dots) * _numel(a, "grad_ptr")
    loads = {
        "x_ptr": _numel(a, "x_ptr") * a["SUBPIXELS"] * blocks_out,
        "grad_ptr": grads,
        "y_ptr": 0 if a["ACTIVATION"] == _LINEAR else grads,
    }
    return Accesses(loads, {name: _numel(a, name) for name in ("partial_ptr", "bias_partial_ptr")}, {})


# --- segmentation_loss ---


def _segmentation_sums(a: Mapping[str, Any], grid: int) -> Accesses:
    return _once(a, loads=("logits_ptr", "target_ptr", "mask_ptr"), stores=("partial_ptr",))


def _segmentation_sums_grad(a: Mapping[str, Any], grid: int) -> Accesses:
    once = _once(a, loads=("logits_ptr", "target_ptr", "mask_ptr"), stores=("out_ptr",))
    # The gradient of the truth's sum is not needed.
    rows = 2 + (0 if not a["ENTROPY"] else 1 if a["SOFTMAX"] else 2)
    loads = {**once.loads, "grad_ptr": grid * rows * a["C"]}
    return once._replace(loads=loads, distinct={"grad_ptr": a["images"] * rows * a["C"]})


COUNTS: dict[str, Callable[[Mapping[str, Any], int], Accesses]] = {
    "conv3x3_kernel": _conv3x3,
    "conv3x3_descriptor_kernel": _conv3x3,
    "conv3x3_split_kernel": _conv3x3_split,
    "conv3x3_split_descriptor_kernel": _conv3x3_split,
    "conv3x3_finish_kernel": _conv3x3_finish,
    "conv3x3_hopper_kernel": _hopper,
    "quantise_kernel": _quantise,
    "conv3x3_input_grad_kernel": _conv3x3_input_grad,
    "conv3x3_input_grad_descriptor_kernel": _conv3x3_input_grad,
    "conv3x3_weight_grad_kernel": _conv3x3_weight_grad,
    "conv3x3_weight_grad_descriptor_kernel": _conv3x3_weight_grad,
    "activation_grad_kernel": _activation_grad,
    "max_pool2x2_kernel": _max_pool2x2,
    "normalise_kernel": _normalise,
    "norm_sums_kernel": _norm_sums,
    "norm_grad_kernel": _norm_grad,
    "merge_statistics_kernel": _merge_statistics,
    "finish_statistics_kernel": _finish_statistics,
    "sum_rows_kernel": _sum_rows,
    "conv_transpose2x2_kernel": _conv_transpose2x2,
    "conv_transpose2x2_descriptor_kernel": _conv_transpose2x2,
    "conv_transpose2x2_concat_conv3x3_kernel": _composed,
    "conv_transpose2x2_input_grad_kernel": _conv_transpose2x2_input_grad,
    "conv1x1_kernel": _conv1x1,
    "conv1x1_input_grad_kernel": _conv1x1_input_grad,
    "pixel_weight_grad_kernel": _pixel_weight_grad,
    "segmentation_sums_kernel": _segmentation_sums,
    "segmentation_sums_grad_kernel": _segmentation_sums_grad,
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
