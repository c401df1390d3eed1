"""Rewrites of weights against what they replace, in float64, where only rounding may differ."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.cpu import folding


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("affine", [True, False])
def test_folded_batch_norm(affine: bool) -> None:
    x, weight, mean, variance = random(2, 3, 6, 5), random(4, 3, 3, 3), random(4), random(4).square() + 0.1
    gamma, beta = (random(4, seed=1), random(4, seed=2)) if affine else (None, None)
    expected = F.batch_norm(F.conv2d(x, weight, padding=1), mean, variance, gamma, beta, False, 0.0, 1e-3)
    actual = F.conv2d(x, *folding.fold_batch_norm(weight, mean, variance, gamma, beta, 1e-3), padding=1)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("odd", [*itertools.product((0, 1), repeat=2)])
@pytest.mark.parametrize("size", [*itertools.product((1, 2, 5), repeat=2)])
def test_composed_upsampling(size: tuple[int, int], odd: tuple[int, int]) -> None:
    low, up_weight, up_bias, weight = random(2, 5, *size), random(5, 3, 2, 2), random(3), random(4, 3, 3, 3)
    up = F.pad(F.conv_transpose2d(low, up_weight, up_bias, stride=2), [0, odd[1], 0, odd[0]])
    expected = F.conv2d(up, weight, padding=1)
    composed, bias = folding.compose_upsampling(up_weight, weight), folding.upsampled_bias(up_bias, weight)
    actual = F.conv_transpose2d(low, composed, bias[:, 1, 1], stride=2, padding=1, output_padding=odd)
    folding.add_border_(actual, folding.border_of(bias))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
