"""The 3x3 convolution for sm_90 with halo reuse, in 16 bits: a tile of pixels is fetched three times, not nine.

Written in Gluon, because the schedule is the point. One warp produces: for each column of the window and 64 input
channels it has the hardware copy TILE_H + 2 rows of 8 pixels, and the three weights of that column. Two warpgroups
consume, 64 output channels each: the taps of a column are the same pixels in memory, begun one row later. With blocks
of 128 channels they share a tile. With blocks of 64 they take every second tile and turns (ping-pong): one multiplies
while the other stores. A program stays and takes one tile after the other; barriers in shared memory pass the slots of
two rings, pixels and weights, back and forth.

The product is that of weights and pixels [N, P], which reads less shared memory; for a head, whose sum over channels
then stays within a warp, that of pixels and weights [P, N].

Gluon's interface is private to each release of Triton: `config_hopper` says where this variant may run. Unmeasured.
"""

from __future__ import annotations

import triton.language as tl
from fastunet.kernels import gpu
from fastunet.kernels.conv3x3 import config
from fastunet.kernels.conv3x3.hopper_epilogue import activate_grad, finish, pool, store_head, store_statistics
from fastunet.kernels.epilogue import Epilogue, activation_code
from fastunet.kernels.layout import weight_matrix
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Input channels of one step: a row of a 128-byte swizzled tile.
BLOCK_K = 64
# Output channels of a warpgroup: the rows of its product.
CHANNELS = 64
# Registers, of 504, of a thread of the second consumer and of the producer. The first consumer has what they leave.
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 232, 40

_BLOCK_K = tl.constexpr(BLOCK_K)
_TILE_W = tl.constexpr(config.TILE_W)
_CHANNELS = tl.constexpr(CHANNELS)


# fmt: off
@builtin
def view(memory, dtype, shape, layout, _semantic=None):
    """Shared memory from where `memory` begins, in another shape and layout."""
    unwrap = gl._core._unwrap_if_constexpr
    return _semantic.memdesc_reinterpret(memory, unwrap(dtype), [unwrap(s) for s in unwrap(shape)], unwrap(layout))


@gluon.jit
def tile_at(tile, H, W, blocks_n, TILE_H: gl.constexpr, BLOCK_N: gl.constexpr):
    """Image, row, column and channel where a tile begins. Blocks of channels run fastest: they share pixels in L2."""
    columns = (W + _TILE_W - 1) // _TILE_W
    rows = (H + TILE_H - 1) // TILE_H
    pixels = tile // blocks_n
    return (
        pixels // (rows * columns),
        pixels // columns % rows * TILE_H,
        pixels % columns * _TILE_W,
        tile % blocks_n * BLOCK_N,
    )


@gluon.jit
def load_column(desc, low_desc, upper, lower, image, h, w, k, full, pred, TILE_H: gl.constexpr):
    """Copy TILE_H + 2 rows of pixels from (h, w) and channel k on, in two boxes; zeros outside the image."""
    tma.async_copy_global_to_shared(desc, [image, h, w, k], full, upper, pred=pred)
    tma.async_copy_global_to_shared(low_desc, [image, h + TILE_H, w, k], full, lower, pred=pred)


@gluon.jit
def produce(
    x_desc, x_low_desc, up_desc, up_low_desc, weight_desc, pixels, weights, pixels_full, pixels_empty, weights_full,
    weights_empty, H, W, C1, C2, tiles, blocks_n, TWO_INPUTS: gl.constexpr, TILE_H: gl.constexpr, BLOCK_N: gl.constexpr,
    SLOTS: gl.constexpr, WEIGHT_SLOTS: gl.constexpr,
):
    """Fill the rings: by blocks of channels and columns of the window one slot of pixels and three of weights.

    Round r of a slot may begin when its r-th release has come: its parity is that of r - 1, and a new barrier counts as
    having passed the phase before its first.
    """
    channels = C1 + C2
    step = 0
    tap_step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        image, h0, w0, n0 = tile_at(tile, H, W, blocks_n, TILE_H, BLOCK_N)
        for i in range(3 * (channels // _BLOCK_K)):
            kw = i % 3
            k = i // 3 * _BLOCK_K
            slot = step % SLOTS
            mbarrier.wait(pixels_empty.index(slot), ((step // SLOTS) & 1) ^ 1)
            full = pixels_full.index(slot)
            mbarrier.expect(full, (TILE_H + 2) * _TILE_W * _BLOCK_K * 2)
            rows = pixels.index(slot * (TILE_H + 2))
            upper = view(rows, x_desc.dtype, [1, TILE_H, _TILE_W, _BLOCK_K], x_desc.layout)
            rows = pixels.index(slot * (TILE_H + 2) + TILE_H)
            lower = view(rows, x_desc.dtype, [1, 2, _TILE_W, _BLOCK_K], x_low_desc.layout)
            if TWO_INPUTS:
                load_column(x_desc, x_low_desc, upper, lower, image, h0 - 1, w0 + kw - 1, k, full, k < C1, TILE_H)
                load_column(
                    up_desc, up_low_desc, upper, lower, image, h0 - 1, w0 + kw - 1, k - C1, full, k >= C1, TILE_H
                )
            else:
                load_column(x_desc, x_low_desc, upper, lower, image, h0 - 1, w0 + kw - 1, k, full, True, TILE_H)
            step += 1
            for kh in gl.static_range(3):
                tap_slot = tap_step % WEIGHT_SLOTS
                mbarrier.wait(weights_empty.index(tap_slot), ((tap_step // WEIGHT_SLOTS) & 1) ^ 1)
                full = weights_full.index(tap_slot)
                mbarrier.expect(full, BLOCK_N * _BLOCK_K * 2)
                at = [n0, (kh * 3 + kw) * channels + k]
                rows = weights.index(tap_slot * (BLOCK_N // _CHANNELS))
                box = view(rows, weight_desc.dtype, [BLOCK_N, _BLOCK_K], weight_desc.layout)
                tma.async_copy_global_to_shared(weight_desc, at, full, box)
                tap_step += 1


@gluon.jit
def multiply(pixels, weight, acc, AXIS: gl.constexpr):
    """Begin acc += weight [N, K] @ pixels [P, K].T, or its transpose: AXIS is that of the channels."""
    if AXIS == 0:
        return warpgroup_mma(weight, pixels.permute((1, 0)), acc, is_async=True)
    else:
        return warpgroup_mma(pixels, weight.permute((1, 0)), acc, is_async=True)


@gluon.jit
def consume(
    NUMBER: gl.constexpr, bias_ptr, mean_ptr, variance_ptr, gamma_ptr, head_ptr, head_weight_ptr, head_bias_ptr,
    count_ptr, partial_ptr, mask_desc, y_desc, pooled_desc, pixels, weights, y_stage, pooled_stage, pixels_full,
    pixels_empty, weights_full, weights_empty, turns, mask_full, H, W, C1, C2, COUT, tiles, blocks_n, eps,
    negative_slope, BIAS: gl.constexpr, NORM: gl.constexpr, GAMMA: gl.constexpr, ACTIVATION: gl.constexpr,
    MASK: gl.constexpr, STATISTICS: gl.constexpr, POOL: gl.constexpr, CLASSES: gl.constexpr, HEAD_BIAS: gl.constexpr,
    SIGMOID: gl.constexpr, TILE_H: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, WEIGHT_SLOTS: gl.constexpr,
):
    """Sum up and store 64 channels, NUMBER 0 or 1: half of those of every tile, or all of every second tile.

    Those who take turns share the rings, whose barriers tell even rounds from odd ones: who has the turn knows that
    the other has seen all rounds before, and that none of its own can end without it.
    """
    PIXELS: gl.constexpr = TILE_H * _TILE_W
    PARTS: gl.constexpr = BLOCK_N // _CHANNELS
    PART: gl.constexpr = NUMBER % PARTS
    FIRST: gl.constexpr = NUMBER // PARTS
    EVERY: gl.constexpr = 2 // PARTS  # Of the program's tiles.
    AXIS: gl.constexpr = 1 if CLASSES > 0 else 0  # That of the channels.
    M: gl.constexpr = PIXELS if AXIS == 1 else _CHANNELS
    N: gl.constexpr = _CHANNELS if AXIS == 1 else PIXELS
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    columns = 3 * ((C1 + C2) // _BLOCK_K)
    step = FIRST * columns
    turn = 0
    for tile in range(gl.program_id(0) + FIRST * gl.num_programs(0), tiles, EVERY * gl.num_programs(0)):
        image, h0, w0, n0 = tile_at(tile, H, W, blocks_n, TILE_H, BLOCK_N)
        n0 += PART * _CHANNELS
        acc = gl.zeros([M, N], gl.float32, SUMS)
        if MASK:
            tma.store_wait(0)  # Before the mask comes to where the tile before was stored from.
            mbarrier.expect(mask_full.index(NUMBER), PIXELS * _CHANNELS * 2)
            box = view(y_stage.index(NUMBER), y_desc.dtype, [1, TILE_H, _TILE_W, _CHANNELS], y_desc.layout)
            tma.async_copy_global_to_shared(mask_desc, [image, h0, w0, n0], mask_full.index(NUMBER), box)
        if EVERY == 2:
            mbarrier.wait(turns.index(NUMBER), (turn & 1) ^ (1 - NUMBER))
        for i in range(columns):
            slot = step % SLOTS
            mbarrier.wait(pixels_full.index(slot), (step // SLOTS) & 1)
            for kh in gl.static_range(3):
                tap_step = 3 * step + kh
                tap_slot = tap_step % WEIGHT_SLOTS
                mbarrier.wait(weights_full.index(tap_slot), (tap_step // WEIGHT_SLOTS) & 1)
                rows = pixels.index(slot * (TILE_H + 2) + kh)
                operand = view(rows, y_desc.dtype, [PIXELS, _BLOCK_K], rows.layout)
                acc = multiply(operand, weights.index(tap_slot * PARTS + PART), acc, AXIS)
                # All products but this one have ended: the slots of the one before it are free.
                acc = warpgroup_mma_wait(1, deps=(acc,))
                if kh == 0:
                    mbarrier.arrive(pixels_empty.index((step + SLOTS - 1) % SLOTS), pred=i > 0)
                last = (tap_step + WEIGHT_SLOTS - 1) % WEIGHT_SLOTS
                mbarrier.arrive(weights_empty.index(last), pred=i + kh > 0)
            step += 1
        if EVERY == 2:
            mbarrier.arrive(turns.index(1 - NUMBER))
        acc = warpgroup_mma_wait(0, deps=(acc,))
        # The last slots, before the epilogue: the producer fetches the next tile meanwhile.
        mbarrier.arrive(weights_empty.index((3 * step + WEIGHT_SLOTS - 1) % WEIGHT_SLOTS))
        mbarrier.arrive(pixels_empty.index((step + SLOTS - 1) % SLOTS))
        step += (EVERY - 1) * columns

        n = n0 + gl.arange(0, _CHANNELS, gl.SliceLayout(1 - AXIS, SUMS))
        if MASK:
            mbarrier.wait(mask_full.index(NUMBER), turn & 1)
            mask = y_stage.index(NUMBER).permute((1, 0)).load(SUMS)
            acc = activate_grad(acc, mask.to(gl.float32), negative_slope, ACTIVATION)
        else:
            acc = finish(
                acc, n, COUT, bias_ptr, mean_ptr, variance_ptr, gamma_ptr, eps, negative_slope,
                BIAS, NORM, GAMMA, ACTIVATION, AXIS,
            )
        if CLASSES > 0:
            store_head(
                head_ptr, head_weight_ptr, head_bias_ptr, acc, n, COUT, image, h0, w0, H, W,
                CLASSES, HEAD_BIAS, SIGMOID, PIXELS, AXIS, SUMS,
            )
        else:
            tma.store_wait(0)  # Of the tile before, from the same memory.
            y = acc.to(y_desc.dtype)
            y_stage.index(NUMBER).permute((1, 0)).store(y)
            if POOL:
                pooled_stage.index(NUMBER).permute((1, 0)).store(pool(acc, _CHANNELS, TILE_H).to(y_desc.dtype))
            fence_async_shared()
            box = view(y_stage.index(NUMBER), y_desc.dtype, [1, TILE_H, _TILE_W, _CHANNELS], y_desc.layout)
            tma.async_copy_shared_to_global(y_desc, [image, h0, w0, n0], box)
            if POOL:
                shape: gl.constexpr = [1, TILE_H // 2, _TILE_W // 2, _CHANNELS]
                box = view(pooled_stage.index(NUMBER), y_desc.dtype, shape, pooled_desc.layout)
                tma.async_copy_shared_to_global(pooled_desc, [image, h0 // 2, w0 // 2, n0], box)
            if STATISTICS:
                store_statistics(
                    count_ptr, partial_ptr, y, tile // blocks_n, tiles // blocks_n, n, COUT, h0, w0, H, W, n0 == 0,
                    TILE_H, SUMS,
                )
        turn += 1
    if CLASSES == 0:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["H", "W", "C1", "C2", "COUT", "tiles", "blocks_n"])
def conv3x3_hopper_kernel(
    x_desc, x_low_desc, up_desc, up_low_desc, weight_desc, mask_desc, y_desc, pooled_desc, H, W, C1, C2, COUT, tiles,
    blocks_n, bias_ptr, mean_ptr, variance_ptr, gamma_ptr, head_ptr, head_weight_ptr, head_bias_ptr, count_ptr,
    partial_ptr, eps, negative_slope, TWO_INPUTS: gl.constexpr, BIAS: gl.constexpr, NORM: gl.constexpr,
    GAMMA: gl.constexpr, ACTIVATION: gl.constexpr, MASK: gl.constexpr, STATISTICS: gl.constexpr, POOL: gl.constexpr,
    CLASSES: gl.constexpr, HEAD_BIAS: gl.constexpr, SIGMOID: gl.constexpr, TILE_H: gl.constexpr, BLOCK_N: gl.constexpr,
    SLOTS: gl.constexpr, WEIGHT_SLOTS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):
    """As conv3x3_descriptor_kernel, by as many programs as there are multiprocessors.

    The low descriptors read boxes of two rows. What a flag leaves out is any tensor, and is not read.
    """
    DTYPE: gl.constexpr = y_desc.dtype
    ROW: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    PIXELS: gl.constexpr = TILE_H * _TILE_W
    PARTS: gl.constexpr = BLOCK_N // _CHANNELS
    pixels = gl.allocate_shared_memory(DTYPE, [SLOTS * (TILE_H + 2), _TILE_W, _BLOCK_K], ROW)
    weights = gl.allocate_shared_memory(DTYPE, [WEIGHT_SLOTS * PARTS, _CHANNELS, _BLOCK_K], ROW)
    y_stage = weights
    pooled_stage = weights
    if CLASSES == 0:
        y_stage = gl.allocate_shared_memory(DTYPE, [2, PIXELS, _CHANNELS], ROW)
    if POOL:
        pooled_stage = gl.allocate_shared_memory(DTYPE, [2, PIXELS // 4, _CHANNELS], ROW)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    pixels_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    pixels_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    weights_full = gl.allocate_shared_memory(gl.int64, [WEIGHT_SLOTS, 1], BARRIER)
    weights_empty = gl.allocate_shared_memory(gl.int64, [WEIGHT_SLOTS, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mask_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(SLOTS):
        mbarrier.init(pixels_full.index(i), count=1)
        mbarrier.init(pixels_empty.index(i), count=PARTS)
    for i in gl.static_range(WEIGHT_SLOTS):
        mbarrier.init(weights_full.index(i), count=1)
        mbarrier.init(weights_empty.index(i), count=PARTS)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
        mbarrier.init(mask_full.index(i), count=1)
    fence_async_shared()  # The hardware that copies sees the barriers too.
    gl.warp_specialize(
        [
            (consume, (
                0, bias_ptr, mean_ptr, variance_ptr, gamma_ptr, head_ptr, head_weight_ptr, head_bias_ptr, count_ptr,
                partial_ptr, mask_desc, y_desc, pooled_desc, pixels, weights, y_stage, pooled_stage, pixels_full,
                pixels_empty, weights_full, weights_empty, turns, mask_full, H, W, C1, C2, COUT, tiles, blocks_n, eps,
                negative_slope, BIAS, NORM, GAMMA, ACTIVATION, MASK, STATISTICS, POOL, CLASSES, HEAD_BIAS, SIGMOID,
                TILE_H, BLOCK_N, SLOTS, WEIGHT_SLOTS,
            )),
            (consume, (
                1, bias_ptr, mean_ptr, variance_ptr, gamma_ptr, head_ptr, head_weight_ptr, head_bias_ptr, count_ptr,
                partial_ptr, mask_desc, y_desc, pooled_desc, pixels, weights, y_stage, pooled_stage, pixels_full,
                pixels_empty, weights_full, weights_empty, turns, mask_full, H, W, C1, C2, COUT, tiles, blocks_n, eps,
                negative_slope, BIAS, NORM, GAMMA, ACTIVATION, MASK, STATISTICS, POOL, CLASSES, HEAD_BIAS, SIGMOID,
                TILE_H, BLOCK_N, SLOTS, WEIGHT_SLOTS,
            )),
            (produce, (
                x_desc, x_low_desc, up_desc, up_low_desc, weight_desc, pixels, weights, pixels_full, pixels_empty,
                weights_full, weights_empty, H, W, C1, C2, tiles, blocks_n, TWO_INPUTS, TILE_H, BLOCK_N, SLOTS,
                WEIGHT_SLOTS,
            )),
        ],
        [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
# fmt: on


def _boxes(x: Tensor, rows: int, columns: int, channels: int) -> TensorDescriptor:
    """Return packed x [N, C, H, W] in boxes of pixels by channels."""
    n, c, h, w = x.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    # Spelled out: where a size is 1, a packed tensor may have any stride.
    return TensorDescriptor(x, [n, h, w, c], [h * w * c, w * c, c, 1], [1, rows, columns, channels], layout)


def conv3x3_launch(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    chosen: config.ConvConfig,
    epilogue: Epilogue,
    activated: Tensor | None = None,
) -> gpu.Launch:
    """Return the launch that fills the epilogue's outputs. ValueError where one is a head beside others, or of more
    channels than a warpgroup has.

    activated: packed, of y's shape, the output of the activation that the epilogue names. The sums are then its
    gradient, y that of what went into it, and the epilogue has nothing else.
    """
    channels = weight.shape[0]
    alone = epilogue.y is None and epilogue.pooled is None and channels <= chosen.block_n == CHANNELS
    if epilogue.head is not None and not alone:
        raise ValueError(f"the halo variant has a head alone, and of at most {CHANNELS} channels")
    batch, c1, height, width = x.shape
    c2 = 0 if up is None else up.shape[1]
    tile_h, block_n = chosen.tile_h, chosen.block_n
    matrix = weight_matrix(weight)
    rows = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    second = x if up is None else up
    # A descriptor of what is not stored is never used, but says the dtype.
    y = x if epilogue.y is None else epilogue.y
    # A window cut by the image's edge is none: there may be no pooled pixel at all.
    pooled = None if epilogue.pooled is None or not epilogue.pooled.numel() else epilogue.pooled
    given = epilogue.arguments()
    names = ("bias", "mean", "variance", "gamma", "head", "head_weight", "head_bias", "count", "partial")
    pointers = {f"{name}_ptr": given[f"{name}_ptr"] for name in names}
    tiles = batch * config.tiles_per_image(chosen, height, width) * gpu.cdiv(channels, block_n)
    arguments = {
        "x_desc": _boxes(x, tile_h, config.TILE_W, BLOCK_K),
        "x_low_desc": _boxes(x, 2, config.TILE_W, BLOCK_K),
        "up_desc": _boxes(second, tile_h, config.TILE_W, BLOCK_K),
        "up_low_desc": _boxes(second, 2, config.TILE_W, BLOCK_K),
        "weight_desc": TensorDescriptor(matrix, list(matrix.shape), [matrix.shape[1], 1], [block_n, BLOCK_K], rows),
        "mask_desc": _boxes(y if activated is None else activated, tile_h, config.TILE_W, CHANNELS),
        "y_desc": _boxes(y, tile_h, config.TILE_W, CHANNELS),
        "pooled_desc": _boxes(y if pooled is None else pooled, tile_h // 2, config.TILE_W // 2, CHANNELS),
        "H": height,
        "W": width,
        "C1": c1,
        "C2": c2,
        "COUT": channels,
        "tiles": tiles,
        "blocks_n": gpu.cdiv(channels, block_n),
        **{name: matrix if t is None else t for name, t in pointers.items()},
        "eps": given["eps"],
        "negative_slope": given["negative_slope"],
        "TWO_INPUTS": up is not None,
        "BIAS": pointers["bias_ptr"] is not None,
        "NORM": pointers["mean_ptr"] is not None,
        "GAMMA": pointers["gamma_ptr"] is not None,
        "ACTIVATION": activation_code(epilogue.negative_slope),
        "MASK": activated is not None,
        "STATISTICS": epilogue.statistics is not None,
        "POOL": pooled is not None,
        "CLASSES": given["CLASSES"],
        "HEAD_BIAS": pointers["head_bias_ptr"] is not None,
        "SIGMOID": given["SIGMOID"],
        "TILE_H": tile_h,
        "BLOCK_N": block_n,
        "SLOTS": chosen.num_stages,
        "WEIGHT_SLOTS": chosen.weight_stages,
        "CONSUMER_REGISTERS": _CONSUMER_REGISTERS,
        "PRODUCER_REGISTERS": _PRODUCER_REGISTERS,
    }
    grid = min(tiles, gpu.target(x.device).multiprocessors)
    return gpu.Launch(conv3x3_hopper_kernel, grid, arguments, chosen.num_warps, 1)
