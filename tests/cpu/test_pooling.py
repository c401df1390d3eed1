"""Max-pooling by rows and columns equals torch's, whatever the values and the size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastunet.cpu import pooling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(64, 64), (65, 63), (3, 2049)])
def test_pooling_is_torchs_to_the_bit(
    dtype: torch.dtype, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 24, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0, 0, 1], x[0, 1, 1, 0], x[1, 2, 1, 1], x[1, 3, :2, :2] = torch.nan, torch.inf, -torch.inf, -torch.inf
    x = x.to(memory_format=torch.channels_last)
    monkeypatch.setattr(pooling, "_MANY_VALUES", 0)
    pooled, expected = pooling.max_pool2x2(x), F.max_pool2d(x, 2)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=0, equal_nan=True)
    assert pooled.stride() == expected.stride()
