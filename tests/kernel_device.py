"""Where kernel tests run: the same tests on the CPU in Triton's interpreter, and on a GPU.

A module of kernel tests takes `DEVICE` for its tensors and `pytestmark = MARK`. Importing this one skips the module
where neither is to be had. A module that runs whole ops imports `ieee` as well: ops ask torch whether TF32 is allowed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastunet.testing import float32_precision

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
MARK = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

if INTERPRETED:
    from interpreter import repair

    repair()


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element a launcher allocates and no kernel writes shows as NaN. For modules to import."""
    poison(monkeypatch, "empty")


def poison(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """torch's function of that name, which allocates, fills with NaN."""
    empty = getattr(torch, name)

    def poisoned(*arguments: Any, **keywords: Any) -> Tensor:
        fresh = empty(*arguments, **keywords)
        return fresh.fill_(math.nan) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture(autouse=True)
def ieee() -> Iterator[None]:
    """float32 is float32, in torch's operations and ours. For modules to import."""
    with float32_precision("ieee"):
        yield
