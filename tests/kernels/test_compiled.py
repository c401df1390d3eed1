"""What the compiler makes of kernels, where much depends on it: instructions, registers, programs at a time."""

from __future__ import annotations

import os
import re

import pytest
from fastunet.kernels.conv3x3.config import ConvShape

pytest.importorskip("triton", reason="needs triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from compiled_kernels import Wanted, compiled

CONVOLUTIONS = {80: "conv3x3_kernel", 89: "conv3x3_kernel", 90: "conv3x3_descriptor_kernel"}


def blocks(ptx: str) -> list[str]:
    """The parts of a kernel that run from beginning to end."""
    return re.split(r"^\$L__BB\w+:|^.*\bbra\b.*$", ptx, flags=re.MULTILINE)


@pytest.mark.parametrize("math", ["bfloat16", "float16"])
@pytest.mark.parametrize("capability", CONVOLUTIONS)
def test_statistics_of_a_whole_tile(capability: int, math: str) -> None:
    """Values are rounded two at a time, and no mask comes into the sums."""
    shape = ConvShape(128, 0, 128, 128, 128)
    result, programs = compiled(Wanted("conv3x3_batch_norm_relu", shape, CONVOLUTIONS[capability], capability, math))
    short = {"bfloat16": "bf16", "float16": "f16"}[math]
    values = result.ptx.count(f"cvt.rn.{short}x2.f32")
    assert values >= 32
    assert f"cvt.rn.{short}.f32" not in result.ptx
    squares = [block for block in blocks(result.ptx) if block.count("fma.rn.f32") >= values]
    assert sorted("selp" in block for block in squares) == [False, True]
    # Two programs of eight warps run at a time where tiles are small enough.
    assert programs == (2 if capability < 90 else 1)
