"""Launch configurations: the blocks, warps and stages a kernel runs with, chosen by pure functions.

A choice depends on the op, the shape, the dtype and the target, and for a convolution never on the batch size: an
image gives the same bits alone and in a batch. Nothing here imports Triton or touches a GPU. The choices are derived
from compiled code (registers, spills, shared memory); where a figure is a guess that no GPU has confirmed, it says so.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from fastunet.kernels import tuning
from fastunet.kernels.gpu import Target

# How a kernel reads its operands: gathering through pointers, tap by tap; the same with all taps folded into the
# channels; or whole boxes through tensor descriptors, which the hardware copies and pads with zeros.
POINTER, FOLDED, DESCRIPTOR = "pointer", "folded", "descriptor"

# Below this many input channels the nine taps fold into one K dimension of 9*C values: tap by tap, at least half of
# each block of 16 channels, the least tl.dot takes, would be zeros.
FOLDED_BELOW = 8

# A tile is 8 pixels wide: for the rows of a tensor-core fragment the vertical half of a pooling window is then in one
# thread's registers.
TILE_W = 8

# Rows of pixels of a tile in the descriptor form of the weight gradient.
_DESCRIPTOR_TILE_H = 8

# Left to itself, ptxas holds some kernels to 80, 128 or 168 registers, for occupancy, and spills a few values: these
# are allowed all there are. The others do not spill, and might lose occupancy. Unmeasured.
_ALL_REGISTERS = 255


@dataclass(frozen=True)
class ConvShape:
    """What the choice for a convolution depends on.

    c1, c2, c_out: channels of the two inputs (c2 may be 0) and of the output. aligned: whether rows of channels, of
    activations and weight, start at multiples of 16 elements and so load in vectors. c_out2: channels of a second
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
class ConvConfig:
    """Blocks of the convolution, and of its input gradient, which is one.

    tile_h, tile_w: pixels of an output tile. block_n: output channels. block_k: input channels of one step, or values
    of 9*C where folded. form: POINTER, FOLDED or DESCRIPTOR. max_registers: per thread, None leaves it to ptxas.
    """

    tile_h: int
    tile_w: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    form: str
    max_registers: int | None = None


@dataclass(frozen=True)
class WeightGradConfig:
    """Blocks of the weight gradient.

    tile_h, tile_w: pixels of one step, its K dimension. block_out: output channels. block_in: input channels, or all
    9*C values where folded. form, max_registers: as in ConvConfig.
    """

    tile_h: int
    tile_w: int
    block_out: int
    block_in: int
    num_warps: int
    num_stages: int
    form: str
    max_registers: int | None = None


@dataclass(frozen=True)
class PointwiseConfig:
    """Blocks of an elementwise pass over 2x2 windows."""

    block_windows: int
    block_channels: int
    num_warps: int


@dataclass(frozen=True)
class StatisticsConfig:
    """Blocks of the merging of partial statistics.

    block_rows, block_channels: statistics of one step. splits: parts the rows of a group fall into, merged apart at
    first, of rows_per_split each.
    """

    block_rows: int
    block_channels: int
    splits: int
    rows_per_split: int


@dataclass(frozen=True)
class NormGradConfig:
    """Blocks of the gradient of a norm: 2x2 windows and channels of one step, and parts the windows fall into."""

    block_windows: int
    block_channels: int
    num_warps: int
    splits: int


def stages(bytes_per_stage: int, target: Target, *, programs: int = 2) -> int:
    """Pipeline stages, 2 to 4, such that `programs` of them fit one multiprocessor's shared memory together."""
    return max(2, min(4, target.shared_memory // programs // bytes_per_stage))


def cover(n: int, smallest: int, largest: int) -> int:
    """The smallest power of two >= n, held between two powers of two."""
    return min(largest, max(smallest, 1 << (n - 1).bit_length()))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def aligned(*sizes: int) -> bool:
    """Whether Triton knows rows of these sizes to start at multiples of 16 elements."""
    return all(size % 16 == 0 for size in sizes)


def _channel_block(channels: int, largest: int) -> int:
    """A block of output channels: 32 at least, and 64 rather than 128 where 128 would compute more padding."""
    block = cover(channels, 32, largest)
    if block == 128 and _cdiv(channels, 128) * 128 > _cdiv(channels, 64) * 64:
        return 64
    return block


def _step_block(c1: int, c2: int, largest: int) -> int:
    """A block of input channels: the largest power of two, 16 at least, that divides both inputs' channels."""
    common = c1 | c2
    return min(common & -common, largest)


def conv_config(shape: ConvShape, dtype: torch.dtype, target: Target, *, allow_tf32: bool) -> ConvConfig:
    """The blocks for a convolution of `shape`; `allow_tf32` matters for float32 only."""
    override = tuning.override("conv3x3", shape, dtype, allow_tf32, target.name, ConvConfig)
    return override or _derived_conv_config(shape, dtype, target, allow_tf32)


def _derived_conv_config(shape: ConvShape, dtype: torch.dtype, target: Target, allow_tf32: bool) -> ConvConfig:
    half = dtype.itemsize == 2
    tensor_cores = half or allow_tf32
    # Without tensor cores the operands lie in registers as well, and larger tiles spill.
    tile_h = 16 if tensor_cores else 8
    if _fits_descriptors(dtype, target, (shape.c1, shape.c2), (shape.c_out, shape.c_out2)):
        return _descriptor_conv_config(shape, dtype, target)
    if shape.c2 == 0 and shape.c1 < FOLDED_BELOW:
        block_k = cover(9 * shape.c1, 16, 32) if tensor_cores else 16
        return ConvConfig(tile_h, TILE_W, 64, block_k, 8, num_stages=1, form=FOLDED, max_registers=_ALL_REGISTERS)
    if not shape.aligned:  # Loads go element by element: small steps and many threads hold the addresses.
        block_n = cover(shape.c_out, 32, 64)
        return ConvConfig(tile_h, TILE_W, block_n, 16, 8, num_stages=2, form=POINTER, max_registers=_ALL_REGISTERS)
    deepest = 16 if not tensor_cores else 64 if half and target.capability >= 90 else 32
    block_k = _step_block(shape.c1, shape.c2, deepest)
    block_n = _channel_block(shape.c_out, 128 if half and block_k == deepest else 64)
    # A lone image on a deep level is to occupy at least half of the GPU. Unmeasured.
    tiles = _cdiv(shape.height, tile_h) * _cdiv(shape.width, TILE_W)
    if block_n == 128 and 2 * tiles * _cdiv(shape.c_out, 128) < target.multiprocessors:
        block_n = 64
    wide = block_n == (128 if half else 64)
    num_stages = stages((tile_h * TILE_W + block_n) * block_k * dtype.itemsize, target)
    limit = None if half else _ALL_REGISTERS
    return ConvConfig(tile_h, TILE_W, block_n, block_k, 8 if wide else 4, num_stages, POINTER, limit)


def _fits_descriptors(dtype: torch.dtype, target: Target, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> bool:
    """Whether channel counts suit the descriptor form, for 16 bits on a GPU that has it.

    Rows are whole 16-byte vectors, steps of 16 input channels come out even, and the output's channels fill most of
    the 64 rows that a tensor-core product has at least.
    """
    whole = all(c % 16 == 0 for c in inputs) and all(c % 8 == 0 for c in outputs)
    return dtype.itemsize == 2 and target.capability >= 90 and whole and max(outputs) > 32


def _descriptor_conv_config(shape: ConvShape, dtype: torch.dtype, target: Target) -> ConvConfig:
    """Large tiles of pixels, which halve the reading of weights, but for a small image. Unmeasured."""
    channels_out = max(shape.c_out, shape.c_out2)
    block_n = _channel_block(channels_out, 128)
    block_k = _step_block(shape.c1, shape.c2, 64)
    blocks = _cdiv(channels_out, block_n) * _cdiv(shape.width, TILE_W)
    tile_h = next((h for h in (32, 16) if 4 * blocks * _cdiv(shape.height, h) >= target.multiprocessors), 8)
    bytes_per_stage = (tile_h * TILE_W + block_n) * block_k * dtype.itemsize
    wide = tile_h * block_n > 32 * 64
    num_stages = stages(bytes_per_stage, target, programs=1 if wide else 2)
    warps = 8 if wide or block_n == 128 else 4
    limit = _ALL_REGISTERS if target.capability >= 100 else None
    return ConvConfig(tile_h, TILE_W, block_n, block_k, warps, num_stages, DESCRIPTOR, limit)


def with_head(chosen: ConvConfig) -> ConvConfig:
    """The config for a convolution whose epilogue holds a head, which needs registers of its own."""
    return replace(chosen, tile_h=min(chosen.tile_h, 16))


def tiles_per_image(chosen: ConvConfig | WeightGradConfig, height: int, width: int) -> int:
    """Pixel tiles that cover an image."""
    return _cdiv(height, chosen.tile_h) * _cdiv(width, chosen.tile_w)


def conv_steps(chosen: ConvConfig, channels: int) -> int:
    """Steps of the inner loop over the taps of one input's channels."""
    return _cdiv(9 * channels, chosen.block_k) if chosen.form == FOLDED else 9 * _cdiv(channels, chosen.block_k)


def weight_grad_config(shape: ConvShape, dtype: torch.dtype, target: Target, *, allow_tf32: bool) -> WeightGradConfig:
    """The blocks for the gradient of a weight [c_out, c1, 3, 3]; `allow_tf32` matters for float32 only."""
    override = tuning.override("conv3x3_weight_grad", shape, dtype, allow_tf32, target.name, WeightGradConfig)
    return override or _derived_weight_grad_config(shape, dtype, target, allow_tf32)


def _derived_weight_grad_config(
    shape: ConvShape, dtype: torch.dtype, target: Target, allow_tf32: bool
) -> WeightGradConfig:
    half = dtype.itemsize == 2
    c_in, c_out = shape.c1, shape.c_out
    # Descriptors fill a tile past the image's edge with zeros, which beside an infinite neighbour would make NaN.
    whole_tiles = shape.height % _DESCRIPTOR_TILE_H == 0 and shape.width % TILE_W == 0
    if whole_tiles and _fits_descriptors(dtype, target, (c_in,), (c_out,)):
        return _descriptor_weight_grad_config(c_in, c_out, dtype, target)
    tile_h, widest = (4, 64) if half or allow_tf32 else (2, 32)
    if c_in < FOLDED_BELOW:
        return WeightGradConfig(tile_h, TILE_W, widest, cover(9 * c_in, 32, 64), 8, 2, FOLDED, _ALL_REGISTERS)
    if not aligned(c_in, c_out):
        block_out, block_in = cover(c_out, 32, widest), cover(c_in, 32, 64)
        return WeightGradConfig(tile_h, TILE_W, block_out, block_in, 8, 2, POINTER, _ALL_REGISTERS)
    block_out = _channel_block(c_out, 128 if half else 64)
    block_in = _channel_block(c_in, 128 if block_out == 128 else 64)
    tile_h = 8 if half and target.capability >= 90 else 4
    wide = block_out == 128 or (not half and not allow_tf32 and block_out == block_in == 64)
    num_stages = stages(tile_h * TILE_W * (block_out + block_in) * dtype.itemsize, target)
    limit = None if half else _ALL_REGISTERS
    return WeightGradConfig(tile_h, TILE_W, block_out, block_in, 8 if wide else 4, num_stages, POINTER, limit)


def _descriptor_weight_grad_config(c_in: int, c_out: int, dtype: torch.dtype, target: Target) -> WeightGradConfig:
    block_out = _channel_block(c_out, 128)
    block_in = cover(c_in, 16, 128 if block_out == 128 else 64)
    num_stages = stages(_DESCRIPTOR_TILE_H * TILE_W * (block_out + block_in) * dtype.itemsize, target)
    warps = 8 if block_out == block_in == 128 else 4
    limit = _ALL_REGISTERS if target.capability >= 100 else None
    return WeightGradConfig(_DESCRIPTOR_TILE_H, TILE_W, block_out, block_in, warps, num_stages, DESCRIPTOR, limit)


def weight_grad_programs(chosen: WeightGradConfig, c_in: int, c_out: int) -> int:
    """Programs that together cover one weight gradient: channel blocks, times the taps unless they are folded."""
    taps_and_inputs = 1 if chosen.form == FOLDED else 9 * _cdiv(c_in, chosen.block_in)
    return taps_and_inputs * _cdiv(c_out, chosen.block_out)


def weight_grad_splits(programs: int, tiles: int, target: Target) -> int:
    """How many parts the pixel tiles fall into, each summed by `programs` of its own.

    Two programs for every multiprocessor, but at least eight tiles to a part, so that the partial sums, which are
    written and read again, stay small beside the input. Unmeasured.
    """
    return max(1, min(_cdiv(2 * target.multiprocessors, programs), tiles // 8))


def pointwise_config(channels: int) -> PointwiseConfig:
    """The blocks for an elementwise pass over windows of `channels` channels: about 1024 elements of each pixel."""
    block_channels = cover(channels, 1, 128)
    return PointwiseConfig(1024 // block_channels, block_channels, num_warps=4)


def pointwise_configs() -> dict[PointwiseConfig, int]:
    """Every config that pointwise_config can choose, each with the most channels that lead to it."""
    return {pointwise_config(channels): channels for channels in (1, 2, 4, 8, 16, 32, 64, 128)}


# --- norms ---


def statistics_config(rows: int, channels: int) -> StatisticsConfig:
    """The blocks for merging `rows` statistics of each group: in two rounds where one would be a long loop."""
    per_split = max(256, cover(math.isqrt(rows), 1, 1 << 20))
    return StatisticsConfig(32, cover(channels, 16, 32), _cdiv(rows, per_split), per_split)


def norm_grad_config(windows: int, channels: int, target: Target) -> NormGradConfig:
    """The blocks for a group of `windows` 2x2 windows: two programs for every multiprocessor, of eight steps at least.

    `windows` counts those of one group, so that an image's instance norm is the same alone and in a batch. Unmeasured.
    """
    block_channels = cover(channels, 4, 64)
    block_windows = 512 // block_channels
    wanted = _cdiv(2 * target.multiprocessors, _cdiv(channels, block_channels))
    return NormGradConfig(block_windows, block_channels, 4, max(1, min(wanted, windows // (8 * block_windows))))


def norm_grad_configs(target: Target) -> dict[NormGradConfig, int]:
    """Every shape of block norm_grad_config can choose, each with the most channels that lead to it."""
    return {norm_grad_config(1, channels, target): channels for channels in (4, 8, 16, 32, 64)}


def conv_configs(dtype: torch.dtype, target: Target, *, allow_tf32: bool) -> dict[tuple[ConvConfig, bool], ConvShape]:
    """Every config that conv_config can choose for aligned and unaligned shapes, each with a shape that leads to it."""
    found: dict[tuple[ConvConfig, bool], ConvShape] = {}
    images = ((512, 512), (33, 128), (8, 8))  # They lead to the three heights of tiles.
    for c1, c_out, (height, width) in itertools.product((1, 3, 17, 16, 32, 64), (32, 64, 128, 33), images):
        shape = ConvShape(c1, 0, c_out, height, width, aligned(c1, c_out))
        chosen = conv_config(shape, dtype, target, allow_tf32=allow_tf32)
        found.setdefault((chosen, shape.aligned or chosen.form == DESCRIPTOR), shape)
    return found


def weight_grad_configs(
    dtype: torch.dtype, target: Target, *, allow_tf32: bool
) -> dict[tuple[WeightGradConfig, bool], ConvShape]:
    """Every config that weight_grad_config can choose, aligned or not, each with a shape that leads to it."""
    found: dict[tuple[WeightGradConfig, bool], ConvShape] = {}
    for c_in, c_out, side in itertools.product((3, 7, 17, 33, 16, 32, 64, 128), (17, 33, 32, 64, 128), (64, 63)):
        shape = ConvShape(c_in, 0, c_out, side, side, aligned(c_in, c_out))
        chosen = weight_grad_config(shape, dtype, target, allow_tf32=allow_tf32)
        found.setdefault((chosen, shape.aligned or chosen.form == DESCRIPTOR), shape)
    return found


# --- the sums of segmentation_loss ---

# A program holds all channels of its pixels, 1024 elements: with more channels, ATen runs.
MOST_CHANNELS = 1024


@dataclass(frozen=True)
class PixelConfig:
    """Blocks of a pass over whole pixels: a program holds all channels of block_pixels of them."""

    block_pixels: int
    block_channels: int
    num_warps: int


def pixel_config(channels: int) -> PixelConfig:
    """1024 elements, eight a thread: the sums hold five float32 values for each."""
    block_channels = cover(channels, 1, MOST_CHANNELS)
    return PixelConfig(1024 // block_channels, block_channels, num_warps=4)


def pixel_configs() -> dict[PixelConfig, int]:
    """Every config that pixel_config can choose for up to MOST_CHANNELS, each with the most that lead to it."""
    return {pixel_config(1 << power): 1 << power for power in range(MOST_CHANNELS.bit_length())}


def pixel_splits(pixels: int, chosen: PixelConfig) -> int:
    """How many parts the pixels of one image fall into, each summed by a program of its own.

    At least four blocks to a part, and at most 64 parts, whose sums one program adds in turn. It depends on neither
    batch nor GPU: an image's sums have the same bits everywhere. Unmeasured.
    """
    return max(1, min(64, _cdiv(pixels, chosen.block_pixels) // 4))


# --- products at single pixels: conv_transpose2x2 and conv1x1 ---


@dataclass(frozen=True)
class PixelProductConfig:
    """Blocks of a product of pixels with a weight.

    block_p: pixels. block_n: output channels. block_k: input channels of one step. max_registers: as in ConvConfig.
    """

    block_p: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True)
class PixelWeightGradConfig:
    """Blocks of such a product's weight gradient.

    block_p: pixels of one step, its K dimension. block_in, block_out: channels. max_registers: as in ConvConfig.
    """

    block_p: int
    block_in: int
    block_out: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True)
class SubpixelTileConfig:
    """Blocks of conv_transpose2x2 through tensor descriptors.

    tile_h, tile_w: pixels of an input tile, whose rows count through all images. The rest is as in ConvConfig.
    """

    tile_h: int
    tile_w: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


# The most channels that a block of softmax holds; of more, a program's sums and exponentials would not fit registers.
LARGEST_SOFTMAX = 256


def pixel_product_config(
    c_in: int, c_out: int, dtype: torch.dtype, target: Target, *, allow_tf32: bool
) -> PixelProductConfig:
    """The blocks for conv_transpose2x2, one sub-pixel a program, and for its input gradient."""
    half = dtype.itemsize == 2
    tensor_cores = half or allow_tf32
    block_p = 128 if tensor_cores else 64
    if not aligned(c_in, c_out):  # Loads go element by element: small steps and many threads hold the addresses.
        return PixelProductConfig(block_p, 32, 16, 8, num_stages=1, max_registers=_ALL_REGISTERS)
    # Rows of channels are cut by masks: a step may be wider than they are.
    block_k = 16 if not tensor_cores else 64 if half and target.capability >= 90 else 32
    block_n = _channel_block(c_out, 128 if half else 64)
    num_stages = stages((block_p + block_n) * block_k * dtype.itemsize, target)
    limit = None if half and block_n > 32 else _ALL_REGISTERS
    return PixelProductConfig(block_p, block_n, block_k, 8 if block_n == 128 else 4, num_stages, limit)


def subpixel_tile_config(c_in: int, c_out: int, dtype: torch.dtype, target: Target) -> SubpixelTileConfig | None:
    """The blocks for conv_transpose2x2 through tensor descriptors, None where it does not suit them. Unmeasured."""
    if not _fits_descriptors(dtype, target, c_out, c_in, c_out):
        return None
    block_n, tile_h = _channel_block(c_out, 128), 16
    num_stages = stages((tile_h * TILE_W + block_n) * 64 * dtype.itemsize, target)
    limit = _ALL_REGISTERS if target.capability >= 100 else None
    return SubpixelTileConfig(tile_h, TILE_W, block_n, 64, 8 if block_n == 128 else 4, num_stages, limit)


def head_config(
    c_in: int, c_out: int, dtype: torch.dtype, target: Target, *, allow_tf32: bool, softmax: bool
) -> PixelProductConfig:
    """The blocks for conv1x1; softmax wants all output channels, LARGEST_SOFTMAX at most, in one block."""
    half = dtype.itemsize == 2
    tensor_cores = half or allow_tf32
    block_n = 16 if c_out <= 16 else 64 if c_out <= 64 or not softmax else 256
    block_p = 128 if tensor_cores and block_n < 256 else 64 if tensor_cores or block_n < 256 else 16
    block_k = 32 if tensor_cores and aligned(c_in) else 16
    num_stages = stages((block_p + block_n) * block_k * dtype.itemsize, target)
    return PixelProductConfig(block_p, block_n, block_k, 8, num_stages, _ALL_REGISTERS)


def head_input_grad_config(dtype: torch.dtype, *, allow_tf32: bool) -> PixelProductConfig:
    """The blocks for conv1x1's input gradient: there are few channels to sum over, one step as a rule."""
    block_p = 128 if dtype.itemsize == 2 or allow_tf32 else 64
    return PixelProductConfig(block_p, 64, 16, 8, num_stages=1, max_registers=_ALL_REGISTERS)


def head_weight_grad_config(c_out: int, dtype: torch.dtype, *, allow_tf32: bool) -> PixelWeightGradConfig:
    """The blocks for the gradient of conv1x1's weight, and of any whose rows of channels load element by element."""
    tensor_cores = dtype.itemsize == 2 or allow_tf32
    block_out = 16 if c_out <= 16 else 64 if tensor_cores else 32
    return PixelWeightGradConfig(32 if tensor_cores else 16, 64, block_out, 8, 2, _ALL_REGISTERS)


def pixel_weight_grad_config(
    c_in: int, c_out: int, dtype: torch.dtype, target: Target, *, allow_tf32: bool
) -> PixelWeightGradConfig:
    """The blocks for the gradient of conv_transpose2x2's weight, c_in by c_out."""
    half = dtype.itemsize == 2
    tensor_cores = half or allow_tf32
    if not aligned(c_in, c_out):
        return head_weight_grad_config(c_out, dtype, allow_tf32=allow_tf32)
    block_in = 128 if half and c_in % 128 == 0 else 64
    block_out = 128 if block_in == 128 and c_out % 128 == 0 else 64
    block_p = 64 if half and target.capability >= 90 else 32
    num_stages = stages(block_p * (block_in + block_out) * dtype.itemsize, target)
    wide = block_out == 128 or not tensor_cores
    limit = None if half and target.capability < 100 else _ALL_REGISTERS
    return PixelWeightGradConfig(block_p, block_in, block_out, 8 if wide else 4, num_stages, limit)


def pixel_weight_grad_programs(chosen: PixelWeightGradConfig, c_in: int, c_out: int, subpixels: int) -> int:
    """Programs that together cover one weight gradient: channel blocks, times the sub-pixels."""
    return subpixels * _cdiv(c_in, chosen.block_in) * _cdiv(c_out, chosen.block_out)


# Channels (in, out) that together lead to every config of the choosers for conv_transpose2x2.
_PIXEL_CHANNELS = tuple(itertools.product((17, 64, 128), (3, 17, 32, 64, 128)))


def pixel_product_configs(
    dtype: torch.dtype, target: Target, *, allow_tf32: bool
) -> dict[PixelProductConfig, tuple[int, int]]:
    """Every config that pixel_product_config can choose, each with channels (in, out) that lead to it."""
    found: dict[PixelProductConfig, tuple[int, int]] = {}
    for channels in _PIXEL_CHANNELS:
        found.setdefault(pixel_product_config(*channels, dtype, target, allow_tf32=allow_tf32), channels)
    return found


def subpixel_tile_configs(dtype: torch.dtype, target: Target) -> dict[SubpixelTileConfig, tuple[int, int]]:
    """Every config that subpixel_tile_config can choose, each with channels (in, out) that lead to it."""
    chosen = {channels: subpixel_tile_config(*channels, dtype, target) for channels in _PIXEL_CHANNELS}
    return {found: channels for channels, found in chosen.items() if found is not None}


def head_configs(
    dtype: torch.dtype, target: Target, *, allow_tf32: bool, softmax: bool
) -> dict[PixelProductConfig, tuple[int, int]]:
    """Every config that head_config can choose, each with channels (in, out) that lead to it."""
    found: dict[PixelProductConfig, tuple[int, int]] = {}
    for channels in itertools.product((17, 64), (3, 17, 65)):
        chosen = head_config(*channels, dtype, target, allow_tf32=allow_tf32, softmax=softmax)
        found.setdefault(chosen, channels)
    return found


def pixel_weight_grad_configs(
    dtype: torch.dtype, target: Target, *, allow_tf32: bool
) -> dict[PixelWeightGradConfig, tuple[int, int]]:
    """Every config that pixel_weight_grad_config can choose, each with channels (in, out) that lead to it."""
    found: dict[PixelWeightGradConfig, tuple[int, int]] = {}
    for channels in _PIXEL_CHANNELS:
        found.setdefault(pixel_weight_grad_config(*channels, dtype, target, allow_tf32=allow_tf32), channels)
    return found
