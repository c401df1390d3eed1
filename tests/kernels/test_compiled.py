"""What the compiler makes of kernels, where much depends on it: instructions, registers, programs at a time."""

from __future__ import annotations

import os
import re

import pytest
from fastunet.kernels.conv3x3.config import ConvShape

pytest.importorskip("triton", reason="needs triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from compiled_kernels import compiled

CONVOLUTIONS = {80: "conv3x3_kernel", 89: "conv3x3_kernel", 90: "conv3x3_descriptor_kernel"}


def blocks(ptx: str) -> list[str]:
    """The parts of a kernel that run from beginning to end."""
    return re.split(r"^\$L__BB\w+:|^.*\bbra\b.*$", ptx, flags=re.MULTILINE)


@pytest.mark.parametrize("math", ["bfloat16", "float16"])
@pytest.mark.parametrize("capability", CONVOLUTIONS)
def test_statistics_of_a_whole_tile(capability: int, math: str) -> None:
    """Values are rounded two at a time, and no mask comes into the sums."""
    shape = ConvShape(128, 0, 128, 128, 128)
    result, programs = compiled("conv3x3_batch_norm_relu", shape, CONVOLUTIONS[capability], capability, math)
    short = {"bfloat16": "bf16", "float16": "f16"}[math]
    values = result.ptx.count(f"cvt.rn.{short}x2.f32")
    assert values >= 32
    assert f"cvt.rn.{short}.f32" not in result.ptx
    squares = [block for block in blocks(result.ptx) if block.count("fma.rn.f32") >= values]
    assert sorted("selp" in block for block in squares) == [False, True]
    # Two programs of eight warps run at a time where tiles are small enough.
    assert programs == (2 if capability < 90 else 1)


@pytest.mark.parametrize("channels", [64, 100, 17])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["norm_sums_kernel", "norm_grad_kernel"])
def test_five_programs_of_a_norm_gradient_at_a_time(kernel: str, capability: int, channels: int) -> None:
    shape = ConvShape(16, 0, channels, 128, 128)
    result, programs = compiled("conv3x3_batch_norm_relu_pool", shape, kernel, capability)
    assert programs >= 5
    assert result.spill_bytes == 0


@pytest.mark.parametrize(("channels", "vector"), [(4, "v2.b32"), (24, "v4.b32"), (100, "v2.b32")])
@pytest.mark.parametrize("op", ["max_pool2x2", "conv3x3_batch_norm_relu_pool"])
def test_rows_of_channels_that_are_no_multiple_of_16_load_as_vectors(op: str, channels: int, vector: str) -> None:
    shape = ConvShape(channels, 0, channels, 128, 128)
    kernel = "max_pool2x2_kernel" if op == "max_pool2x2" else "normalise_kernel"
    result, _ = compiled(op, shape, kernel, 80)
    loads = [line for line in result.ptx.splitlines() if "ld.global" in line]
    assert sum(vector in line for line in loads) >= 4
    assert not any(".b16" in line for line in loads)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("op", ["conv3x3_bias_relu", "conv3x3_batch_norm_relu"])
def test_the_loop_of_a_weight_gradient_divides_nothing(op: str, capability: int) -> None:
    """A tile's origin follows from the one before."""
    kernel = CONVOLUTIONS[capability].replace("conv3x3", "conv3x3_weight_grad")
    result, _ = compiled(op, ConvShape(64, 0, 64, 128, 128), kernel, capability)
    products = [block for block in blocks(result.ptx) if "mma" in block]
    assert products
    assert not any(re.search(r"\b(div|rem)\.[su]", block) for block in products)


@pytest.mark.parametrize("capability", [90, 100])
def test_sums_of_a_bias_leave_room_for_a_second_program(capability: int) -> None:
    kernel = "conv3x3_weight_grad_descriptor_kernel"
    result, programs = compiled("conv3x3_bias_relu", ConvShape(128, 0, 128, 128, 128), kernel, capability)
    assert programs == 2
    assert result.spill_bytes == 0
    assert result.products["wgmma" if capability < 100 else "tcgen05"]
    assert result.register_operands == 0


@pytest.mark.parametrize(("capability", "channels"), [(80, 24), (90, 72)])
@pytest.mark.parametrize(
    ("op", "kernel"),
    [
        *(("conv3x3_batch_norm_relu", f"conv3x3_{of}kernel") for of in ("", "input_grad_", "weight_grad_")),
        *(("conv_transpose2x2", f"conv_transpose2x2_{of}kernel") for of in ("", "input_grad_")),
        ("conv_transpose2x2", "pixel_weight_grad_kernel"),
    ],
)
def test_multiples_of_8_channels_load_as_vectors(op: str, kernel: str, capability: int, channels: int) -> None:
    shape = ConvShape(channels, 0, channels, 128, 128)
    result, _ = compiled(op, shape, kernel, capability)
    assert "cp.async.cg.shared.global" in result.ptx
    assert not re.search(r"(ld|st)\.global\S*\.b16", result.ptx)
    assert result.spill_bytes == 0


@pytest.mark.parametrize("kernel", ["conv1x1_kernel", "conv1x1_input_grad_kernel", "pixel_weight_grad_kernel"])
@pytest.mark.parametrize(("capability", "channels"), [(80, 24), (90, 72)])
def test_a_head_loads_multiples_of_8_channels_as_vectors_whatever_its_classes(
    capability: int, channels: int, kernel: str
) -> None:
    shape = ConvShape(channels, 0, 3, 128, 128)
    result, _ = compiled("conv1x1", shape, kernel, capability)
    assert re.search(r"(cp\.async\.cg\.shared\.global|[ls][dt]\.global\S*\.v4\.b32)", result.ptx)
    assert result.spill_bytes == 0
