"""Weights of small U-Nets for tests of files."""

from __future__ import annotations

import torch
from torch import Tensor

from fastunet import UNet

SMALL = (4, 8, 16)


def bits(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def assert_identical(loaded: UNet, model: UNet) -> None:
    assert loaded.config == model.config
    expected, actual = model.state_dict(), loaded.state_dict()
    assert list(actual) == list(expected)
    for name, t in expected.items():
        assert actual[name].dtype == t.dtype, name
        assert actual[name].shape == t.shape, name
        assert torch.equal(bits(actual[name]), bits(t)), name
