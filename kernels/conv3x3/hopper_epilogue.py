"""epilogue.py's formulas in Gluon, which cannot call Triton's functions.

Sums are [P, N], pixels by channels, or [N, P], as of warpgroup products: `AXIS` is the axis of the channels.
"""

from __future__ import annotations

import triton.language as tl
from fastunet.kernels.conv3x3 import config
from fastunet.kernels.tiles import IDENTITY, LEAKY_RELU
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_TILE_W = tl.constexpr(config.TILE_W)
_IDENTITY, _LEAKY_RELU = tl.constexpr(IDENTITY.value), tl.constexpr(LEAKY_RELU.value)


# fmt: off
@gluon.jit
def larger(a, b):
    """The larger, NaN if either is."""
    return gl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def load_channels(ptr, n, COUT, AXIS: gl.constexpr):
    """One float32 value per channel, zero beyond COUT, shaped to broadcast over the sums."""
    return gl.expand_dims(gl.load(ptr + n, mask=n < COUT, other=0.0).to(gl.float32), 1 - AXIS)


@gluon.jit
def finish(
    acc, n, COUT, bias_ptr, mean_ptr, variance_ptr, gamma_ptr, eps, negative_slope,
    BIAS: gl.constexpr, NORM: gl.constexpr, GAMMA: gl.constexpr, ACTIVATION: gl.constexpr, AXIS: gl.constexpr,
):
    """As epilogue.finish_sums, which Gluon cannot call."""
    if NORM:
        scale = 1.0 / gl.sqrt(load_channels(variance_ptr, n, COUT, AXIS) + eps)
        if GAMMA:
            scale = scale * load_channels(gamma_ptr, n, COUT, AXIS)
        acc = (acc - load_channels(mean_ptr, n, COUT, AXIS)) * scale
    if BIAS:
        acc = acc + load_channels(bias_ptr, n, COUT, AXIS)
    if ACTIVATION != _IDENTITY:
        if ACTIVATION == _LEAKY_RELU:
            acc = gl.where(acc > 0.0, acc, acc * negative_slope)
        else:
            acc = larger(acc, 0.0)
    return acc


@gluon.jit
def activate_grad(g, y, negative_slope, ACTIVATION: gl.constexpr):
    """As tiles.activate_grad."""
    if ACTIVATION == _LEAKY_RELU:
        return gl.where(y > 0.0, g, g * negative_slope)
    else:
        return gl.where(y <= 0.0, 0.0, g)


@gluon.jit
def pool(acc, N: gl.constexpr, TILE_H: gl.constexpr):
    """Maxima [N, P / 4] of the 2x2 windows of sums [N, P] of whole rows of pixels."""
    H2: gl.constexpr = TILE_H // 2
    W2: gl.constexpr = _TILE_W // 2
    windows = gl.reduce(gl.reduce(acc.reshape([N, H2, 2, W2, 2]), 4, larger), 2, larger)
    return windows.reshape([N, H2 * W2])


@gluon.jit
def tile_pixels(h0, w0, H, W, PIXELS: gl.constexpr, LAYOUT: gl.constexpr):
    """Rows and columns [P] of whole rows of pixels, the first at (h0, w0), and which are inside the image."""
    p = gl.arange(0, PIXELS, LAYOUT)
    rows = h0 + p // _TILE_W
    columns = w0 + p % _TILE_W
    return rows, columns, (rows < H) & (columns < W)


@gluon.jit
def store_statistics(
    count_ptr, partial_ptr, y, tile, tiles, n, COUT, h0, w0, H, W, first_block,
    TILE_H: gl.constexpr, SUMS: gl.constexpr,
):
    """As epilogue.store_statistics, of y [N, P] as it is stored, but in one pass, about the tile's first pixel.

    Two passes would hold the values and which of them are inside, beside each other, and spill. As the first pixel
    lies z deviations from the mean, M2 loses some 1 + z^2 times a sum's rounding.
    """
    rows, columns, inside = tile_pixels(h0, w0, H, W, TILE_H * _TILE_W, gl.SliceLayout(0, SUMS))
    v = y.to(gl.float32)
    pivot = gl.sum(gl.where(gl.expand_dims((rows == h0) & (columns == w0), 0), v, 0.0), 1)
    deviation = gl.where(gl.expand_dims(inside, 0), v - gl.expand_dims(pivot, 1), 0.0)
    count = gl.minimum(TILE_H, H - h0) * gl.minimum(_TILE_W, W - w0)
    step = gl.sum(deviation, 1) / count
    # Two values for each 128 pixels or more: their offsets stay far below 2^31.
    gl.store(partial_ptr + tile * COUT + n, pivot + step, mask=n < COUT)
    m2 = gl.sum(deviation * deviation, 1) - count * step * step
    gl.store(partial_ptr + (tiles + tile) * COUT + n, m2, mask=n < COUT)
    if first_block:
        gl.store(count_ptr + tile, count)


@gluon.jit
def store_head(
    head_ptr, head_weight_ptr, head_bias_ptr, acc, n, COUT, image, h0, w0, H, W,
    CLASSES: gl.constexpr, HEAD_BIAS: gl.constexpr, SIGMOID: gl.constexpr, PIXELS: gl.constexpr, AXIS: gl.constexpr,
    SUMS: gl.constexpr,
):
    """As epilogue.store_head, of sums of whole rows of pixels, the first at (h0, w0)."""
    rows, columns, inside = tile_pixels(h0, w0, H, W, PIXELS, gl.SliceLayout(AXIS, SUMS))
    at = (((rows + image * H).to(gl.int64)) * W + columns) * CLASSES
    # Zero weights beyond COUT do not undo what the sums have there: beside an infinite pixel, NaN.
    if COUT < n.shape[0]:  # A branch: selected in every tile, 256 pixels with a norm spill.
        acc = gl.where(gl.expand_dims(n < COUT, 1 - AXIS), acc, 0.0)
    for j in gl.static_range(CLASSES):
        z = gl.sum(acc * load_channels(head_weight_ptr + j * COUT, n, COUT, AXIS), AXIS)
        if HEAD_BIAS:
            z = z + gl.load(head_bias_ptr + j).to(gl.float32)
        if SIGMOID:
            z = 1.0 / (1.0 + gl.exp(-z))
        gl.store(head_ptr + (at + j), z.to(head_ptr.dtype.element_ty), mask=inside)
# fmt: on
