"""The gradient of the inputs of the 3x3 convolution by stride 2, whose other kernels have the stride as a constant.

Of the input's pixels, those of even row and column are read by one tap of the window, those of an odd row or column by
two, and those of both by four. So there are four phases, each an image of a quarter of the pixels; a program sums the
taps of one of them, and none of the products is by a zero that a stride puts in.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastunet.kernels.conv3x3.descriptor import load_box, of_parity, store_box
from fastunet.kernels.tiles import load_tap, multiple, pixel_offsets, strided_size, tile_origin, tile_pixels

PHASES = 4
_PHASES = tl.constexpr(PHASES)


# fmt: off
@triton.jit
def _program(blocks):
    """Of a program that owns one of so many blocks of channels of a phase: the block, the phase's parity, the tile."""
    phase = tl.program_id(0) // blocks % _PHASES
    return tl.program_id(0) % blocks, phase // 2, phase % 2, tl.program_id(0) // (blocks * _PHASES)


@triton.jit
def _tap_of_phase(tap, odd_h, odd_w):
    """How many outputs after its own number `tap` of the taps that read a phase is at, down and right, and the tap's
    number in the window: of an even row tap row 1, at its own output; of an odd one tap row 0, at the output after it,
    and 2, at its own; so for columns.
    """
    i = tap // (1 + odd_w)
    j = tap % (1 + odd_w)
    return odd_h * (1 - i), odd_w * (1 - j), (1 - odd_h + 2 * i) * 3 + 1 - odd_w + 2 * j


@triton.jit
def accumulate_phase(
    acc, grad_ptr, weight_ptr, blocks_k, odd_h, odd_w, n, rows, columns, origin, offsets, HO, WO, COUT, C,
    stride_out, stride_tap, stride_in, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """acc [P, N] += grad [P, COUT] @ the weights [COUT, N], over the taps that read a phase."""
    k = tl.arange(0, BLOCK_K)
    weight_pointers = weight_ptr + n.to(tl.int64)[None, :] * stride_in + k[:, None] * stride_out
    taps = (1 + odd_h) * (1 + odd_w)
    steps = taps * blocks_k
    tl.assume(steps > 0)
    for step in range(steps):
        tap = step % taps
        k0 = step // taps * BLOCK_K
        down, right, weight_tap = _tap_of_phase(tap, odd_h, odd_w)
        # load_tap moves by tap // 3 - 1 and tap % 3 - 1.
        a = load_tap(grad_ptr, (1 + down) * 3 + 1 + right, k0 + k, rows, columns, origin, offsets, HO, WO, COUT)
        pointers = weight_pointers + (k0.to(tl.int64) * stride_out + weight_tap * stride_tap)
        b = tl.load(pointers, mask=(k0 + k < COUT)[:, None] & (n < C)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["H", "W", "blocks_k"])
def conv3x3_strided_input_grad_kernel(
    grad_ptr, weight_ptr, out_ptr, out_up_ptr, H, W, C1, C2, COUT, blocks_k, stride_out, stride_tap, stride_in,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """out[q, c] = sum over outputs p, taps t with 2p moved by t = q, and channels o of grad[p, o] * weight[o, c, t].

    grad [N, ceil(H / 2), ceil(W / 2), COUT], out [N, H, W, C1], out_up [N, H, W, C2] or None. A program owns a phase of
    a tile of 2*TILE_H x 2*TILE_W pixels and BLOCK_N channels of one of the inputs; the phases of a tile, which read
    the same of grad, are neighbours in time.
    """
    C1, C2, COUT = multiple(C1, UNIT), multiple(C2, UNIT), multiple(COUT, UNIT)
    stride_out, stride_tap = multiple(stride_out, UNIT), multiple(stride_tap, UNIT)
    blocks1 = tl.cdiv(C1, BLOCK_N)
    blocks = blocks1 if out_up_ptr is None else blocks1 + tl.cdiv(C2, BLOCK_N)
    block, odd_h, odd_w, tile = _program(blocks)
    HO, WO = strided_size(H, W, 2)
    image, h0, w0 = tile_origin(tile, HO, WO, TILE_H, TILE_W)
    # Of an odd side there is a pixel less in the odd phase.
    rows, columns = tile_pixels(h0, w0, (H + 1 - odd_h) // 2, (W + 1 - odd_w) // 2, TILE_H, TILE_W)
    C = C1
    if out_up_ptr is not None:
        if block >= blocks1:
            block -= blocks1
            C = C2
            out_ptr = out_up_ptr
            weight_ptr += tl.cast(C1, tl.int64) * stride_in  # Of a 1 Triton makes a constant, which has no `to`.
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((TILE_H * TILE_W, BLOCK_N), tl.float32)
    acc = accumulate_phase(
        acc, grad_ptr, weight_ptr, blocks_k, odd_h, odd_w, n, rows, columns, (image * HO + h0) * WO + w0,
        pixel_offsets(WO, TILE_H, TILE_W), HO, WO, COUT, C, stride_out, stride_tap, stride_in, PRECISION, BLOCK_K,
    )
    origin = (image * H + 2 * h0 + odd_h) * W + 2 * w0 + odd_w
    at = (origin + 2 * pixel_offsets(W, TILE_H, TILE_W))[:, None] * C + n[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(rows >= 0)[:, None] & (n < C)[None, :])


@triton.jit(do_not_specialize=["H", "W", "blocks_k"])
def conv3x3_strided_input_grad_descriptor_kernel(
    grad_desc, weight_desc, out_desc, out01_desc, out10_desc, out11_desc, out_up_desc, out_up01_desc, out_up10_desc,
    out_up11_desc, H, W, C1, C2, COUT, blocks_k,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """As conv3x3_strided_input_grad_kernel. weight_desc reads [C1 + C2, 9*COUT]; an out has a descriptor a phase."""
    blocks1 = tl.cdiv(C1, BLOCK_N)
    blocks = blocks1 if out_up_desc is None else blocks1 + tl.cdiv(C2, BLOCK_N)
    block, odd_h, odd_w, tile = _program(blocks)
    is_first = block < blocks1
    n0 = tl.where(is_first, block, block - blocks1) * BLOCK_N
    weight_row = tl.where(is_first, 0, C1) + n0
    HO, WO = strided_size(H, W, 2)
    image, h0, w0 = tile_origin(tile, HO, WO, TILE_H, TILE_W)
    image = image.to(tl.int32)
    taps = (1 + odd_h) * (1 + odd_w)
    steps = taps * blocks_k
    acc = tl.zeros((BLOCK_N, TILE_H * TILE_W), tl.float32)
    tl.assume(steps > 0)  # Without it, ptxas takes the products one by one (warning C7515).
    for step in range(steps):
        k0 = step // taps * BLOCK_K
        down, right, weight_tap = _tap_of_phase(step % taps, odd_h, odd_w)
        g = load_box(grad_desc, image, h0 + down, w0 + right, k0, TILE_H, TILE_W, BLOCK_K)
        weight = weight_desc.load([weight_row, weight_tap * COUT + k0])
        acc = tl.dot(weight, tl.trans(g), acc)
    grad = acc.to(grad_desc.dtype)
    if out_up_desc is None:
        desc = of_parity(out_desc, out01_desc, out10_desc, out11_desc, odd_h, odd_w)
        store_box(desc, grad, image, h0, w0, n0, TILE_H, TILE_W, BLOCK_N)
    else:
        if is_first:
            desc = of_parity(out_desc, out01_desc, out10_desc, out11_desc, odd_h, odd_w)
            store_box(desc, grad, image, h0, w0, n0, TILE_H, TILE_W, BLOCK_N)
        else:
            desc = of_parity(out_up_desc, out_up01_desc, out_up10_desc, out_up11_desc, odd_h, odd_w)
            store_box(desc, grad, image, h0, w0, n0, TILE_H, TILE_W, BLOCK_N)
# fmt: on
