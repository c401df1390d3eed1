"""Augmentation: images and labels move together, labels keep their values, and torch's seed repeats it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastunet.checks import ConfigError, DtypeError, ShapeError
from fastunet.train.augmentation import BRIGHTNESS, CONTRAST, SCALE, Augmentation, augmentation_of

OFF = dict.fromkeys(("flip", "rotate", "elastic", "affine", "brightness", "contrast", "gamma", "noise", "blur"), 0.0)


def make_batch(batch: int = 6, size: tuple[int, int] = (32, 32), channels: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (batch, *size), generator=generator)
    return torch.randn(batch, channels, *size, generator=generator), labels


def only(**chances: float) -> Augmentation:
    return Augmentation(**{**OFF, **chances})


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_everything_at_once_keeps_shapes_dtypes_and_label_values(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    images, labels = make_batch(size=size)
    labels = labels * 51  # 0, 51, .. 204: any interpolation between labels would show
    new_images, new_labels = Augmentation(**dict.fromkeys(OFF, 1.0))(images, labels)
    assert new_images.shape == images.shape
    assert new_images.dtype == torch.float32
    assert new_images.isfinite().all()
    assert new_labels.shape == labels.shape
    assert new_labels.dtype == torch.int64
    assert set(new_labels.unique().tolist()) <= {0, 51, 102, 153, 204}
    assert not torch.equal(new_labels, labels)
    assert all(torch.equal(*each) for each in zip((images, labels // 51), make_batch(size=size), strict=True))


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("chances", [{"flip": 0.5}, {"rotate": 1.0}, {"flip": 0.5, "rotate": 0.75}])
def test_flips_and_turns_move_image_and_labels_alike_and_exactly(
    chances: dict[str, float], size: tuple[int, int]
) -> None:
    torch.manual_seed(1)
    _, labels = make_batch(batch=16, size=size)
    images, moved = only(**chances)(labels.unsqueeze(1).float(), labels)
    assert torch.equal(images.squeeze(1).long(), moved)
    assert not torch.equal(moved, labels)
    assert torch.equal(moved.flatten(1).sort().values, labels.flatten(1).sort().values)


def test_flips_and_turns_reach_all_eight_positions() -> None:
    torch.manual_seed(2)
    labels = torch.arange(9).reshape(1, 3, 3).repeat(200, 1, 1)
    _, moved = only(flip=0.5, rotate=0.75)(labels.unsqueeze(1).float(), labels)
    assert len(torch.unique(moved.flatten(1), dim=0)) == 8
    _, turned = only(rotate=0.75)(labels.unsqueeze(1).float(), labels)
    assert len(torch.unique(turned.flatten(1), dim=0)) == 4


@pytest.mark.parametrize("axis", [1, 2])
def test_the_warp_moves_image_and_labels_alike(axis: int) -> None:
    torch.manual_seed(3)
    size = (96, 64)
    ramp = torch.arange(size[axis - 1]).reshape((-1, 1) if axis == 1 else (1, -1)).expand(8, *size)
    images, moved = only(elastic=1.0)(ramp.unsqueeze(1).float(), ramp)
    # On a ramp, bilinear gives the source coordinate itself and nearest its rounding. Reflected pixels agree as well.
    assert (images.squeeze(1) - moved).abs().max() <= 0.5 + 1e-4
    shift = (images.squeeze(1) - ramp).abs()
    assert 1 < shift.mean() < 8
    assert (images.squeeze(1).diff(dim=axis) > 0).float().mean() > 0.95  # smooth: order is kept


def test_the_warp_takes_each_image_by_chance_and_by_itself() -> None:
    torch.manual_seed(4)
    labels = torch.arange(64).expand(200, 64, 64).clone()
    images, _ = only(elastic=0.3)(labels.unsqueeze(1).float(), labels)
    changed = (images.squeeze(1) != labels).flatten(1).any(1)
    assert 40 <= changed.sum() <= 80
    assert len(torch.unique(images.flatten(1), dim=0)) == changed.sum() + 1


@pytest.mark.parametrize("largest", [180.0, 15.0])
def test_turns_by_any_angle_and_zooms_move_points_alike(largest: float) -> None:
    """About the centre, by one angle and one zoom an image, within their ranges, labels with it."""
    torch.manual_seed(6)
    side = torch.arange(65.0) - 32
    y, x = side[:, None].expand(65, 65), side.expand(65, 65)
    images = torch.stack([x, y]).repeat(64, 1, 1, 1)
    labels = torch.zeros(64, 65, 65, dtype=torch.int64)
    labels[:, :, 40:] = 7
    augmentation = Augmentation(**OFF | {"affine": 0.5}, largest_angle=largest)
    moved, moved_labels = augmentation(images, labels)
    inner = moved[:, :, 24:41, 24:41]  # what reflection at the edges does not reach
    dx, dy = inner.diff(dim=3).mean((2, 3)), inner.diff(dim=2).mean((2, 3))
    zooms, angles = 1 / dx.norm(dim=1), torch.atan2(dx[:, 1], dx[:, 0]).rad2deg().abs()
    torch.testing.assert_close(dx, torch.stack([dy[:, 1], -dy[:, 0]], 1), rtol=0, atol=1e-4)  # a similarity
    assert inner[:, :, 8, 8].abs().max() < 1e-4
    assert torch.equal(inner[:, 0] > 7.5, moved_labels[:, 24:41, 24:41] == 7)
    turned = angles > 1e-3
    assert 16 < turned.sum() < 48
    assert torch.equal(moved[~turned], images[~turned])
    assert SCALE[0] - 1e-4 <= zooms.min() < 0.8
    assert 1.25 < zooms.max() <= SCALE[1] + 1e-4
    assert 0.8 * largest < angles.max() <= largest + 1e-3


def test_gamma_bends_an_image_and_keeps_its_mean_and_deviation() -> None:
    torch.manual_seed(7)
    images, labels = make_batch(batch=32)
    images = images * 3 - 5
    bent, _ = only(gamma=0.5)(images, labels)
    changed = (bent - images).abs().amax((1, 2, 3)) > 1e-3
    assert 6 <= changed.sum() <= 26
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(bent, (1, 2, 3)), statistic(images, (1, 2, 3)), rtol=1e-4, atol=1e-4)
    order = images[changed].flatten(1).argsort(1)
    assert (bent[changed].flatten(1).gather(1, order).diff(dim=1) >= 0).all()


@pytest.mark.parametrize(
    ("level", "moves", "lights"), [("none", 0, 0), ("light", 1, 0), ("default", 1, 1), ("strong", 1, 1)]
)
def test_a_level_without_flips_keeps_what_is_upright(level: str, moves: int, lights: int) -> None:
    torch.manual_seed(8)
    _, labels = make_batch(batch=16)
    images = labels.unsqueeze(1).float()
    changed, moved = augmentation_of(level, flip=True)(images, labels)
    assert torch.equal(moved, labels) != moves
    assert torch.equal(changed.squeeze(1), moved) != lights
    upright = torch.arange(64).expand(64, 64, 64)  # grows to the right
    _, moved = augmentation_of(level, flip=False)(upright.unsqueeze(1).float(), upright)
    assert (moved[:, 16:48, 40].float().mean(1) > moved[:, 16:48, 24].float().mean(1)).all()


@pytest.mark.parametrize("name", ["brightness", "contrast", "noise", "blur"])
def test_lighting_changes_images_of_any_range_but_no_labels(name: str) -> None:
    torch.manual_seed(5)
    images, labels = make_batch(batch=32)
    images = images * 3 - 5  # far outside 0..1
    new_images, new_labels = only(**{name: 0.5})(images, labels)
    assert torch.equal(new_labels, labels)
    changed = (new_images != images).flatten(1).any(1)
    assert 6 <= changed.sum() <= 26
    if name == "brightness":
        shift = (new_images - images).flatten(1)
        torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=0, atol=1e-5)
        assert 0.5 * BRIGHTNESS < shift.abs().max() <= BRIGHTNESS + 1e-5
    elif name == "contrast":
        factor = (new_images / images).flatten(1)
        torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-5, atol=0)
        assert 0.5 * CONTRAST < (factor - 1).abs().max() <= CONTRAST + 1e-5
    elif name == "noise":
        assert 0.1 < (new_images - images)[changed].std() < 0.2
    else:
        roughness = [x.diff(dim=-1).square().mean((1, 2, 3)) for x in (new_images, images)]
        assert (roughness[0][changed] < roughness[1][changed]).all()


def test_torchs_seed_repeats_it() -> None:
    images, labels = make_batch()
    augmentation = Augmentation()
    results = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        results.append(augmentation(images, labels))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][1], results[2][1])


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["flip", "rotate", "elastic", "all"])
def test_any_float_dtype_gives_itself_under_any_default(name: str, dtype: torch.dtype, default: torch.dtype) -> None:
    images, labels = make_batch()
    chances = dict.fromkeys(OFF if name == "all" else [name], 1.0)
    torch.manual_seed(9)
    expected, expected_labels = only(**chances)(images, labels)
    torch.set_default_dtype(default)
    try:
        torch.manual_seed(9)
        changed, changed_labels = only(**chances)(images.to(dtype), labels)
    finally:
        torch.set_default_dtype(torch.float32)
    assert changed.dtype == dtype
    assert changed_labels.dtype == labels.dtype
    assert torch.equal(changed_labels, expected_labels)
    # Input and output are rounded to dtype; float32 rounds the coordinates, up to 32, between values of +-largest.
    largest = max(images.abs().max().item(), expected.abs().max().item())
    tolerance = largest * (2 * torch.finfo(dtype).eps + 2 * 32 * 2 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(changed.double(), expected.double(), rtol=0, atol=tolerance)


def test_impossible_options_and_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"noise: expected a probability from 0 to 1, got 1\.5"):
        Augmentation(noise=1.5)
    images, labels = make_batch()
    with pytest.raises(ShapeError, match=r"labels: expected shape \(6, 32, 32\) .*got \(6, 1, 32, 32\)"):
        Augmentation()(images, labels.unsqueeze(1))
    with pytest.raises(DtypeError, match=r"images: expected a floating-point dtype, got torch\.int64"):
        Augmentation()(images.long(), labels)
