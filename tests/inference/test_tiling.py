"""Tiles: of a net of local layers they give what the whole image gives; of any other they are blended."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import fastunet
from fastunet.checks import ConfigError
from fastunet.inference import tiling
from fastunet.inference.tiling import Field, Window, field_of, parts_of, result_of_part


def unet(depth: int = 2, **options: object) -> fastunet.UNet:
    """A net in float64, in which rounding hides nothing, and whose results depend on all they can see."""
    torch.manual_seed(depth)
    model = fastunet.UNet(1, 2, features=tuple(2 + i for i in range(depth + 1)), **options).double().eval()
    for name, t in model.state_dict().items():
        if t.is_floating_point():
            t.copy_(torch.rand_like(t) + 0.5 if name.endswith(("var", "weight")) and t.dim() == 1 else t)
    return model


def exchanged(model: fastunet.UNet, **parts: nn.Module) -> fastunet.UNet:
    for name, part in parts.items():
        owner, _, last = name.replace("__", ".").rpartition(".")
        setattr(model.get_submodule(owner), last, part)
    return model


dilated = nn.Conv2d(2, 2, 3, padding=4, dilation=4, bias=False).double()
wide = nn.Conv2d(2, 3, (1, 7), padding="same", bias=False).double()


def far(reach: int) -> nn.Module:
    """A convolution that sees so many pixels on each side."""
    return nn.Conv2d(2, 2, 3, padding="same", dilation=reach).double()


LOCAL: dict[str, Callable[[], nn.Module]] = {
    "depth 1": lambda: unet(1),
    "depth 3": lambda: unet(3),
    "no norm": lambda: unet(norm=None, activation="leaky_relu", head="softmax"),
    "reference": lambda: unet().to_reference(),
    "wrapped": lambda: nn.Sequential(AveragedModel(nn.DataParallel(unet())), nn.Softmax2d()),
    "compiled": lambda: torch.compile(unet(), backend="eager"),
    "mean pooling": lambda: exchanged(unet(), down1__maxpool_conv__0=nn.AvgPool2d(2)),
    "dilated above": lambda: exchanged(unet(), up2__conv__double_conv__3=dilated),
    "wide below": lambda: exchanged(unet(), down1__maxpool_conv__1__double_conv__0=wide),
    "a wide head": lambda: exchanged(unet(), outc__conv=far(9)),
    "after the upsampling": lambda: exchanged(unet(), up2__up=nn.Sequential(unet().up2.up, far(9))),
    "before the pooling": lambda: exchanged(unet(), down1__maxpool_conv__0=nn.Sequential(far(9), nn.MaxPool2d(2))),
    "a layer that runs twice": lambda: exchanged(unet(), inc=nn.Sequential(unet().inc, *[far(5)] * 2)),
    "pruned": lambda: prune.l1_unstructured((m := unet()).inc.double_conv[0], "weight", 0.5) and m,
}


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("name", LOCAL)
def test_tiles_give_what_the_whole_image_gives(name: str, tta: bool) -> None:
    model = LOCAL[name]()
    field = field_of(model)
    assert field is not None
    image = torch.randn(2, 1, 3 * field.halo + 33, 2 * field.halo + 47, dtype=torch.float64)
    tile = 2 * field.halo + 24
    whole = fastunet.predict(model, image, tta=tta)
    tiled = fastunet.predict(model, image, tile=tile, tta=tta)
    assert (tiled - whole).abs().max() <= 2e-7, "predict gives float32"


def test_views_go_through_together_as_far_as_a_tile_has_room() -> None:
    model, shapes = unet(), []
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    image = torch.randn(1, 1, 20, 30, dtype=torch.float64)
    together = fastunet.predict(model, image, tta=True, tile=60)
    assert shapes == [(4, 1, 20, 30), (4, 1, 30, 20)]
    shapes.clear()
    assert (fastunet.predict(model, image, tta=True) - together).abs().max() <= 2e-7
    assert [len(shape) for shape in shapes] == [4] * 8


def test_tiles_of_a_quantised_net() -> None:
    model = fastunet.quantize(unet().float(), torch.randn(1, 1, 64, 64))
    image = torch.randn(1, 1, 90, 90)
    tiled, whole = fastunet.predict(model, image, tile=72), fastunet.predict(model, image)
    # Where sums differ by rounding, a value may be the next of 8 bits.
    assert (tiled - whole).abs().mean() < 1e-4


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_smaller_halo_would_not_do(depth: int) -> None:
    """The halo is what the net needs, rounded up to where a part may begin."""
    model = unet(depth, norm=None)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)  # nothing cancels
    halo, multiple = tiling.field_of(model) or pytest.fail("expected a field")
    image = torch.rand(1, 1, 8 * halo, 64, dtype=torch.float64)
    part = Window(4 * halo, 4 * halo + multiple, 0, 64)
    with torch.no_grad():
        whole = part.of(model(image))
        for less in (0, multiple):
            result = result_of_part(model, lambda w: w.of(image), (8 * halo, 64), part, Field(halo - less, multiple), 1)
            assert torch.allclose(result, whole, rtol=1e-12, atol=0) == (less == 0)


class Own(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - x.mean())


def hooked(change: Callable[[nn.Module], object], model: nn.Module | None = None) -> nn.Module:
    change(model := model or unet())
    return model


def less_its_mean(module: nn.Module, args: tuple[Tensor], *result: Tensor) -> Tensor:
    (x,) = result or args
    return x - x.mean()


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean())


class GlobalAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True)


BATCH_STATISTICS = nn.BatchNorm2d(2, track_running_stats=False)
POOL = nn.MaxPool2d(2)
CIRCULAR = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")
NOT_LOCAL: dict[str, Callable[[], nn.Module]] = {
    "instance norm": lambda: unet(norm="instance"),
    "bilinear": lambda: unet(upsample="bilinear"),
    "statistics of the batch": lambda: exchanged(unet(), inc__double_conv__1=BATCH_STATISTICS),
    "a part of another kind": lambda: exchanged(unet(), inc__double_conv__2=GlobalAttention()),
    "group norm": lambda: exchanged(unet(), inc__double_conv__1=nn.GroupNorm(1, 2)),
    "circular padding": lambda: exchanged(unet(), inc__double_conv__0=CIRCULAR),
    "valid padding": lambda: exchanged(unet(), inc__double_conv__0=nn.Conv2d(1, 2, 3)),
    "pooling by 3": lambda: exchanged(unet(), down1__maxpool_conv__0=nn.MaxPool2d(3, 2, 1)),
    "dilated pooling": lambda: exchanged(unet(), down1__maxpool_conv__0=nn.MaxPool2d(2, dilation=2)),
    "pooling twice": lambda: exchanged(unet(), down1__maxpool_conv__0=nn.Sequential(POOL, POOL)),
    "no pooling": lambda: exchanged(unet(), down1__maxpool_conv__0=nn.Identity()),
    "pooling at the image": lambda: exchanged(unet(), inc=nn.Sequential(unet().inc, POOL)),
    "a result twice as large": lambda: exchanged(unet(), outc__conv=nn.ConvTranspose2d(2, 2, 2, 2)),
    "a hook": lambda: hooked(lambda m: m.down1.register_forward_hook(less_its_mean)),
    "a hook before it": lambda: hooked(lambda m: m.register_forward_pre_hook(less_its_mean)),
    "a hook around it": lambda: hooked(
        lambda m: m.register_forward_pre_hook(less_its_mean), nn.Sequential(unet(), nn.Softmax2d())
    ),
    "a patched convolution": lambda: hooked(
        lambda m: setattr(m.inc.double_conv[0], "_conv_forward", lambda x, *_: x - x.mean())
    ),
    "a norm of a subclass": lambda: exchanged(unet(), inc__double_conv__1=OwnNorm(2)),
    "code around it": lambda: Own(unet()),
    "code in it": lambda: setattr(m := unet(), "forward", lambda x: x) or m,
    "another net": lambda: nn.Conv2d(1, 1, 3, padding=1),
}


@pytest.mark.parametrize("name", NOT_LOCAL)
def test_what_may_depend_on_the_whole_image_is_blended(name: str) -> None:
    assert field_of(NOT_LOCAL[name]()) is None


@pytest.mark.parametrize(("height", "width"), [(1000, 77), (200, 203), (97, 5000)])
def test_parts_cover_the_image_once_and_fit_their_tiles(height: int, width: int) -> None:
    field, tile = Field(24, 8), 100
    seen = torch.zeros(height, width, dtype=torch.int)
    for part in parts_of(height, width, tile, field):
        part.of(seen).add_(1)
        needed = part.widened(field, height, width)
        assert max(needed.bottom - needed.top, needed.right - needed.left) <= tile
    assert (seen == 1).all()


def test_a_tile_without_room_is_refused() -> None:
    model = unet(3)
    with pytest.raises(ConfigError, match=r"tile: expected at least 104 pixels, for the 48 on each side .* got 103"):
        fastunet.predict(model, torch.zeros(1, 1, 200, 8, dtype=torch.float64), tile=103)
    assert fastunet.predict(model, torch.zeros(1, 1, 99, 8, dtype=torch.float64), tile=103).shape == (1, 2, 99, 8)
