"""Connected components and the border weights of the paper, against their definitions."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage
import skimage.measure
import torch
from torch import Tensor

from fastunet.checks import ConfigError, ShapeError
from fastunet.data import morphology
from fastunet.data.morphology import border_weights, connected_components, split_objects


def scattered(seed: int, height: int = 40, width: int = 52, classes: int = 2) -> Tensor:
    """Blobs of several classes, some of which touch."""
    noise = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 5, 1, 2)[0, 0]
    return (smooth > 0.55).long() * (1 + (torch.arange(width) * classes // width)).clamp(max=classes)


def by_definition(labels: Tensor, strength: float, sigma: float) -> Tensor:
    """Equation 2 of the paper, from the distances of every pixel to every pixel of every object."""
    weights = torch.zeros(labels.shape, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(*map(torch.arange, labels.shape), indexing="ij"), -1).reshape(-1, 2).double()
    objects = []
    for label in set(labels.unique().tolist()) - {0}:
        numbers, count = scipy.ndimage.label((labels == label).numpy(), np.ones((3, 3)))
        objects += [torch.from_numpy(numbers == number) for number in range(1, count + 1)]
    if len(objects) > 1:
        each = [torch.cdist(grid, grid[one.flatten()]).amin(1).reshape(labels.shape) for one in objects]
        d1, d2 = torch.stack(each).sort(0).values[:2]
        weights = strength * torch.exp(-((d1 + d2) ** 2) / (2 * sigma**2))
    return weights * (labels == 0)


@pytest.mark.parametrize(("strength", "sigma"), [(10.0, 5.0), (3.0, 1.5)])
@pytest.mark.parametrize("seed", range(3))
def test_border_weights_are_the_papers(seed: int, strength: float, sigma: float) -> None:
    labels = torch.stack([scattered(seed), scattered(seed + 10, classes=1)])
    expected = torch.stack([by_definition(each, strength, sigma) for each in labels])
    assert expected.max() > 0.5
    result = border_weights(labels, strength=strength, sigma=sigma)
    assert result.dtype == torch.float32
    # What lies beyond the reach of a Gaussian, and float32.
    assert (result - expected).abs().max() < strength * 1e-7


@pytest.mark.parametrize("objects", [0, 1])
def test_without_two_objects_nothing_lies_between(objects: int) -> None:
    labels = torch.zeros(1, 16, 16, dtype=torch.long)
    labels[0, :objects, :3] = 1
    assert not border_weights(labels).any()


@pytest.mark.parametrize("seed", range(3))
def test_components_are_scikit_images(seed: int) -> None:
    labels = scattered(seed, classes=3)
    numbers, count = connected_components(labels)
    expected = skimage.measure.label(labels.numpy())
    assert count == expected.max()
    assert len(set(zip(numbers.flatten().tolist(), expected.flatten().tolist(), strict=True))) == count + 1


def test_two_discs_that_touch_are_split() -> None:
    y, x = torch.meshgrid(torch.arange(40), torch.arange(60), indexing="ij")
    discs = [(y - 20) ** 2 + (x - middle) ** 2 < 12**2 for middle in (11, 33)]  # the first reaches beyond the edge
    labels = (discs[0] | discs[1]).long()
    assert connected_components(labels)[1] == 1
    objects, count = split_objects(labels)
    assert count == 2
    assert torch.equal(objects > 0, labels > 0)
    for disc in discs:
        number = objects[disc].mode().values
        assert ((objects == number) & disc).sum() > 0.97 * disc.sum()
    assert split_objects(torch.zeros(3, 4))[1] == 0


def test_what_hangs_on_by_a_corner_is_part_of_an_object() -> None:
    labels = torch.zeros(20, 20, dtype=torch.long)
    labels[2:11, 2:11] = 1
    for i in range(11, 18):
        labels[i, i] = 1
    objects, count = split_objects(labels)
    assert count == 1
    assert torch.equal(objects > 0, labels > 0)


def test_touching_by_a_corner_is_connected() -> None:
    numbers, count = connected_components(torch.tensor([[1, 0, 0], [0, 1, 5], [0, 0, 0], [1, 1, 0]]))
    assert (numbers.tolist(), count) == ([[1, 0, 0], [0, 1, 3], [0, 0, 0], [2, 2, 0]], 3)
    assert numbers.dtype == torch.int32


def test_bad_arguments() -> None:
    with pytest.raises(ShapeError, match=r"expected \[H, W\], got \[1, 2, 3\]"):
        connected_components(torch.zeros(1, 2, 3))
    with pytest.raises(ShapeError, match=r"expected labels \[N, H, W\], got \[2, 3\]"):
        border_weights(torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="expected sigma > 0 and strength >= 0, got 0 and 10"):
        border_weights(torch.zeros(1, 2, 3), sigma=0)


def test_on_a_gpu_arrays_stay_there_where_cupy_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy is feigned by NumPy, and the device by a tensor of the CPU."""
    calls = []

    def noted(name: str) -> object:
        return lambda *args, **kwargs: calls.append(name) or getattr(scipy.ndimage, name)(*args, **kwargs)

    cupy, cupyx, on_gpu = ModuleType("cupy"), ModuleType("cupyx"), ModuleType("cupyx.scipy")
    for name in ("full", "minimum", "maximum", "zeros", "where", "asarray"):
        setattr(cupy, name, getattr(np, name))
    cupy.from_dlpack = np.from_dlpack  # type: ignore[attr-defined]
    functions = ("label", "distance_transform_edt")
    on_gpu.ndimage = SimpleNamespace(**{name: noted(name) for name in functions})  # type: ignore[attr-defined]
    labels = torch.stack([scattered(0)])
    expected, numbers = border_weights(labels), connected_components(labels[0])[0]
    for name, module in (("cupy", cupy), ("cupyx", cupyx), ("cupyx.scipy", on_gpu)):
        monkeypatch.setitem(sys.modules, name, module)
    arrays = morphology._arrays
    monkeypatch.setattr(morphology, "_arrays", lambda device: arrays(torch.device("cuda", 0)))
    assert torch.equal(border_weights(labels), expected)
    assert torch.equal(connected_components(labels[0])[0], numbers)
    assert set(calls) == set(functions)
