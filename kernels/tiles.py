"""The pieces the conv3x3 kernels share: pixel tiles, the gather of a tap, activations and the 2x2 maximum.

Activations are packed NHWC: the element (n, h, w, c) lies at ((n*H + h)*W + w)*C + c. A tile is TILE_H x TILE_W
pixels of one image, flattened row by row to P = TILE_H*TILE_W. Taps count the 3x3 window row by row: tap 4 is its
centre.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Values of ACTIVATION.
IDENTITY = tl.constexpr(0)
RELU = tl.constexpr(1)
LEAKY_RELU = tl.constexpr(2)

CENTRE_TAP = tl.constexpr(4)


@triton.jit
def multiple(size, UNIT: tl.constexpr):
    """size, a multiple of UNIT, as one that the compiler knows for such: it may load UNIT channels as one vector."""
    return size if UNIT == 1 else size // UNIT * UNIT


@triton.jit
def tile_origin(tile, H, W, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Decode tile number `tile`, columns fastest, then rows, then images: image (int64), first row, first column."""
    tiles_w = tl.cdiv(W, TILE_W)
    tiles_h = tl.cdiv(H, TILE_H)
    image = (tile // (tiles_w * tiles_h)).to(tl.int64)
    return image, tile // tiles_w % tiles_h * TILE_H, tile % tiles_w * TILE_W


@triton.jit
def next_tile(image, h0, w0, H, W, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """tile_origin of the tile after that at (image, h0, w0), without its divisions."""
    w0 += TILE_W
    h0 = tl.where(w0 < W, h0, h0 + TILE_H)
    w0 = tl.where(w0 < W, w0, 0)
    image = tl.where(h0 < H, image, image + 1)
    return image, tl.where(h0 < H, h0, 0), w0


@triton.jit
def tile_pixels(h0, w0, H, W, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Rows [P] and columns [P] of the tile at (h0, w0). A pixel outside the image has row -2: so are all its taps."""
    p = tl.arange(0, TILE_H * TILE_W)
    rows = h0 + p // TILE_W
    columns = w0 + p % TILE_W
    return tl.where((rows < H) & (columns < W), rows, -2), columns


@triton.jit
def pixel_offsets(W, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """How many pixels each pixel of a tile lies beyond the tile's first, int64 [P]."""
    p = tl.arange(0, TILE_H * TILE_W)
    return (p // TILE_W).to(tl.int64) * W + p % TILE_W


@triton.jit
def strided_size(H, W, STRIDE: tl.constexpr):
    """Height and width of what a 3x3 convolution by STRIDE makes of an image H x W."""
    return H if STRIDE == 1 else (H + 1) // 2, W if STRIDE == 1 else (W + 1) // 2


@triton.jit
def read_pixels(image, h0, w0, rows, columns, H, W, STRIDE: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """What a tile of outputs at (h0, w0) has at the centre of its windows, in an image H x W: rows and columns [P], the
    first one's index, and how many pixels each lies beyond it. A row outside stays outside.
    """
    origin = (image * H + h0 * STRIDE) * W + w0 * STRIDE
    return rows * STRIDE, columns * STRIDE, origin, pixel_offsets(W, TILE_H, TILE_W) * STRIDE


@triton.jit
def joined_channels(first_ptr, second_ptr, N: tl.constexpr):
    """Pointers [N] to the channels of pixel 0 of two images of N / 2 channels each, one after the other."""
    n = tl.arange(0, N)
    return tl.where(n < N // 2, first_ptr, second_ptr) + n % (N // 2)


@triton.jit
def load_pixels(x_ptr, channels, rows, origin, offsets, C):
    """x at the pixels [P] of a tile, channels [K]: [P, K], zero outside the image and beyond C.

    origin: index of the tile's first pixel, int64. Scalars times C stay scalar, offsets*C is the same for every tile.
    """
    pointers = x_ptr + origin * C + (offsets * C)[:, None] + channels[None, :]
    return tl.load(pointers, mask=(rows >= 0)[:, None] & (channels < C)[None, :], other=0.0)


@triton.jit
def load_tap(x_ptr, tap, channels, rows, columns, origin, offsets, H, W, C):
    """load_pixels of the pixels moved by `tap`: [P, K], zero outside the image and beyond C."""
    dh = tap // 3 - 1
    dw = tap % 3 - 1
    h = rows + dh
    w = columns + dw
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    pointers = x_ptr + (origin + dh * W + dw) * C + (offsets * C)[:, None] + channels[None, :]
    return tl.load(pointers, mask=inside[:, None] & (channels < C)[None, :], other=0.0)


@triton.jit
def load_folded_taps(x_ptr, k, rows, columns, origin, offsets, H, W, C):
    """x with taps folded into channels, k = tap*C + channel [K]: [P, K], zero outside the image and for k >= 9*C."""
    tap = k // C
    dh = (tap // 3 - 1)[None, :]
    dw = (tap % 3 - 1)[None, :]
    h = rows[:, None] + dh
    w = columns[:, None] + dw
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    # So few channels are loaded element by element: 32-bit offsets halve the registers of their addresses.
    offsets = (offsets * C).to(tl.int32)[:, None] + (dh * W + dw) * C + (k % C)[None, :]
    return tl.load(x_ptr + origin * C + offsets, mask=inside & (k < 9 * C)[None, :], other=0.0)


@triton.jit
def activate(v, negative_slope, ACTIVATION: tl.constexpr):
    """v, ReLU(v) or LeakyReLU(v), float32. NaN stays NaN, as in torch: max(v, 0) would drop it, and so would v > 0."""
    if ACTIVATION == RELU:
        v = tl.where(v <= 0.0, 0.0, v)
    if ACTIVATION == LEAKY_RELU:
        v = tl.where(v > 0.0, v, v * negative_slope)
    return v


@triton.jit
def activate_grad(g, y, negative_slope, ACTIVATION: tl.constexpr):
    """The gradient g of y = activate(v), carried to v; float32. The sign of y is the sign of v."""
    if ACTIVATION == RELU:
        g = tl.where(y <= 0.0, 0.0, g)
    if ACTIVATION == LEAKY_RELU:
        g = tl.where(y > 0.0, g, g * negative_slope)
    return g


@triton.jit
def nan_max(a, b):
    """The larger of a and b, NaN where either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def pool2x2(v, TILE_H: tl.constexpr, TILE_W: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr):
    """The maxima of a tile's 2x2 windows, NaN where one holds a NaN; of [P, N], or [N, P]: AXIS is that of channels."""
    if AXIS == 1:
        v = tl.reshape(v, (TILE_H // 2, 2, TILE_W // 2, 2, N))
        v = tl.reshape(tl.reduce(tl.reduce(v, 1, nan_max), 2, nan_max), (TILE_H * TILE_W // 4, N))
    else:
        v = tl.reshape(v, (N, TILE_H // 2, 2, TILE_W // 2, 2))
        v = tl.reshape(tl.reduce(tl.reduce(v, 4, nan_max), 2, nan_max), (N, TILE_H * TILE_W // 4))
    return v
