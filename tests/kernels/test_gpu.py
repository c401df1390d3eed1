"""What only a GPU can show: graphs, streams, memory, several devices, TF32."""

from __future__ import annotations

import subprocess
import sys

import gpu_bodies
import pytest
import torch

import fastunet
from fastunet import checks, dispatch, ops
from fastunet.testing import float32_precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("forced"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(dispatch.interpreting(), reason="TRITON_INTERPRET=1 runs the kernels on the CPU"),
]
# Seconds for a process that starts, compiles a few kernels and runs them.
TIMEOUT = 300


@pytest.mark.parametrize("name", gpu_bodies.CUDA_BODIES)
def test_alone(name: str) -> None:
    """In a process of its own: a hang ends with the test, a lost GPU with the process."""
    command = [sys.executable, gpu_bodies.__file__, name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_layer_is_checked_and_measured_at_its_first_use() -> None:
    from fastunet.kernels import autotune, gpu

    options = {"device": "cuda", "dtype": torch.bfloat16}
    x, weight = torch.randn(4, 64, 128, 128, **options), torch.randn(64, 64, 3, 3, **options)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    with fastunet.backend("auto"), torch.no_grad():
        y = fastunet.ops.conv3x3_bias_relu(x, weight)
    rows = autotune.table(gpu.target(x.device).name).values()
    assert {row["op"]: row["failed"] for row in rows if row.get("failed")} == {}
    assert [row["op"] for row in rows if "speedup" in row] == ["conv3x3_bias_relu"]
    assert torch.isfinite(y).all()


def test_the_halo_variant_passes_its_check() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the halo variant is for sm_90")
    from fastunet.testing.families import HALO, check_family

    for dtype in ("bfloat16", "float16"):
        check_family(HALO, dtype, torch.device("cuda"))


def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    results = []
    for device in ("cuda:0", "cuda:1"):
        x, weight = gpu_bodies.make(device, (2, 32, 24, 16), (64, 32, 3, 3))
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        y = ops.conv3x3_bias_relu(*leaves)
        assert torch.cuda.current_device() == 0
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        pytest.skip("needs two GPUs of one kind")
    for a, b in zip(*results, strict=True):
        assert b.device.index == 1
        assert torch.equal(a.cpu(), b.cpu())


def test_mixed_devices_raise_before_any_launch() -> None:
    from fastunet.kernels import gpu

    x, weight, bias = gpu_bodies.make("cuda", (1, 4, 8, 8), (4, 4, 3, 3), (4,))
    for op, arguments, message in (
        (ops.conv3x3_bias_relu, (x, weight.cpu(), bias), "weight: expected device cuda:0"),
        (ops.conv3x3_bias_relu, (x, weight, bias.cpu()), "bias: expected device cuda:0"),
        (ops.concat_conv3x3_bias_relu, (x.cpu(), x, weight.cpu()), "up: expected device cpu"),
        (ops.conv3x3_instance_norm_relu, (x, weight, bias.cpu(), bias), "gamma: expected device cuda:0"),
        (ops.segmentation_sums, (x, x.cpu()), "target: expected device cuda:0"),
    ):
        with gpu.recording() as launches, pytest.raises(checks.DeviceError, match=message):
            op(*arguments)
        assert launches == []


@pytest.mark.parametrize("channels", [3, 16], ids=["folded", "by tap"])
def test_tf32_exactly_where_torch_allows_it(channels: int) -> None:
    """1 + 2^-12 needs more bits than TF32 has; float32 keeps it in every result."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a GPU with TF32, of compute capability 8.0 or newer")
    value = 1 + 2.0**-12
    identity = torch.zeros(channels, channels, 3, 3, device="cuda")
    identity[:, :, 1, 1] = torch.eye(channels, device="cuda")
    for precision, expected in (("ieee", value), ("tf32", 1.0)):
        x = torch.full((1, channels, 1, 1), value, device="cuda", requires_grad=True)
        weight = identity.clone().requires_grad_()
        with float32_precision(precision):
            assert dispatch.tf32_allowed() == (precision == "tf32")
            y = ops.conv3x3_bias_relu(x, weight)
            grad_x, grad_weight = torch.autograd.grad(y, (x, weight), torch.full_like(y, value))
        assert y.unique().tolist() == [expected]
        assert grad_x.unique().tolist() == [expected]
        centre = grad_weight[:, :, 1, 1].unique().tolist()
        assert centre == [1.0 if precision == "tf32" else torch.tensor(value).square().item()]
