"""2x2 transposed convolution, stride 2: a product of pixels with the weight of each of four sub-pixels, and gradients.

The windows do not overlap, so every output pixel is one product over the input channels, stored where it belongs.
Where hardware copies whole boxes (sm_90 and above, 16 bits), the forward pass goes through tensor descriptors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastunet.kernels import config_pixels, gpu
from fastunet.kernels.conv3x3.config import ConvConfig, tiles_per_image
from fastunet.kernels.epilogue import E4M3, scale_to_e4m3
from fastunet.kernels.layout import dense, empty_packed, packed
from fastunet.kernels.pixels import accumulate_rows, first_subpixels, pixel_rows, run_product, subpixel_step
from fastunet.kernels.tiles import multiple
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

SUBPIXELS = 4


# fmt: off
@triton.jit(do_not_specialize=["pixels", "W"])
def conv_transpose2x2_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, pixels, W, C, COUT, PRECISION: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """y[n, 2h + a, 2w + b, o] = sum over channels c of x[n, h, w, c] * weight[c, o, a, b] + bias[o].

    x [N, H, W, C], weight [C, 2, 2, COUT], y [N, 2H, 2W, COUT]; a program owns BLOCK_P pixels of x, one sub-pixel and
    BLOCK_N channels of y.
    """
    C, COUT = multiple(C, UNIT), multiple(COUT, UNIT)
    # Channel blocks and sub-pixels run fastest: programs that are neighbours in time share their pixels of x in L2.
    blocks_n = tl.cdiv(COUT, BLOCK_N)
    pid = tl.program_id(0)
    n = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < COUT
    sub = pid // blocks_n % 4
    rows, mask_p = pixel_rows(pid // (4 * blocks_n), pixels, BLOCK_P)

    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    acc = accumulate_rows(
        acc, x_ptr, rows, mask_p, C, W, weight_ptr + sub * COUT, n, COUT, 4 * COUT, 1, 0,
        1, PRECISION, BLOCK_K,
    )
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    rows = first_subpixels(rows, W) + subpixel_step(sub, W)
    pointers = y_ptr + (rows * COUT)[:, None] + n[None, :]
    tl.store(pointers, acc.to(y_ptr.dtype.element_ty), mask=mask_p[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["W", "steps"])
def conv_transpose2x2_descriptor_kernel(
    x_desc, weight_desc, bias_ptr, y_desc, y_scale_ptr, W, COUT, steps,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """As conv_transpose2x2_kernel, the product turned around: both operands are then read from shared memory.

    x_desc [N*H, W, C], weight_desc [4*COUT, C], y_desc [N*H, 2, W, 2, COUT]; a program owns a tile of x, one sub-pixel
    and BLOCK_N channels of y. Boxes read zeros outside, and store nothing there: not the next sub-pixel's channels. y
    may be in e4m3, divided by a scale.
    """
    blocks_n = tl.cdiv(COUT, BLOCK_N)
    pid = tl.program_id(0)
    n0 = pid % blocks_n * BLOCK_N
    sub = pid // blocks_n % 4
    tile = pid // (4 * blocks_n)
    h0 = tile // tl.cdiv(W, TILE_W) * TILE_H
    w0 = tile % tl.cdiv(W, TILE_W) * TILE_W

    acc = tl.zeros((BLOCK_N, TILE_H * TILE_W), tl.float32)
    tl.assume(steps > 0)  # Without it, ptxas takes the products one by one (warning C7515).
    for step in range(steps):
        x = tl.reshape(x_desc.load([h0, w0, step * BLOCK_K]), (TILE_H * TILE_W, BLOCK_K))
        acc = tl.dot(weight_desc.load([sub * COUT + n0, step * BLOCK_K]), tl.trans(x), acc)
    if bias_ptr is not None:
        n = n0 + tl.arange(0, BLOCK_N)
        acc += tl.load(bias_ptr + n, mask=n < COUT, other=0.0).to(tl.float32)[:, None]
    if y_scale_ptr is not None:
        acc = scale_to_e4m3(acc, y_scale_ptr)
    y = tl.reshape(tl.trans(acc.to(y_desc.dtype)), (TILE_H, 1, TILE_W, 1, BLOCK_N))
    y_desc.store([h0, sub // 2, w0, sub % 2, n0], y)


@triton.jit(do_not_specialize=["pixels", "W"])
def conv_transpose2x2_input_grad_kernel(
    grad_ptr, weight_ptr, out_ptr, pixels, W, C, COUT, PRECISION: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """out[n, h, w, c] = sum over a, b and output channels o of grad[n, 2h + a, 2w + b, o] * weight[c, o, a, b].

    grad [N, 2H, 2W, COUT], weight [C, 2, 2, COUT], out [N, H, W, C]; a program owns BLOCK_P pixels and BLOCK_N channels
    of out.
    """
    C, COUT = multiple(C, UNIT), multiple(COUT, UNIT)
    blocks_n = tl.cdiv(C, BLOCK_N)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, mask_p = pixel_rows(tl.program_id(0) // blocks_n, pixels, BLOCK_P)
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    acc = accumulate_rows(
        acc, grad_ptr, first_subpixels(rows, W), mask_p, COUT, W, weight_ptr, n, C, 1, 4 * COUT, COUT,
        4, PRECISION, BLOCK_K,
    )
    pointers = out_ptr + (rows * C)[:, None] + n[None, :]
    tl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=mask_p[:, None] & (n < C)[None, :])
# fmt: on


def _weight_matrix(weight: Tensor) -> Tensor:
    """Return a copy of weight [C, Cout, 2, 2] as [4*Cout, C], sub-pixel by sub-pixel: turned otherwise, the product's
    first operand would go through registers.
    """
    return weight.permute(2, 3, 1, 0).contiguous().view(SUBPIXELS * weight.shape[1], weight.shape[0])


def _run_descriptors(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, chosen: ConvConfig, y_scale: Tensor | None
) -> None:
    """Launch the descriptor variant."""
    batch, channels, height, width = x.shape
    channels_out, rows = weight.shape[1], batch * height
    tile_h, tile_w, block_n, block_k = chosen.tile_h, chosen.tile_w, chosen.block_n, chosen.block_k
    # Strides are spelt out: a tensor may have any where its size is 1.
    x_strides = [width * channels, channels, 1]
    y_strides = [4 * width * channels_out, 2 * width * channels_out, 2 * channels_out, channels_out, 1]
    y_sizes = [rows, 2, width, 2, channels_out]
    arguments = {
        "x_desc": TensorDescriptor(x, [rows, width, channels], x_strides, [tile_h, tile_w, block_k]),
        "weight_desc": TensorDescriptor.from_tensor(_weight_matrix(weight), [block_n, block_k]),
        "bias_ptr": bias,
        "y_desc": TensorDescriptor(y, y_sizes, y_strides, [tile_h, 1, tile_w, 1, block_n]),
        "y_scale_ptr": y_scale,
        "W": width,
        "COUT": channels_out,
        "steps": gpu.cdiv(channels, block_k),
    }
    grid = tiles_per_image(chosen, rows, width) * SUBPIXELS * gpu.cdiv(channels_out, block_n)
    gpu.launch(conv_transpose2x2_descriptor_kernel, grid, arguments, chosen).run(x.device)


def conv_transpose2x2(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    allow_tf32: bool = False,
    y_scale: Tensor | None = None,
) -> Tensor:
    """Return F.conv_transpose2d(x, weight, bias, stride=2).

    x [N, C, H, W], weight [C, Cout, 2, 2] in any layout, bias [Cout] or None; all of one dtype and device, which the
    caller has checked. Returns [N, Cout, 2H, 2W], channels_last. float32 sums; allow_tf32 lets float32 inputs be
    rounded to TF32 on tensor cores. y_scale: one float32, by which the result is divided, in e4m3; where
    `config_pixels.writes_e4m3`, else ValueError.
    """
    (channels, channels_out), target = weight.shape[:2], gpu.target(x.device)
    y = empty_packed(x, channels_out, 2 * x.shape[2], 2 * x.shape[3], None if y_scale is None else E4M3)
    if y.numel() == 0:  # A descriptor cannot describe an empty tensor.
        return y
    x, bias = packed(x), dense(bias)
    tiles = config_pixels.subpixel_tile_config(channels, channels_out, x.dtype, target)
    if tiles is not None:
        _run_descriptors(x, weight, bias, y, tiles, y_scale)
        return y
    if y_scale is not None:
        raise ValueError("y_scale: expected a shape and target of the descriptor variant, got others")
    chosen = config_pixels.pixel_product_config(channels, channels_out, x.dtype, target, allow_tf32=allow_tf32)
    arguments = {"x_ptr": x, "weight_ptr": packed(weight), "bias_ptr": bias, "y_ptr": y}
    arguments |= {"C": channels, "COUT": channels_out}
    programs = SUBPIXELS * gpu.cdiv(channels_out, chosen.block_n)
    run_product(conv_transpose2x2_kernel, arguments, x, programs, chosen, allow_tf32=allow_tf32)
    return y


def conv_transpose2x2_input_grad(grad: Tensor, weight: Tensor, *, allow_tf32: bool = False) -> Tensor:
    """Return the input's gradient [N, C, H, W] from the output's, grad [N, Cout, 2H, 2W], and weight.

    It is F.conv2d(grad, weight, stride=2). Returns a channels_last tensor of grad's dtype.
    """
    out = empty_packed(grad, weight.shape[0], grad.shape[2] // 2, grad.shape[3] // 2)
    (channels, channels_out), target = weight.shape[:2], gpu.target(grad.device)
    chosen = config_pixels.pixel_product_config(channels_out, channels, grad.dtype, target, allow_tf32=allow_tf32)
    arguments = {"grad_ptr": packed(grad), "weight_ptr": packed(weight), "out_ptr": out}
    arguments |= {"C": channels, "COUT": channels_out}
    programs = gpu.cdiv(channels, chosen.block_n)
    run_product(conv_transpose2x2_input_grad_kernel, arguments, out, programs, chosen, allow_tf32=allow_tf32)
    return out
