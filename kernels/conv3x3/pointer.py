"""3x3 convolution, stride 1 or 2, zero padding 1, with what follows it in its epilogue.

An implicit GEMM on packed NHWC activations: a program owns a tile of P pixels and BLOCK_N output channels, and steps
through the taps and the input channels. Here it gathers its [P, BLOCK_K] operand from shifted pixels, on any GPU;
`descriptor` has the variant for those that copy whole boxes. Two inputs stand for their concatenation along the
channels, which is never written.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastunet.kernels import autotune, gpu
from fastunet.kernels.conv3x3 import config, config_hopper, descriptor
from fastunet.kernels.epilogue import (
    E4M3,
    HEAD_CLASSES,
    Epilogue,
    Head,
    Normalisation,
    Statistics,
    finish_sums,
    precision,
    round_in_pairs,
    scale_to_e4m3,
    store_head,
    store_statistics,
)
from fastunet.kernels.layout import empty_packed, packed, strided_weight
from fastunet.kernels.tiles import (
    load_folded_taps,
    load_tap,
    multiple,
    pixel_offsets,
    pool2x2,
    read_pixels,
    strided_size,
    tile_origin,
    tile_pixels,
)
from torch import Tensor


# fmt: off
@triton.jit
def accumulate(
    acc, x_ptr, weight_ptr, first, steps, n, rows, columns, origin, offsets, H, W, C, COUT,
    stride_out, stride_tap, stride_in,
    FLIP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """acc [P, N] += the taps of x [P, 9*C] @ the weights [9*C, N] of input channels first, ..., first + C - 1."""
    k = tl.arange(0, BLOCK_K)
    weight_pointers = weight_ptr + n.to(tl.int64)[None, :] * stride_out + k[:, None] * stride_in
    mask_n = (n < COUT)[None, :]
    tl.assume(steps > 0)  # Without it, ptxas takes some of the products one by one (warning C7515).
    # The tap runs fastest: the nine gathers of one block of channels meet in L1 and L2.
    for step in range(steps):
        tap = step % 9
        k0 = step // 9 * BLOCK_K
        a = load_tap(x_ptr, tap, k0 + k, rows, columns, origin, offsets, H, W, C)
        weight_tap = 8 - tap if FLIP else tap
        pointers = weight_pointers + ((k0 + first).to(tl.int64) * stride_in + weight_tap * stride_tap)
        b = tl.load(pointers, mask=(k0 + k < C)[:, None] & mask_n, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def accumulate_folded(
    acc, x_ptr, weight_ptr, steps, n, rows, columns, origin, offsets, H, W, C, COUT,
    stride_out, stride_tap, stride_in,
    FLIP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """acc [P, N] += the taps of x [P, 9*C] @ the weights [9*C, N], stepping through k = tap*C + channel."""
    weight_pointers = weight_ptr + n.to(tl.int64)[None, :] * stride_out
    for step in range(steps):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        a = load_folded_taps(x_ptr, k, rows, columns, origin, offsets, H, W, C)
        weight_tap = 8 - k // C if FLIP else k // C
        pointers = weight_pointers + (weight_tap * stride_tap + k % C * stride_in)[:, None]
        b = tl.load(pointers, mask=(k < 9 * C)[:, None] & (n < COUT)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def store_outputs(
    acc, y_ptr, y_scale_ptr, pooled_ptr, head_ptr, head_weight_ptr, head_bias_ptr, count_ptr, partial_ptr, image, h0,
    w0, tile, tiles, n, first_block, H, W, COUT, rows, origin, offsets, CLASSES: tl.constexpr, SIGMOID: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """What the kernel's outputs take of finished values acc [P, N]: see conv3x3_kernel."""
    inside = rows >= 0
    if y_ptr is not None:
        y = acc
        if y_scale_ptr is not None:
            y = scale_to_e4m3(y, y_scale_ptr)
        y = round_in_pairs(y, y_ptr.dtype.element_ty) if partial_ptr is not None else y.to(y_ptr.dtype.element_ty)
        pointers = y_ptr + (origin + offsets)[:, None] * COUT + n[None, :]
        tl.store(pointers, y, mask=inside[:, None] & (n < COUT)[None, :])
        if partial_ptr is not None:
            is_whole = (h0 + TILE_H <= H) & (w0 + TILE_W <= W)
            store_statistics(count_ptr, partial_ptr, y, tile, tiles, n, COUT, inside, is_whole, first_block, 1)
    if head_ptr is not None:
        store_head(
            head_ptr, head_weight_ptr, head_bias_ptr, acc, n, COUT, origin + offsets, inside, CLASSES, SIGMOID, 1
        )
    if pooled_ptr is not None:
        # Tile sides are even, so that each window lies in one tile. A window cut by the image's edge has no output.
        rows, _ = tile_pixels(h0 // 2, w0 // 2, H // 2, W // 2, TILE_H // 2, TILE_W // 2)
        windows = (image * (H // 2) + h0 // 2) * (W // 2) + w0 // 2 + pixel_offsets(W // 2, TILE_H // 2, TILE_W // 2)
        pooled = pool2x2(acc, TILE_H, TILE_W, BLOCK_N, 1).to(pooled_ptr.dtype.element_ty)
        pointers = pooled_ptr + windows[:, None] * COUT + n[None, :]
        tl.store(pointers, pooled, mask=(rows >= 0)[:, None] & (n < COUT)[None, :])


@triton.jit(do_not_specialize=["H", "W", "steps1", "steps2", "tiles"])
def conv3x3_kernel(
    x_ptr, up_ptr, weight_ptr, y_ptr, pooled_ptr, sums_ptr, pixels, H, W, C1, C2, COUT, steps1, steps2, tiles,
    stride_out, stride_tap, stride_in,
    bias_ptr, mean_ptr, variance_ptr, gamma_ptr, eps, negative_slope,
    head_ptr, head_weight_ptr, head_bias_ptr, count_ptr, partial_ptr, y_scale_ptr,
    ACTIVATION: tl.constexpr, CLASSES: tl.constexpr, SIGMOID: tl.constexpr, FOLDED: tl.constexpr,
    PRECISION: tl.constexpr, SPLITS: tl.constexpr, STRIDE: tl.constexpr, UNIT: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """v[p, o] = sum over taps t and channels c of cat(x, up)[STRIDE*p moved by t, c] * weight[o, c, t], and y of v.

    x [N, H, W, C1], up [N, H, W, C2] or None. y [N, HO, WO, COUT], HO = ceil(H / STRIDE), is v after `finish_sums`;
    pooled [N, HO // 2, WO // 2, COUT] takes the maxima of its 2x2 windows, head [N, HO, WO, CLASSES] its 1x1
    convolution, count and partial the statistics of each of the `tiles`. Each of these outputs may be None.
    steps1 and steps2 are the steps for each input: 9*ceil(C/BLOCK_K), or ceil(9*C/BLOCK_K) where FOLDED.

    With SPLITS above 1, sums [SPLITS, pixels, COUT] float32 takes the place of those outputs: sums[s, p, o] is the part
    of v[p, o] of the channels of split s, the s-th of equal parts of each input, of as many steps.
    """
    C1, C2, COUT = multiple(C1, UNIT), multiple(C2, UNIT), multiple(COUT, UNIT)
    stride_out, stride_tap = multiple(stride_out, UNIT), multiple(stride_tap, UNIT)
    # Channel blocks run fastest, then splits: programs that are neighbours in time share a pixel tile in L2.
    blocks_n = tl.cdiv(COUT, BLOCK_N)
    block = tl.program_id(0) % blocks_n
    split = tl.program_id(0) // blocks_n % SPLITS
    tile = tl.program_id(0) // (blocks_n * SPLITS)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    HO, WO = strided_size(H, W, STRIDE)
    image, h0, w0 = tile_origin(tile, HO, WO, TILE_H, TILE_W)
    rows, columns = tile_pixels(h0, w0, HO, WO, TILE_H, TILE_W)
    origin = (image * HO + h0) * WO + w0
    offsets = pixel_offsets(WO, TILE_H, TILE_W)
    rows_in, columns_in, origin_in, offsets_in = rows, columns, origin, offsets
    if STRIDE > 1:
        rows_in, columns_in, origin_in, offsets_in = read_pixels(
            image, h0, w0, rows, columns, H, W, STRIDE, TILE_H, TILE_W
        )

    first1 = 0
    first2 = 0
    if SPLITS > 1:
        first1 = tl.multiple_of(split * (C1 // SPLITS), 16)  # Of whole blocks of channels.
        first2 = tl.multiple_of(split * (C2 // SPLITS), 16)

    acc = tl.zeros((TILE_H * TILE_W, BLOCK_N), tl.float32)
    if FOLDED:
        acc = accumulate_folded(
            acc, x_ptr, weight_ptr, steps1, n, rows_in, columns_in, origin_in, offsets_in, H, W, C1, COUT,
            stride_out, stride_tap, stride_in, False, PRECISION, BLOCK_K,
        )
    else:
        acc = accumulate(
            acc, x_ptr + first1, weight_ptr, first1, steps1, n, rows_in, columns_in, origin_in, offsets_in, H, W, C1,
            COUT, stride_out, stride_tap, stride_in, False, PRECISION, BLOCK_K,
        )
        if up_ptr is not None:
            acc = accumulate(
                acc, up_ptr + first2, weight_ptr, C1 + first2, steps2, n, rows_in, columns_in, origin_in, offsets_in,
                H, W, C2, COUT, stride_out, stride_tap, stride_in, False, PRECISION, BLOCK_K,
            )

    if sums_ptr is not None:
        pointers = sums_ptr + (split.to(tl.int64) * pixels + origin + offsets)[:, None] * COUT + n[None, :]
        tl.store(pointers, acc, mask=(rows >= 0)[:, None] & (n < COUT)[None, :])
    acc = finish_sums(
        acc, n, COUT, bias_ptr, mean_ptr, variance_ptr, gamma_ptr, eps, negative_slope, ACTIVATION, 1
    )
    store_outputs(
        acc, y_ptr, y_scale_ptr, pooled_ptr, head_ptr, head_weight_ptr, head_bias_ptr, count_ptr, partial_ptr, image,
        h0, w0, tile, tiles, n, block == 0, HO, WO, COUT, rows, origin, offsets, CLASSES, SIGMOID,
        TILE_H, TILE_W, BLOCK_N,
    )
# fmt: on


def operands(x: Tensor, up: Tensor | None, weight: Tensor, allow_tf32: bool) -> dict[str, Any]:
    """Return what the pointer variant reads, and how it multiplies."""
    weight, stride_out, stride_in, stride_tap = strided_weight(weight)
    return {
        "x_ptr": x,
        "up_ptr": up,
        "weight_ptr": weight,
        "stride_out": stride_out,
        "stride_tap": stride_tap,
        "stride_in": stride_in,
        "PRECISION": precision(x.dtype, allow_tf32),
    }


def conv3x3_launch(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    chosen: config.ConvConfig,
    epilogue: Epilogue,
    *,
    allow_tf32: bool,
    sums: Tensor | None = None,
    stride: int = 1,
) -> gpu.Launch:
    """Return the launch, in any variant, that fills the epilogue's outputs from packed x and up, or where it splits the
    input channels, sums [splits, pixels, Cout]. The halo variant has no stride 2.
    """
    if chosen.variant == config.HALO:
        from fastunet.kernels.conv3x3 import hopper  # Late: its interface is private to some releases of Triton.

        return hopper.conv3x3_launch(x, up, weight, chosen, epilogue)
    tiles = x.shape[0] * config.tiles_per_image(chosen, *size_by(stride, x))
    arguments = {**config.sizes(x, up, weight, chosen), "tiles": tiles, **epilogue.arguments()}
    arguments |= {"sums_ptr": sums, "pixels": None if sums is None else sums.shape[1], "SPLITS": chosen.splits}
    arguments["STRIDE"] = stride
    kernel = conv3x3_kernel
    if chosen.variant == config.DESCRIPTOR:
        kernel = descriptor.conv3x3_descriptor_kernel
        arguments |= descriptor.operands(x, up, weight, chosen, stride)
        arguments["y_desc"] = descriptor.boxes(epilogue.y, chosen.tile_h, chosen.tile_w, chosen.block_n)
        windows = chosen.tile_h // 2, chosen.tile_w // 2
        arguments["pooled_desc"] = descriptor.boxes(epilogue.pooled, *windows, chosen.block_n)
    else:
        arguments |= {**operands(x, up, weight, allow_tf32), "FOLDED": chosen.variant == config.FOLDED}
    grid = tiles * gpu.cdiv(weight.shape[0], chosen.block_n) * chosen.splits
    return gpu.launch(kernel, grid, arguments, chosen)


def size_by(stride: int, x: Tensor) -> tuple[int, int]:
    """Return height and width of what a convolution by that stride makes of x."""
    return gpu.cdiv(x.shape[2], stride), gpu.cdiv(x.shape[3], stride)


def _run(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    chosen: config.ConvConfig,
    epilogue: Epilogue,
    *,
    allow_tf32: bool,
    stride: int = 1,
) -> None:
    """Fill the epilogue's outputs, by one kernel, or by two where the sums are split."""
    if chosen.splits == 1:
        conv3x3_launch(x, up, weight, chosen, epilogue, allow_tf32=allow_tf32, stride=stride).run(x.device)
        return
    from fastunet.kernels.conv3x3 import split_k  # Late: its kernels call this module's.

    for launch in split_k.launches(x, up, weight, chosen, epilogue, allow_tf32=allow_tf32):
        launch.run(x.device)


def choose(
    x: Tensor, up: Tensor | None, weight: Tensor, target: gpu.Target, *, allow_tf32: bool, stride: int = 1
) -> config.ConvConfig:
    """Return the configuration for conv2d(cat([x, up], 1), weight, stride=stride, padding=1)."""
    c1, c2, channels = x.shape[1], 0 if up is None else up.shape[1], weight.shape[0]
    shape = config.ConvShape(c1, c2, channels, *size_by(stride, x), rows_aligned(weight, c1, c2, channels))
    if stride == 2:
        op = config.CONV3X3 + autotune.STRIDE2
        return config.conv_config(shape, x.dtype, target, allow_tf32=allow_tf32, op=op)
    chosen = config.conv_config(shape, x.dtype, target, allow_tf32=allow_tf32)
    if chosen.variant == config.HALO and not halo_runs(x, config.CONV3X3):
        return config.heuristic_conv_config(shape, x.dtype, target, allow_tf32)
    return chosen


def halo_runs(x: Tensor, op: str) -> bool:
    """Return whether the halo variant, which a measurement has chosen for the op, may run on x; where not, it warns.
    RuntimeError where an override asks for it: whoever measures it is to see that variant, and no other in its place.
    """
    reason = config_hopper.unsupported_reason(x.device, x.dtype)
    if reason is not None and autotune.is_overridden(op):
        raise RuntimeError(reason)
    if reason is not None:
        autotune.warn_once(f"{reason}; the heuristic variant runs in its place")
    return reason is None


def rows_aligned(weight: Tensor, *channels: int) -> bool:
    """Return whether rows of channels, and of a weight [O, I, 3, 3], load in vectors, or at least in steps known
    beforehand: multiples of 16, and strides 1 or 9 of a contiguous weight; or all of 8, as gpu.launch tells kernels.
    """
    stride_out, stride_in, _, stride_tap = weight.stride()
    known = all(stride in (1, 9) or config.aligned(stride) for stride in (stride_out, stride_in))
    return (known and config.aligned(*channels)) or gpu.row_unit(*channels, stride_out, stride_tap) == 8


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    up: Tensor | None = None,
    norm: Normalisation | None = None,
    negative_slope: float | None = None,
    pool: bool = False,
    stride: int = 1,
    allow_tf32: bool = False,
    y_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return activation(norm(conv2d(cat([x, up], 1), weight, stride=stride, padding=1)) + bias) and, with pool, its 2x2
    maxima.

    x [N, C1, H, W], up [N, C2, H, W] or None, weight [Cout, C1 + C2, 3, 3] in any layout, all of one dtype and device,
    which the caller has checked; bias [Cout] or None and the norm's tensors may be float32 instead. negative_slope:
    None for no activation, 0 for ReLU, above 0 for LeakyReLU. Returns y [N, Cout, HO, WO], HO = ceil(H / stride), and
    pooled [N, Cout, HO // 2, WO // 2] or None, channels_last. float32 sums; allow_tf32 lets float32 inputs be rounded
    to TF32 on tensor cores. y_scale: one float32, by which y is divided, in e4m3; of an image of fewer than
    FOLDED_BELOW channels, else ValueError.
    """
    if y_scale is not None and (up is not None or x.shape[1] >= config.FOLDED_BELOW):
        raise ValueError(f"y_scale: expected one image of fewer than {config.FOLDED_BELOW} channels, got {x.shape[1]}")
    x, up = packed(x), packed(up)
    height, width = size_by(stride, x)
    y = empty_packed(x, weight.shape[0], height, width, None if y_scale is None else E4M3)
    pooled = empty_packed(x, weight.shape[0], height // 2, width // 2) if pool else None
    if y.numel():  # A descriptor cannot describe an empty tensor.
        chosen = choose(x, up, weight, gpu.target(x.device), allow_tf32=allow_tf32, stride=stride)
        chosen = chosen if norm is None else config.with_norm(chosen)
        epilogue = Epilogue(y, bias, norm, negative_slope, pooled, y_scale=y_scale)
        _run(x, up, weight, chosen, epilogue, allow_tf32=allow_tf32, stride=stride)
    return y, pooled


def conv3x3_head(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: Head,
    *,
    up: Tensor | None = None,
    norm: Normalisation | None = None,
    negative_slope: float | None = None,
    allow_tf32: bool = False,
) -> Tensor | None:
    """Return head(y) of y = conv3x3(...), [N, classes, H, W], without writing y; None where one program cannot hold all
    of its channels.

    The head reads y before it is rounded to x's dtype.
    """
    x, up = packed(x), packed(up)
    chosen = config.with_head(choose(x, up, weight, gpu.target(x.device), allow_tf32=allow_tf32))
    if chosen.block_n < weight.shape[0] or head.weight.shape[0] > HEAD_CLASSES:
        return None
    probabilities = empty_packed(x, head.weight.shape[0], *x.shape[2:])
    if probabilities.numel():
        epilogue = Epilogue(None, bias, norm, negative_slope, head=head, probabilities=probabilities)
        _run(x, up, weight, chosen, epilogue, allow_tf32=allow_tf32)
    return probabilities


def conv3x3_with_statistics(
    x: Tensor, weight: Tensor, *, up: Tensor | None = None, stride: int = 1, allow_tf32: bool = False
) -> tuple[Tensor, Statistics]:
    """Return conv2d(cat([x, up], 1), weight, stride=stride, padding=1), and the partial statistics of what it wrote.

    The tiles of an image are neighbours, and images follow each other. As conv3x3 otherwise.
    """
    x, up = packed(x), packed(up)
    y = empty_packed(x, weight.shape[0], *size_by(stride, x))
    chosen = choose(x, up, weight, gpu.target(x.device), allow_tf32=allow_tf32, stride=stride)
    tiles = x.shape[0] * config.tiles_per_image(chosen, *y.shape[2:])
    statistics = Statistics.empty(tiles, weight.shape[0], x.device)
    if y.numel():
        _run(x, up, weight, chosen, Epilogue(y, statistics=statistics), allow_tf32=allow_tf32, stride=stride)
    return y, statistics
