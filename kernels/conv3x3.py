"""3x3 convolution, stride 1, zero padding 1, with bias, activation and 2x2 max pooling in its epilogue.

An implicit GEMM on packed NHWC activations: a program owns a tile of P pixels and BLOCK_N output channels, and steps
through the taps and the input channels, gathering its [P, BLOCK_K] operand from shifted pixels. Two inputs stand for
their concatenation along the channels, which is never written.
"""

# Of a kernel's parameters only the constexprs carry an annotation.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastunet.kernels import config, gpu
from fastunet.kernels.tiles import (
    IDENTITY,
    LEAKY_RELU,
    RELU,
    activate,
    load_folded_taps,
    load_tap,
    pixel_offsets,
    pool2x2,
    tile_origin,
    tile_pixels,
)
from torch import Tensor


# fmt: off
@triton.jit
def _accumulate(
    acc, x_ptr, weight_ptr, first, steps, n, rows, columns, origin, offsets, H, W, C, COUT,
    stride_out, stride_tap, stride_in,
    FLIP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """acc [P, N] += the taps of x [P, 9*C] @ the weights [9*C, N] of input channels first, ..., first + C - 1."""
    k = tl.arange(0, BLOCK_K)
    weight_pointers = weight_ptr + n.to(tl.int64)[None, :] * stride_out + k[:, None] * stride_in
    mask_n = (n < COUT)[None, :]
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
def _accumulate_folded(
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


@triton.jit(do_not_specialize=["H", "W", "steps1", "steps2"])
def conv3x3_kernel(
    x_ptr, up_ptr, weight_ptr, bias_ptr, y_ptr, pooled_ptr, H, W, C1, C2, COUT, steps1, steps2,
    stride_out, stride_tap, stride_in, negative_slope,
    ACTIVATION: tl.constexpr, FLIP: tl.constexpr, FOLDED: tl.constexpr, PRECISION: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """y[p, o] = activation(sum over taps t and channels c of cat(x, up)[p moved by t, c] * weight[o, c, t] + bias[o]).

    x [N, H, W, C1], up [N, H, W, C2] or None, y [N, H, W, COUT]; pooled [N, H // 2, W // 2, COUT] or None takes the
    maxima of y's 2x2 windows. FLIP turns the window around (weight[o, c, 8 - t]), which makes this the input gradient.
    steps1 and steps2 are the steps for each input: 9*ceil(C/BLOCK_K), or ceil(9*C/BLOCK_K) where FOLDED.
    """
    # Channel blocks run fastest: programs that are neighbours in time share a pixel tile in L2.
    blocks_n = tl.cdiv(COUT, BLOCK_N)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < COUT
    image, h0, w0 = tile_origin(tl.program_id(0) // blocks_n, H, W, TILE_H, TILE_W)
    rows, columns = tile_pixels(h0, w0, H, W, TILE_H, TILE_W)
    origin = (image * H + h0) * W + w0
    offsets = pixel_offsets(W, TILE_H, TILE_W)

    acc = tl.zeros((TILE_H * TILE_W, BLOCK_N), tl.float32)
    if FOLDED:
        acc = _accumulate_folded(
            acc, x_ptr, weight_ptr, steps1, n, rows, columns, origin, offsets, H, W, C1, COUT,
            stride_out, stride_tap, stride_in, FLIP, PRECISION, BLOCK_K,
        )
    else:
        acc = _accumulate(
            acc, x_ptr, weight_ptr, 0, steps1, n, rows, columns, origin, offsets, H, W, C1, COUT,
            stride_out, stride_tap, stride_in, FLIP, PRECISION, BLOCK_K,
        )
        if up_ptr is not None:
            acc = _accumulate(
                acc, up_ptr, weight_ptr, C1, steps2, n, rows, columns, origin, offsets, H, W, C2, COUT,
                stride_out, stride_tap, stride_in, FLIP, PRECISION, BLOCK_K,
            )

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, negative_slope, ACTIVATION)
    pointers = y_ptr + (origin + offsets)[:, None] * COUT + n[None, :]
    tl.store(pointers, acc.to(y_ptr.dtype.element_ty), mask=(rows >= 0)[:, None] & mask_n[None, :])

    if pooled_ptr is not None:
        # Tile sides are even, so that each window lies in one tile. A window cut by the image's edge has no output.
        rows, columns = tile_pixels(h0 // 2, w0 // 2, H // 2, W // 2, TILE_H // 2, TILE_W // 2)
        windows = (image * (H // 2) + h0 // 2) * (W // 2) + w0 // 2 + pixel_offsets(W // 2, TILE_H // 2, TILE_W // 2)
        pooled = pool2x2(acc, TILE_H, TILE_W, BLOCK_N).to(pooled_ptr.dtype.element_ty)
        pointers = pooled_ptr + windows[:, None] * COUT + n[None, :]
        tl.store(pointers, pooled, mask=(rows >= 0)[:, None] & mask_n[None, :])
# fmt: on


def activation_code(negative_slope: float | None) -> int:
    """ACTIVATION for a negative slope: None is no activation, 0 ReLU, anything else LeakyReLU."""
    if negative_slope is None:
        return IDENTITY.value
    return LEAKY_RELU.value if negative_slope else RELU.value


def precision(dtype: torch.dtype, allow_tf32: bool) -> str:
    """PRECISION of tl.dot: only float32 inputs have a choice."""
    return "tf32" if allow_tf32 and dtype == torch.float32 else "ieee"


def packed(x: Tensor) -> Tensor:
    """x [N, C, H, W] in packed NHWC order from a 16-byte boundary on, copied only where it is not."""
    return _on_boundary(x.contiguous(memory_format=torch.channels_last))


def _on_boundary(x: Tensor) -> Tensor:
    """x, or a channels_last copy where its memory starts off the 16-byte boundary that vector loads need."""
    return x.clone(memory_format=torch.channels_last) if x.data_ptr() % 16 else x


def empty_packed(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An uninitialised packed NHWC tensor [N, channels, height, width] with `like`'s batch, dtype and device."""
    return torch.empty(
        (like.shape[0], channels, height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def conv3x3_launch(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    pooled: Tensor | None,
    *,
    negative_slope: float | None,
    input_grad: bool,
    allow_tf32: bool,
    target: gpu.Target,
) -> gpu.Launch:
    """The launch that fills y, and pooled, from packed x and up.

    input_grad: x is the gradient of a convolution's output and y becomes that of its input: the same sum, with the
    window turned around and the weight's channels swapped, which strides alone express.
    """
    if weight.stride(2) != 3 * weight.stride(3):  # The nine taps are to be one strided run.
        weight = weight.contiguous()
    weight = _on_boundary(weight)
    stride_out, stride_in, _, stride_tap = weight.stride()
    if input_grad:
        stride_out, stride_in = stride_in, stride_out
    batch, channels, height, width = y.shape
    c1, c2 = x.shape[1], 0 if up is None else up.shape[1]
    # Beside whole rows of 16, a weight's strides may be those of neighbouring channels: 1, or 9 in a contiguous weight.
    weight_aligned = all(stride in (1, 9) or config.aligned(stride) for stride in (stride_out, stride_in))
    shape = config.ConvShape(c1, c2, channels, height, width, config.aligned(c1, c2, channels) and weight_aligned)
    chosen = config.conv_config(shape, x.dtype, target, allow_tf32=allow_tf32)
    tiles = triton.cdiv(height, chosen.tile_h) * triton.cdiv(width, chosen.tile_w)
    arguments = {
        "x_ptr": x,
        "up_ptr": up,
        "weight_ptr": weight,
        "bias_ptr": None if bias is None else bias.contiguous(),
        "y_ptr": y,
        "pooled_ptr": pooled,
        "H": height,
        "W": width,
        "C1": c1,
        "C2": c2,
        "COUT": channels,
        "steps1": config.conv_steps(chosen, c1),
        "steps2": config.conv_steps(chosen, c2),
        "stride_out": stride_out,
        "stride_tap": stride_tap,
        "stride_in": stride_in,
        "negative_slope": float(negative_slope or 0),
        "ACTIVATION": activation_code(negative_slope),
        "FLIP": input_grad,
        "FOLDED": chosen.folded,
        "PRECISION": precision(x.dtype, allow_tf32),
        "TILE_H": chosen.tile_h,
        "TILE_W": chosen.tile_w,
        "BLOCK_N": chosen.block_n,
        "BLOCK_K": chosen.block_k,
    }
    grid = batch * tiles * triton.cdiv(channels, chosen.block_n)
    return gpu.Launch(
        conv3x3_kernel,
        grid,
        arguments,
        chosen.num_warps,
        chosen.num_stages,
        chosen.max_registers,
        product_rows=chosen.tile_h * chosen.tile_w,
    )


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    up: Tensor | None = None,
    negative_slope: float | None = None,
    pool: bool = False,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """activation(conv2d(cat([x, up], 1), weight, bias, padding=1)) and, with pool, the maxima of its 2x2 windows.

    x [N, C1, H, W], up [N, C2, H, W] or None, weight [Cout, C1 + C2, 3, 3] in any layout, bias [Cout] or None; all of
    one dtype and device, which the caller has checked. negative_slope: None for no activation, 0 for ReLU, above 0
    for LeakyReLU. Returns y [N, Cout, H, W] and pooled [N, Cout, H // 2, W // 2] or None, channels_last. float32 sums;
    allow_tf32 lets float32 inputs be rounded to TF32 on tensor cores.
    """
    height, width = x.shape[2:]
    y = empty_packed(x, weight.shape[0], height, width)
    pooled = empty_packed(x, weight.shape[0], height // 2, width // 2) if pool else None
    launch = conv3x3_launch(
        packed(x),
        None if up is None else packed(up),
        weight,
        bias,
        y,
        pooled,
        negative_slope=negative_slope,
        input_grad=False,
        allow_tf32=allow_tf32,
        target=gpu.target(x.device),
    )
    launch.run(x.device)
    return y, pooled
