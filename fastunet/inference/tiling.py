"""Tiles that give what the whole image gives: a net of local layers depends on no pixel beyond its halo."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fastunet import modules, reference
from fastunet.checks import ConfigError
from fastunet.inference.quantization import QuantizedUNet
from fastunet.inference.wrappers import POINTWISE, is_plain_unet, unwrapped
from fastunet.reference import unet as reference_unet
from fastunet.torch_private import forward_hooks

VIEWS = 8  # four quarter turns, each as it is and mirrored
POOLS = (nn.MaxPool2d, nn.AvgPool2d)
# What torch.nn.utils puts before a module's call to make its weights.
MAKERS = (BasePruningMethod, SpectralNorm, WeightNorm)
BLOCKS = {
    getattr(module, name) for module in (modules, reference_unet) for name in ("DoubleConv", "Down", "Up", "OutConv")
}


class Field(NamedTuple):
    """What a part of a net's result depends on."""

    halo: int  # pixels beyond the part, on each side: a multiple of `multiple`
    multiple: int  # at one of which, or at the image's edge, a part begins and ends: pooling meets the same pixels


class Window(NamedTuple):
    """Rows top to bottom and columns left to right of an image, the ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, image: Any) -> Any:
        """Cut the window out of an image [..., H, W]."""
        return image[..., self.top : self.bottom, self.left : self.right]

    def within(self, outer: Window) -> Window:
        """Return the window as seen from the corner of `outer`."""
        return Window(self.top - outer.top, self.bottom - outer.top, self.left - outer.left, self.right - outer.left)

    def turned(self, width: int) -> Window:
        """Return where the window is after a quarter turn (rot90) of an image so wide."""
        return Window(width - self.right, width - self.left, self.top, self.bottom)

    def mirrored(self, width: int) -> Window:
        return Window(self.top, self.bottom, width - self.right, width - self.left)

    def widened(self, field: Field, height: int, width: int) -> Window:
        """Return the window with all that its result depends on, within an image of that size."""
        halo, multiple = field
        return Window(
            max(0, self.top // multiple * multiple - halo),
            min(height, -(-self.bottom // multiple) * multiple + halo),
            max(0, self.left // multiple * multiple - halo),
            min(width, -(-self.right // multiple) * multiple + halo),
        )


# --- what a net depends on ---


def field_of(model: nn.Module) -> Field | None:
    """Return what a part of the model's result depends on; None where it may be the whole image, or cannot be told.

    Of a `fastunet.UNet`, its reference or quantised model, also in torch's wrappers, with parts exchanged as long as
    all are known. Instance norm takes statistics of the whole image, and bilinear upsampling (align_corners) puts
    pixels where the image's size says.
    """
    unet: Any = unwrapped(model)
    if any(map(_is_hooked, model.modules())):
        return None
    if isinstance(unet, QuantizedUNet):
        reach = [2] * (unet.depth + 1)
        return _field(reach, reach[:-1])
    if not is_plain_unet(unet) or not all(map(_is_local, unet.modules())):
        return None
    encoder, decoder = (unet.inc, *unet.downs), tuple(reversed(unet.ups))
    # Each level is half as large as the one above it where each step down halves it, each step up doubles it, and
    # nothing else does either.
    ups = [up.up for up in decoder]
    for kind, steps in ((POOLS, unet.downs), (nn.ConvTranspose2d, ups)):
        if any(_count(step, kind) != 1 for step in steps) or _count(unet, kind) != unet.depth:
            return None
    return _field(
        [*map(_reach, encoder)], [_reach(up.conv) for up in decoder], ups=[*map(_reach, ups)], head=_reach(unet.outc)
    )


def _is_hooked(module: nn.Module) -> bool:
    """Whether something is called before or after the module, other than what makes its weights."""
    return not all(isinstance(hook, MAKERS) for hook in forward_hooks(module))


def _is_local(module: Any) -> bool:
    """Whether a part of a U-Net leaves each result to pixels around it, on the grid of its level."""
    kind = type(module)
    if not {"forward", "_conv_forward"}.isdisjoint(vars(module)):
        return False
    if kind in BLOCKS or kind is nn.Sequential or kind in POINTWISE or issubclass(kind, reference.ReferenceUNet):
        return True
    if isinstance(module, nn.BatchNorm2d) and kind.forward is nn.BatchNorm2d.forward:
        return module.track_running_stats and module.running_mean is not None
    if kind is nn.MaxPool2d or kind is nn.AvgPool2d:
        plain = (_pair(module.kernel_size), _pair(module.stride), _pair(module.padding)) == ((2, 2), (2, 2), (0, 0))
        return plain and not module.ceil_mode and _pair(getattr(module, "dilation", 1)) == (1, 1)
    if kind is nn.ConvTranspose2d:
        shape = (module.kernel_size, module.stride, module.padding, module.output_padding, module.dilation)
        return shape == ((2, 2), (2, 2), (0, 0), (0, 0), (1, 1))
    if kind is nn.Conv2d and module.padding_mode == "zeros" and module.stride == (1, 1):
        same = tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
        return module.padding in ("same", same) and all(k % 2 for k in module.kernel_size)
    return False


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _within(block: nn.Module, kind: Any) -> list[Any]:
    """Return the modules of a kind in a block, as often as each is in it."""
    return [module for _, module in block.named_modules(remove_duplicate=False) if isinstance(module, kind)]


def _count(block: nn.Module, kind: Any) -> int:
    return len(_within(block, kind))


def _reach(block: nn.Module) -> int:
    """Add up how far the convolutions of a block see, in pixels of its level."""
    convs = _within(block, nn.Conv2d)
    return sum(max(d * (k - 1) // 2 for d, k in zip(c.dilation, c.kernel_size, strict=True)) for c in convs)


def _field(encoder: Sequence[int], decoder: Sequence[int], *, ups: Sequence[int] = (), head: int = 0) -> Field:
    """Follow the edge of a part back through the net, `encoder[level]`, `decoder[level]`, `ups[level]` (below it) and
    `head` being how far each sees.
    """
    depth = len(decoder)
    # In pixels of each level: how far beyond the part's edge its skip, or at last the bottom's result, is needed.
    needed, far = [], head
    for level in range(depth):
        far += decoder[level]
        needed.append(far)
        far = -(-far // 2) + (ups[level] if ups else 0)
    reach = far + encoder[depth]
    for level in reversed(range(depth)):
        reach = max(2 * reach, needed[level]) + encoder[level]
    multiple = 2**depth
    return Field(-(-reach // multiple) * multiple, multiple)


# --- tiles ---


def parts_of(height: int, width: int, tile: int, field: Field, grid: int = 1) -> list[Window]:
    """Cut an image into equal parts, row by row, that with all they depend on are no larger than `tile` x `tile`.

    grid: the edge of the parts is a multiple of it, where the tile has room for that.

    Raises:
        ConfigError: a tile that leaves no room between its halos.
    """
    halo, multiple = field
    room = tile - 2 * halo
    step = math.lcm(multiple, grid)
    edge = room // step * step or room // multiple * multiple
    if edge < 1 and max(height, width) > tile:
        least = 2 * halo + multiple
        raise ConfigError(
            f"tile: expected at least {least} pixels, for the {halo} on each side that this net's results depend on, "
            f"got {tile}"
        )

    def spans(length: int) -> list[tuple[int, int]]:
        if length <= tile:
            return [(0, length)]
        return [(start, min(start + edge, length)) for start in range(0, length, edge)]

    return [Window(*rows, *columns) for rows in spans(height) for columns in spans(width)]


def stitched(results: Iterable[tuple[Window, Tensor]], size: tuple[int, int]) -> Tensor:
    """Put the results [..., h, w] of parts in their places, [..., H, W]."""
    whole: Tensor | None = None
    for part, result in results:
        if result.shape[-2:] == size:
            return result
        whole = result.new_empty(*result.shape[:-2], *size) if whole is None else whole
        part.of(whole).copy_(result)
    assert whole is not None
    return whole


def turn(image: Tensor, view: int) -> Tensor:
    """Return one of the eight views of an image [..., H, W]: so many quarter turns, mirrored from 4 on."""
    turned = image.rot90(view % 4, (-2, -1))
    return turned.flip(-1) if view >= 4 else turned


def turn_back(image: Tensor, view: int) -> Tensor:
    """Undo `turn`."""
    return (image.flip(-1) if view >= 4 else image).rot90(-(view % 4), (-2, -1))


def result_of_part(
    run: Callable[[Tensor], Tensor],
    read: Callable[[Window], Tensor],
    size: tuple[int, int],
    part: Window,
    field: Field,
    views: int,
    room: int = 0,
) -> Tensor:
    """Return the mean over views of the net's result for a part of an image, [N, K, h, w].

    Args:
        run: the net.
        read: gives a window of the image, [N, C, h, w].
        size: height and width of the image.
        views: the first so many of eight.
        room: pixels that may go through at once; as many views as fit do, at least one.
    """
    batches: dict[tuple[int, ...], list[tuple[int, Window, Tensor]]] = {}
    total: Tensor | None = None
    for view in range(views):
        # Where the part is in the turned image, whose own grid decides what it depends on; and that, turned back.
        height, width = size
        seen = part
        for _ in range(view % 4):
            seen, height, width = seen.turned(width), width, height
        seen = seen.mirrored(width) if view >= 4 else seen
        needed = seen.widened(field, height, width)
        source = needed.mirrored(width) if view >= 4 else needed
        for _ in range(-(view % 4) % 4):
            source, height, width = source.turned(width), width, height
        image = turn(read(source), view)
        batch = batches.setdefault(tuple(image.shape), [])
        batch.append((view, seen.within(needed), image))
        if (len(batch) + 1) * image[:, 0].numel() > room:
            total = _add_results(run, batches.pop(tuple(image.shape)), total)
    for batch in batches.values():
        total = _add_results(run, batch, total)
    assert total is not None
    return total / views if views > 1 else total


def _add_results(
    run: Callable[[Tensor], Tensor], batch: list[tuple[int, Window, Tensor]], total: Tensor | None
) -> Tensor:
    """Run the net on views of one shape, and add what it gives of the part to the total."""
    images = batch[0][2] if len(batch) == 1 else torch.cat([image for _, _, image in batch])
    for (view, inner, _), result in zip(batch, run(images).chunk(len(batch)), strict=True):
        back = turn_back(inner.of(result), view)
        total = back if total is None else total + back
    assert total is not None
    return total
