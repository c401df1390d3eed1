"""Where kernel tests run: the same tests on the CPU in Triton's interpreter, and on a GPU.

A module of kernel tests takes `DEVICE` for its tensors and `pytestmark = MARK`. Importing this one skips the module
where neither is to be had.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
MARK = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

if INTERPRETED:
    from interpreter import repair

    repair()
