"""3x3 convolutions of many channels on the CPU with fewer multiplications, forward and backward (Winograd 1980; Lavin
and Gray 2016, arXiv:1509.09308).

A tile of m x m outputs takes (m + 2)^2 multiplications for each pair of channels instead of 9 m^2: its inputs are
transformed, multiplied with the transformed weights, which over all tiles is a matrix product for each of the (m + 2)^2
places, and transformed back. Every step is linear, so backward is the same steps' transposes in reverse.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

# Lavin and Gray's matrices, by m: of a row of inputs, of weights, and to a row of outputs.
_ROWS: dict[int, tuple[list[list[float]], list[list[float]], list[list[float]]]] = {
    2: (
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]],
    ),
    4: (
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ],
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    ),
}
# What each matrix of a pass may take of the workspace for every thread: few enough bytes to stay in the caches.
_PASS_BYTES = 1 << 22
# A larger tensor is not kept from call to call.
_KEPT_BYTES = 48 << 20
# From so many weights for each pixel of an image on, tiles of 4 x 4 lose more on the weights than they gain.
_WEIGHTS_PER_PIXEL = 256


class _Transforms(NamedTuple):
    """Of the (m + 2)^2 inputs of a tile, of 9 weights, and to m^2 outputs; the transposes lead back."""

    inputs: Tensor
    weights: Tensor
    outputs: Tensor


@cache
@torch.inference_mode(False)
def _transforms(m: int) -> _Transforms:
    rows = (torch.tensor(matrix, dtype=torch.float64, device="cpu") for matrix in _ROWS[m])
    return _Transforms(*(torch.kron(matrix, matrix).float() for matrix in rows))


class _Workspace(threading.local):
    """Memory that is kept from call to call: to get it fresh from the system can take as long as to compute in it."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    @torch.inference_mode(False)
    def empty(self, name: str, *shape: int) -> Tensor:
        """An uninitialised float32 tensor, which the next call for this name overwrites."""
        size = math.prod(shape)
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size:
            kept = torch.empty(size, dtype=torch.float32, device="cpu")
            if 4 * size <= _KEPT_BYTES:
                self._kept[name] = kept
        return kept[:size].view(shape)


_workspace = _Workspace()


class _Tiles:
    """Tiles of m x m outputs that are computed in one pass: `rows` rows of them, `wide` in each, in each of n images.

    Images are [n, H', W', C], made of whole tiles; those of inputs begin with a border of one pixel.
    """

    def __init__(self, m: int, n: int, rows: int, wide: int) -> None:
        self.m, self.n, self.rows, self.wide = m, n, rows, wide
        self.places, self.count = (m + 2) ** 2, n * rows * wide

    def view(self, images: Tensor, first: int, shift: tuple[int, int] = (0, 0)) -> Tensor:
        """The tiles from row `first` on as a view [m, m, n, rows, wide, C] of images, moved by `shift` whole tiles."""
        top, left = (first + shift[0]) * self.m, shift[1] * self.m
        part = images[:, top : top + self.rows * self.m, left : left + self.wide * self.m]
        return part.unflatten(2, (self.wide, self.m)).unflatten(1, (self.rows, self.m)).permute(2, 4, 0, 1, 3, 5)

    def parts(self, images: Tensor, places: Tensor, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The four parts in which the (m + 2) x (m + 2) inputs of each tile lie in m x m tiles, its own and its
        neighbours to the right and below: as views of images, and of places [m + 2, m + 2, n, rows, wide, C].
        """
        m = self.m
        spans = ((0, slice(0, m), slice(0, m)), (1, slice(0, 2), slice(m, m + 2)))
        for down, tile_rows, rows in spans:
            for right, tile_columns, columns in spans:
                tiles = self.view(images, first, (down, right))
                yield tiles[tile_rows, tile_columns], places[rows, columns]

    def inputs(self, images: Tensor, first: int) -> Tensor:
        """The transformed inputs [(m + 2)^2, tiles, C]."""
        side, channels = self.m + 2, images.shape[-1]
        places = _workspace.empty("places", side, side, self.n, self.rows, self.wide, channels)
        for tiles, part in self.parts(images, places, first):
            part.copy_(tiles)
        out = _workspace.empty("inputs", self.places, self.count * channels)
        torch.mm(_transforms(self.m).inputs, places.view(self.places, -1), out=out)
        return out.view(self.places, self.count, channels)

    def add_input_grads(self, grads: Tensor, images: Tensor, first: int) -> None:
        """Add to images what `inputs` reads of them, given the gradients of its result."""
        side, channels = self.m + 2, images.shape[-1]
        places = _workspace.empty("places", self.places, self.count * channels)
        torch.mm(_transforms(self.m).inputs.t(), grads.view(self.places, -1), out=places)
        shaped = places.view(side, side, self.n, self.rows, self.wide, channels)
        for tiles, part in self.parts(images, shaped, first):
            tiles.add_(part)

    def store(self, products: Tensor, bias: Tensor | None, images: Tensor, first: int) -> None:
        """Write the outputs that the products [(m + 2)^2, tiles, C] transform to, plus bias."""
        channels = images.shape[-1]
        out = _workspace.empty("outputs", self.m**2, self.count * channels)
        torch.mm(_transforms(self.m).outputs, products.view(self.places, -1), out=out)
        tiles = self.view(images, first)
        if bias is None:
            tiles.copy_(out.view(tiles.shape))
        else:
            torch.add(out.view(tiles.shape), bias, out=tiles)

    def output_grads(self, images: Tensor, first: int) -> Tensor:
        """The gradients [(m + 2)^2, tiles, C] of the products that `store` has transformed into images."""
        channels = images.shape[-1]
        tiles = self.view(images, first)
        source = _workspace.empty("outputs", *tiles.shape).copy_(tiles)
        out = _workspace.empty("products", self.places, self.count * channels)
        torch.mm(_transforms(self.m).outputs.t(), source.view(self.m**2, -1), out=out)
        return out.view(self.places, self.count, channels)


class _Grid:
    """How [N, C, H, W] images of at most `channels` channels are computed: by images, and in them by rows of tiles."""

    def __init__(self, like: Tensor, m: int, channels: int) -> None:
        self.n, _, self.h, self.w = like.shape
        self.m = m
        self.tall, self.wide = -(-self.h // m), -(-self.w // m)
        self.is_whole = self.h % m == 0 and self.w % m == 0
        pass_bytes = min(_PASS_BYTES * torch.get_num_threads(), _KEPT_BYTES)
        at_once = max(1, pass_bytes // (4 * (m + 2) ** 2 * channels))
        self.images = max(1, at_once // (self.tall * self.wide))
        self.rows = max(1, min(self.tall, at_once // self.wide))

    def batches(self) -> Iterator[slice]:
        """The images that are in work at a time."""
        return (slice(i, min(i + self.images, self.n)) for i in range(0, self.n, self.images))

    def passes(self, batch: slice) -> Iterator[tuple[int, _Tiles]]:
        """The first row of tiles of each pass over these images, and its tiles."""
        for first in range(0, self.tall, self.rows):
            yield first, _Tiles(self.m, batch.stop - batch.start, min(self.rows, self.tall - first), self.wide)

    def inputs(self, name: str, batch: slice, channels: int) -> Tensor:
        """Zeros in the place of inputs [n, H', W', C]: a tile reads two pixels beyond it, of the tile that follows."""
        sides = (count * self.m + self.m for count in (self.tall, self.wide))
        return _workspace.empty(name, batch.stop - batch.start, *sides, channels).zero_()

    def inner(self, inputs: Tensor) -> Tensor:
        """The view [n, H, W, C] of the images in them."""
        return inputs[:, 1 : self.h + 1, 1 : self.w + 1]

    def padded(self, name: str, batch: slice, x: Tensor) -> Tensor:
        """These of the images x [N, C, H, W] as inputs."""
        out = self.inputs(name, batch, x.shape[1])
        self.inner(out).copy_(x[batch].permute(0, 2, 3, 1))
        return out

    def outputs(self, batch: slice, images: Tensor) -> Tensor:
        """These of the images [N, H, W, C] if whole tiles make them up, else zeros [n, H', W', C] in their place."""
        if self.is_whole:
            return images[batch]
        sides = (count * self.m for count in (self.tall, self.wide))
        return _workspace.empty("images", batch.stop - batch.start, *sides, images.shape[-1]).zero_()


def side_of_tiles(x: Tensor, weight: Tensor) -> int:
    """The faster m of convolve, for images like x and weights like weight: 2 or 4."""
    return 4 if x.shape[2] * x.shape[3] * _WEIGHTS_PER_PIXEL >= weight.shape[0] * weight.shape[1] else 2


def spared(x: Tensor, weight: Tensor) -> float:
    """Return which share of a direct convolution's multiplications `convolve` does without."""
    m = side_of_tiles(x, weight)
    return 1 - (m + 2) ** 2 / (9 * m**2)


def _transformed_weight(weight: Tensor, m: int, name: str) -> Tensor:
    """[(m + 2)^2, Cout, Cin] of weight [Cout, Cin, 3, 3]."""
    channels_out, channels = weight.shape[:2]
    out = _workspace.empty(name, channels_out, (m + 2) ** 2, channels)
    taps = weight.permute(0, 2, 3, 1).reshape(channels_out, 9, channels)
    return torch.matmul(_transforms(m).weights, taps, out=out).transpose(0, 1)


def _weight_grad(grad: Tensor, m: int) -> Tensor:
    """The gradient of a weight, channels_last, from that of its transform."""
    channels_out, channels = grad.shape[1:]
    taps = torch.matmul(_transforms(m).weights.t(), grad.transpose(0, 1))
    return taps.view(channels_out, 3, 3, channels).permute(0, 3, 1, 2)


def _empty_images(n: int, height: int, width: int, channels: int) -> Tensor:
    return torch.empty((n, height, width, channels), dtype=torch.float32, device="cpu")


def transformed(weight: Tensor, m: int) -> Tensor:
    """Return what convolve_transformed takes of weight [Cout, Cin, 3, 3]: [(m + 2)^2, Cin, Cout]."""
    return _transformed_weight(weight, m, "weight 0").transpose(1, 2).contiguous()


def convolve(inputs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None, m: int) -> Tensor:
    """The sum of conv2d(x, weight, padding=1) over the inputs x [N, Cin, H, W] and their weights [Cout, Cin, 3, 3],
    plus bias [Cout].

    float32, on the CPU; m: the side of a tile of outputs, 2 or 4. The result is channels_last. With m = 2 it is as
    exact as the sum taken directly; with m = 4 its rounding errors are a few times as large.
    """
    factors = [_transformed_weight(weight, m, f"weight {i}").transpose(1, 2) for i, weight in enumerate(weights)]
    return convolve_transformed(inputs, factors, bias, m)


def convolve_transformed(inputs: Sequence[Tensor], factors: Sequence[Tensor], bias: Tensor | None, m: int) -> Tensor:
    """convolve, by weights transformed before."""
    channels_out = factors[0].shape[2]
    grid = _Grid(inputs[0], m, max(channels_out, *(x.shape[1] for x in inputs)))
    y = _empty_images(grid.n, grid.h, grid.w, channels_out)
    for batch in grid.batches():
        images = [grid.padded(f"input {i}", batch, x) for i, x in enumerate(inputs)]
        out = grid.outputs(batch, y)
        for first, tiles in grid.passes(batch):
            products = _workspace.empty("products", tiles.places, tiles.count, channels_out)
            torch.bmm(tiles.inputs(images[0], first), factors[0], out=products)
            for image, factor in zip(images[1:], factors[1:], strict=True):
                products.baddbmm_(tiles.inputs(image, first), factor)
            tiles.store(products, bias, out, first)
        if not grid.is_whole:
            y[batch] = out[:, : grid.h, : grid.w]
    return y.permute(0, 3, 1, 2)


def gradients(
    grad: Tensor,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    m: int,
    output_mask: Sequence[bool],
    needs_weight: bool,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return, from that of convolve(inputs, weights, m), the gradients of the inputs in output_mask and, with
    needs_weight, of all weights; the others are None. Channels_last.
    """
    grad_images, channels_out = grad.permute(0, 2, 3, 1), grad.shape[1]
    grid = _Grid(grad, m, max(channels_out, *(x.shape[1] for x in inputs)))
    needed_inputs = [i for i, needed in enumerate(output_mask) if needed]
    factors = {i: _transformed_weight(weights[i], m, f"weight {i}") for i in needed_inputs}
    grads = {i: _empty_images(grid.n, grid.h, grid.w, inputs[i].shape[1]) for i in needed_inputs}
    weight_inputs = dict(enumerate(inputs)) if needs_weight else {}
    sums = {
        i: _workspace.empty(f"weight grad {i}", (m + 2) ** 2, channels_out, x.shape[1]).zero_()
        for i, x in weight_inputs.items()
    }
    for batch in grid.batches():
        image = grid.outputs(batch, grad_images)
        if not grid.is_whole:
            image[:, : grid.h, : grid.w].copy_(grad_images[batch])
        images = {i: grid.padded(f"input {i}", batch, x) for i, x in weight_inputs.items()}
        totals = {i: grid.inputs(f"input grad {i}", batch, inputs[i].shape[1]) for i in needed_inputs}
        for first, tiles in grid.passes(batch):
            products = tiles.output_grads(image, first)
            for i, x in images.items():
                sums[i].baddbmm_(products.transpose(1, 2), tiles.inputs(x, first))
            for i, total in totals.items():
                transformed = _workspace.empty("inputs", tiles.places, tiles.count, total.shape[-1])
                tiles.add_input_grads(torch.bmm(products, factors[i], out=transformed), total, first)
        for i, total in totals.items():
            grads[i][batch] = grid.inner(total)
    return (
        [grads[i].permute(0, 3, 1, 2) if i in grads else None for i in range(len(inputs))],
        [_weight_grad(sums[i], m) if i in sums else None for i in range(len(inputs))],
    )
