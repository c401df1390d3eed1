"""The instance norm's gradient on ATen: image by image where that is faster, all at once elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.ops import conv3x3_aten, conv3x3_instance_norm_relu


class Recorded:
    """torch.ops.aten, and what of it is asked for."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __getattr__(self, name: str) -> Any:
        self.names.append(name)
        return getattr(torch.ops.aten, name)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("n", "size", "last"), [(1, 64, True), (3, 64, True), (3, 8, True), (3, 64, False)])
def test_the_gradient_is_torchs(n: int, size: int, last: bool, affine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    monkeypatch.setattr(conv3x3_aten, "aten", Recorded(used))
    torch.manual_seed(0)
    format = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(n, 3, size, size, dtype=torch.float64).contiguous(memory_format=format)
    weight = torch.randn(8, 3, 3, 3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, *(torch.randn(8, dtype=torch.float64) for _ in range(2)))]
    leaves = leaves if affine else leaves[:2]

    def plain(x: Tensor, weight: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
        return F.relu(F.instance_norm(F.conv2d(x, weight, padding=1), weight=gamma, bias=beta))

    y = conv3x3_instance_norm_relu(*leaves) if affine else conv3x3_instance_norm_relu(*leaves, None, None)
    cotangent = torch.randn_like(y)
    actual = torch.autograd.grad(y, leaves, cotangent)
    expected = torch.autograd.grad(plain(*leaves), leaves, cotangent)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert used.count("native_batch_norm_backward") == (n if last and size == 64 else 0)
