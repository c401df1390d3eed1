"""Where kernel tests run: the same tests on the CPU in Triton's interpreter, and on a GPU.

A module of kernel tests takes `DEVICE` for its tensors and `pytestmark = MARK`. Importing this one skips the module
where neither is to be had.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from fastunet.kernels import gpu

from fastunet import kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
MARK = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# GPUs whose configurations the interpreter runs: through descriptors, and with sums in many parts.
HOPPER = dataclasses.replace(gpu.known_target(90), multiprocessors=4)
MANY_SPLITS = dataclasses.replace(gpu.INTERPRETER, multiprocessors=64, name="many splits")

if INTERPRETED:
    from interpreter import repair

    repair()


def on(target: gpu.Target | None, kernels: Any = kernels) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a kernels package takes the device for `target`; a GPU stays itself, as for None."""
    if target is None or not INTERPRETED:
        return contextlib.nullcontext()
    return mock.patch.object(kernels.gpu, "target", return_value=target)


def kernel_names(launches: Sequence[gpu.Launch]) -> list[str]:
    """Return the names of the kernels that gpu.recording has seen, in order."""
    return [launch.kernel.fn.__name__ for launch in launches]
