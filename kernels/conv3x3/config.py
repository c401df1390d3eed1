"""Launch configurations: the blocks, warps and stages a kernel runs with, chosen by pure functions.

A choice depends on the op, the shape, the dtype and the target, and for a convolution never on the batch size: an
image gives the same bits alone and in a batch. Nothing here imports Triton or touches a GPU. The choices are derived
from compiled code (registers, spills, shared memory); where a figure is a guess that no GPU has confirmed, it says so.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from fastunet.kernels import autotune
from fastunet.kernels.gpu import Config, Target, cdiv
from torch import Tensor

# How a kernel reads its operands: gathering through pointers, tap by tap; the same with all taps folded into the
# channels; whole boxes through tensor descriptors, which the hardware copies and pads with zeros; on sm_90 also such
# boxes with a border, fetched once for three taps.
POINTER, FOLDED, DESCRIPTOR, HALO = "pointer", "folded", "descriptor", "halo"

# By what names `autotune` knows the ops that have configurations: WEIGHT_GRAD a WeightGradConfig, others a ConvConfig.
CONV3X3, INPUT_GRAD, WEIGHT_GRAD = "conv3x3", "conv3x3_input_grad", "conv3x3_weight_grad"
COMPOSED = "conv_transpose2x2_concat_conv3x3"

# Below this many input channels the nine taps fold into one K dimension of 9*C values: tap by tap, at least half of
# each block of 16 channels, the least tl.dot takes, would be zeros.
FOLDED_BELOW = 8

# A tile is 8 pixels wide: for the rows of a tensor-core fragment the vertical half of a pooling window is then in one
# thread's registers.
TILE_W = 8

# Left to itself, ptxas holds some kernels to 80, 128 or 168 registers, for occupancy, and spills a few values: these
# are allowed all there are. The others do not spill, and might lose occupancy. Unmeasured.
ALL_REGISTERS = 255
# With eight warps, two programs run on a multiprocessor instead of one. Unmeasured.
TWO_PROGRAMS = 128

# Configurations remembered of each kind: they are pure functions of a shape, asked for at every launch.
REMEMBERED = 4096


@dataclass(frozen=True)
class ConvShape:
    """What the choice for a convolution depends on.

    c1, c2, c_out: channels of the two inputs (c2 may be 0) and of the output. aligned: whether rows of channels, of
    activations and weight, start at multiples of 8 or 16 elements and so load in vectors. c_out2: channels of a second
    output, where an input gradient has two.
    """

    c1: int
    c2: int
    c_out: int
    height: int
    width: int
    aligned: bool = True
    c_out2: int = 0


@dataclass(frozen=True)
class ConvConfig(Config):
    """Blocks of the convolution, and of its input gradient, which is one.

    tile_h, tile_w: pixels of an output tile. block_n: output channels. block_k: input channels of one step, or values
    of 9*C where folded. variant: one of the variants above. Of the halo variant, num_stages are those of pixels and
    weight_stages those of weights.
    splits: programs that share the input channels of a tile, each with as many; a second kernel adds their sums.
    """

    tile_h: int
    tile_w: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    variant: str
    max_registers: int | None = None
    weight_stages: int = 0
    splits: int = 1


def stages(bytes_per_stage: int, target: Target, *, programs: int = 2) -> int:
    """Return pipeline stages, 2 to 4, such that `programs` of them fit one multiprocessor's shared memory together."""
    return max(2, min(4, target.shared_memory // programs // bytes_per_stage))


def cover(n: int, smallest: int, largest: int) -> int:
    """Return the smallest power of two >= n, held between two powers of two."""
    return min(largest, max(smallest, 1 << (n - 1).bit_length()))


def aligned(*sizes: int) -> bool:
    """Return whether Triton knows rows of these sizes to start at multiples of 16 elements."""
    return all(size % 16 == 0 for size in sizes)


def channel_block(channels: int, largest: int) -> int:
    """Return a block of output channels: 32 at least, and 64 rather than 128 where 128 would compute more padding."""
    block = cover(channels, 32, largest)
    if block == 128 and cdiv(channels, 128) * 128 > cdiv(channels, 64) * 64:
        return 64
    return block


def step_block(c1: int, c2: int, largest: int) -> int:
    """Return a block of input channels: the largest power of two that divides both inputs' channels, in whole 16s."""
    common = cdiv(c1, 16) * 16 | cdiv(c2, 16) * 16
    return min(common & -common, largest)


def conv_config(
    shape: ConvShape, dtype: torch.dtype, target: Target, *, allow_tf32: bool, op: str = CONV3X3
) -> ConvConfig:
    """Return blocks for a convolution of `shape`; `allow_tf32` matters for float32 only. op: CONV3X3, INPUT_GRAD for
    one that is an input gradient, or COMPOSED, whose kernels are others; the first two also with autotune.STRIDE2, by
    which height and width of `shape` are those of the output.
    """
    found = autotune.config_for(op, shape, dtype, allow_tf32, target.name, ConvConfig)
    if found is None and op == COMPOSED:
        return heuristic_composed_config(shape, dtype, target)
    heuristic = by_stride_2 if op.endswith(autotune.STRIDE2) else heuristic_conv_config
    return found or heuristic(shape, dtype, target, allow_tf32)


def gathering(target: Target) -> Target:
    """Return the target as one without descriptors."""
    return replace(target, capability=min(target.capability, 89))


def by_stride_2(
    shape: ConvShape, dtype: torch.dtype, target: Target, allow_tf32: bool, *, gathers: bool = False
) -> ConvConfig:
    """Return heuristic_conv_config for stride 2; with gathers, not the descriptor variant's.

    Where pixels are gathered, those that are read lie apart from those written, which takes registers, and so do the
    products of sm_90.
    """
    chosen = heuristic_conv_config(shape, dtype, target, allow_tf32)
    if chosen.variant == DESCRIPTOR and not gathers:
        return chosen
    chosen = heuristic_conv_config(shape, dtype, gathering(target), allow_tf32)
    spills = chosen.variant == POINTER and (chosen.num_warps == 4 or target.capability >= 90)
    return replace(chosen, max_registers=ALL_REGISTERS) if spills else chosen


@functools.lru_cache(REMEMBERED)
def heuristic_conv_config(shape: ConvShape, dtype: torch.dtype, target: Target, allow_tf32: bool) -> ConvConfig:
    """Return conv_config, whatever was measured."""
    half = dtype.itemsize == 2
    tensor_cores = half or allow_tf32
    # Without tensor cores the operands lie in registers as well, and larger tiles spill.
    tile_h = 16 if tensor_cores else 8
    if fits_descriptors(dtype, target, (shape.c1, shape.c2), (shape.c_out, shape.c_out2)):
        return descriptor_config(shape, dtype, target)
    if shape.c2 == 0 and shape.c1 < FOLDED_BELOW:
        block_k = cover(9 * shape.c1, 16, 32) if tensor_cores else 16
        registers = TWO_PROGRAMS if half and target.capability < 100 else ALL_REGISTERS
        return ConvConfig(tile_h, TILE_W, 64, block_k, 8, num_stages=1, variant=FOLDED, max_registers=registers)
    if not shape.aligned:  # Loads go element by element: small steps and many threads hold the addresses.
        block_n = cover(shape.c_out, 32, 64)
        return ConvConfig(tile_h, TILE_W, block_n, 16, 8, num_stages=2, variant=POINTER, max_registers=ALL_REGISTERS)
    deepest = 16 if not tensor_cores else 64 if half and target.capability >= 90 else 32
    block_k = step_block(shape.c1, shape.c2, deepest)
    block_n = channel_block(shape.c_out, 128 if half and block_k == deepest else 64)
    # A batch of one image on a deep level is to occupy at least half of the GPU. Unmeasured.
    tiles = cdiv(shape.height, tile_h) * cdiv(shape.width, TILE_W)
    if block_n == 128 and 2 * tiles * cdiv(shape.c_out, 128) < target.multiprocessors:
        block_n = 64
    wide = block_n == (128 if half else 64)
    num_stages = stages((tile_h * TILE_W + block_n) * block_k * dtype.itemsize, target)
    limit = None if half and block_n > 32 else ALL_REGISTERS
    if half and wide and target.capability < 90:  # With a fourth stage's addresses two inputs would spill.
        num_stages, limit = min(num_stages, 3), TWO_PROGRAMS
    return ConvConfig(tile_h, TILE_W, block_n, block_k, 8 if wide else 4, num_stages, POINTER, limit)


def fits_descriptors(dtype: torch.dtype, target: Target, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> bool:
    """Return whether channel counts suit the descriptor variant, for 16 bits on a GPU that has it.

    Rows are whole 16-byte vectors, steps of 16 input channels come out even, and the output's channels fill most of
    the 64 rows that a tensor-core product has at least.
    """
    whole = all(c % 16 == 0 for c in inputs) and all(c % 8 == 0 for c in outputs)
    return dtype.itemsize == 2 and target.capability >= 90 and whole and max(outputs) > 32


@functools.lru_cache(REMEMBERED)
def descriptor_config(shape: ConvShape, dtype: torch.dtype, target: Target) -> ConvConfig:
    """Return the descriptor variant's blocks, where `fits_descriptors`, or `fits_fp8` in e4m3. Unmeasured."""
    channels_out = max(shape.c_out, shape.c_out2)
    block_n = channel_block(channels_out, 128)
    block_k = step_block(shape.c1, shape.c2, 128 // dtype.itemsize)
    blocks = cdiv(channels_out, block_n) * cdiv(shape.width, TILE_W)
    # Large tiles of pixels halve the reading of weights, but leave a GPU idle where the image is small.
    # Of e4m3 on sm_90 the sums of a step lie in registers beside those of all: of larger tiles they spill.
    heights = (32, 16) if dtype.itemsize == 2 or target.capability >= 100 else (16,)
    tile_h = next((h for h in heights if 4 * blocks * cdiv(shape.height, h) >= target.multiprocessors), 8)
    bytes_per_stage = (tile_h * TILE_W + block_n) * block_k * dtype.itemsize
    wide = tile_h * block_n > 32 * 64
    num_stages = stages(bytes_per_stage, target, programs=1 if wide else 2)
    warps = 8 if wide or block_n == 128 else 4
    limit = ALL_REGISTERS if target.capability >= 100 else None
    return ConvConfig(tile_h, TILE_W, block_n, block_k, warps, num_stages, DESCRIPTOR, limit)


def heuristic_composed_config(shape: ConvShape, dtype: torch.dtype, target: Target) -> ConvConfig:
    """Return the blocks of an upsampling composed with the convolution after it, where `fits_descriptors`. Unmeasured.

    shape: c1 channels of the convolution's first input, c2 and the size of the image before the upsampling.
    """
    # There is a program for each of four sub-pixels: as many as of an image of twice the size.
    doubled = replace(shape, height=2 * shape.height, width=2 * shape.width)
    return descriptor_config(doubled, dtype, target)


def splittings(chosen: ConvConfig, shape: ConvShape, target: Target) -> list[int]:
    """Return the numbers of splits worth a try: where the tiles of one image leave more than half of the GPU idle.

    Each program has whole blocks of channels, of each input as many. Whatever the batch, which it would help less the
    larger it is: the heuristic configs have none.
    """
    blocks1, blocks2 = shape.c1 // chosen.block_k, shape.c2 // chosen.block_k
    whole = shape.c1 % chosen.block_k == 0 and shape.c2 % chosen.block_k == 0 and not shape.c_out2
    if chosen.variant not in (POINTER, DESCRIPTOR) or not whole:
        return []
    programs = tiles_per_image(chosen, shape.height, shape.width) * cdiv(shape.c_out, chosen.block_n)
    return [
        splits
        for splits in (2, 4, 8, 16)
        if blocks1 % splits == 0 and blocks2 % splits == 0 and programs * splits <= 2 * target.multiprocessors
    ]


def has_fp8(target: Target) -> bool:
    """Return whether the GPU's tensor cores multiply e4m3, and read it through descriptors."""
    return target.capability >= 90


def fits_fp8(inputs: tuple[int, ...], c_out: int) -> bool:
    """Return whether a convolution can run in e4m3: rows are whole 16-byte vectors, and products take 32 channels at
    least.
    """
    return all(c % 32 == 0 for c in inputs) and c_out % 8 == 0 and c_out > 32


def with_norm(chosen: ConvConfig) -> ConvConfig:
    """Return the config of a convolution whose epilogue normalises: a first layer's spills in the larger tile."""
    return replace(chosen, tile_h=min(chosen.tile_h, 8)) if chosen.variant == FOLDED else chosen


def with_head(chosen: ConvConfig) -> ConvConfig:
    """Return the config for a convolution whose epilogue holds a head, which needs registers of its own, and the halo
    variant's all channels in one warpgroup.
    """
    if chosen.variant == HALO:
        return replace(chosen, block_n=64)
    return replace(chosen, tile_h=min(chosen.tile_h, 16))


def tiles_per_image(chosen: Any, height: int, width: int) -> int:
    """Return the tiles, tile_h x tile_w pixels as the config has them, that cover an image."""
    return cdiv(height, chosen.tile_h) * cdiv(width, chosen.tile_w)


def sizes(x: Tensor, up: Tensor | None, weight: Tensor, chosen: ConvConfig) -> dict[str, int]:
    """Return what the kernels are told of packed x, up and a weight [Cout, C1 + C2, 3, 3], and the steps of a split."""
    c1, c2 = x.shape[1], 0 if up is None else up.shape[1]
    return {
        "H": x.shape[2],
        "W": x.shape[3],
        "C1": c1,
        "C2": c2,
        "COUT": weight.shape[0],
        "steps1": conv_steps(chosen, c1 // chosen.splits),
        "steps2": conv_steps(chosen, c2 // chosen.splits),
    }


def conv_steps(chosen: ConvConfig, channels: int) -> int:
    """Return the steps of the inner loop over the taps of one input's channels."""
    return cdiv(9 * channels, chosen.block_k) if chosen.variant == FOLDED else 9 * cdiv(channels, chosen.block_k)
