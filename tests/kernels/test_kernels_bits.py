"""What must not change a bit: another run, the batch an image is in, the order of channels, a power of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastunet.kernels import conv1x1, conv_transpose2x2, gpu, norm, norm_grad, segmentation_loss
from fastunet.kernels.conv3x3 import grad, pointer
from fastunet.kernels.pixel_weight_grad import pixel_weight_grad
from kernel_calls import CALLS, CHANNELS, image, outputs, target, weight
from kernel_device import DEVICE, HOPPER, INTERPRETED, MANY_SPLITS, MARK, on
from torch import Tensor

from fastunet.testing import random_input

pytestmark = [MARK, pytest.mark.usefixtures("nan_in_fresh_memory")]
SIDE, RUNS = (12, 2) if INTERPRETED else (96, 100)
LOSS = {"softmax": True, "squared": False}


def per_channel(n: int = 1, side: int = SIDE) -> Tensor:
    return random_input((n, CHANNELS), seed=3, device=DEVICE).abs() + 0.1


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return norm.finish_statistics(pointer.conv3x3_with_statistics(x, weight())[1], len(x), eps=1e-5)


def instance_norm_grad(x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    affine = norm.Affine(mean, invstd, None, None)
    return norm_grad.norm_grad(x, x.flip(1), None, affine, 0.0, statistics_given=False)[0]


def large(make: Callable[[int, int], Tensor]) -> Callable[[int, int], Tensor]:
    """Of pixels enough for a loss to sum them in parts."""
    return lambda n, side: make(n, 2 * side)


def loss_sums(x: Tensor, t: Tensor) -> Tensor:
    return segmentation_loss.segmentation_sums(x, t, None, entropy=True, **LOSS).movedim(1, 0)


# Sums over the pixels of each image; of what makes them likewise.
SUMS = {
    "statistics": (statistics, (image,)),
    "instance_norm_grad": (instance_norm_grad, (image, per_channel, per_channel)),
    "loss_sums": (loss_sums, (large(image), large(target))),
}


@pytest.mark.parametrize("device", [None, HOPPER])
@pytest.mark.parametrize("call", [*CALLS, *SUMS])
def test_of_an_image_in_any_batch(call: str, device: gpu.Target | None) -> None:
    function, inputs = (CALLS | SUMS)[call]
    images = [make(3, SIDE) for make in inputs]

    def run(some: list[int]) -> list[Tensor]:
        result = function(*(t[some] for t in images))
        return outputs(result) if call in CALLS else [*result] if isinstance(result, tuple) else [result]

    with on(device):
        together = run([0, 1, 2])
        for some in (*[[0, 1, 2]] * (RUNS - 1), [2, 0, 1], [1]):
            for a, b in zip(run(some), together, strict=True):
                assert torch.equal(a, b[some])


@pytest.mark.parametrize(
    "function",
    [
        lambda g, x: grad.conv3x3_weight_grad(g, x, with_bias=True),
        lambda g, x: pixel_weight_grad(g, x, x, activation="softmax", with_bias=True),
        lambda g, x: pixel_weight_grad(g, x[..., ::2, ::2], with_bias=True),
    ],
    ids=["conv3x3", "conv1x1", "transpose"],
)
@pytest.mark.parametrize("device", [None, HOPPER, MANY_SPLITS], ids=str)
def test_of_a_weight_gradient(function: Callable[..., tuple[Tensor, Tensor]], device: gpu.Target | None) -> None:
    g, x = image(3, SIDE), image(3, SIDE, seed=1)
    with on(device):
        expected = function(g, x)
        for _ in range(RUNS - 1):
            assert all(map(torch.equal, function(g, x), expected))


@pytest.mark.parametrize(
    ("function", "size", "axis"),
    [
        (lambda *given: pointer.conv3x3(*given, negative_slope=0.0)[0], 3, 0),
        (conv_transpose2x2.conv_transpose2x2, 2, 1),
        (conv1x1.conv1x1, 1, 0),
    ],
    ids=["conv3x3", "transpose", "conv1x1"],
)
@pytest.mark.parametrize("device", [None, HOPPER])
def test_of_channels_in_another_order_and_of_powers_of_two(
    function: Any, size: int, axis: int, device: gpu.Target | None
) -> None:
    x, order = image(2, SIDE), torch.randperm(40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    w = torch.cat([weight(size)] * 3, axis).narrow(axis, 0, 40)
    bias = random_input((40,), dtype=x.dtype, seed=4, device=DEVICE)
    with on(device):
        y = function(x, w, bias)
        assert torch.equal(function(x, w.index_select(axis, order), bias[order]), y[:, order])
        assert torch.equal(function(x * 4, w / 2, bias * 2), y * 2)
