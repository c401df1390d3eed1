"""The check and the measuring of real kernels: from an op's first call to its choice, and what a wrong kernel meets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fastunet.kernels import autotune, gpu, self_test
from kernel_device import DEVICE, HOPPER, INTERPRETED, MARK, on

import fastunet
from fastunet import dispatch, measuring
from fastunet.testing import families

pytestmark = MARK


SIZE = (1, 16, 6, 5, 16)


@pytest.fixture
def make_wrong(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Have an output of a kernel be off by a factor from then on."""
    run = gpu.Launch.run

    def make(kernel: str, output: str) -> None:
        def altered(launch: gpu.Launch, device: torch.device) -> None:
            run(launch, device)
            if kernel in launch.kernel.__name__:
                launch.arguments[output].mul_(1.5)

        monkeypatch.setattr(gpu.Launch, "run", altered)

    return make


def test_the_check_finds_a_wrong_kernel_and_no_other(make_wrong: Callable[[str, str], None]) -> None:
    make_wrong("max_pool", "y_ptr")
    families.check_family("conv1x1", "float32", DEVICE, SIZE)
    with pytest.raises(AssertionError, match="max_pool2x2: y: "):
        families.check_family("max_pool2x2", "float32", DEVICE, SIZE)


@pytest.mark.parametrize("family", dispatch.STRIDED_OPS)
def test_by_stride_2_an_op_is_checked_for_itself(family: str, make_wrong: Callable[[str, str], None]) -> None:
    """On every kernel of its own; one that is wrong takes nothing away from stride 1."""
    with gpu.recording() as launches:
        families.check_family(family, "float32", DEVICE, SIZE)
    strided = {launch.kernel.__name__ for launch in launches if launch.arguments.get("STRIDE") == 2}
    assert strided == {"conv3x3_kernel", "conv3x3_weight_grad_kernel"}
    make_wrong("strided_input_grad", "out_ptr")
    with pytest.raises(AssertionError, match=r"grad (x|skip): "):
        families.check_family(family, "float32", DEVICE, SIZE)
    families.check_family(family.removesuffix(autotune.STRIDE2), "float32", DEVICE, SIZE)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs e4m3 by compiled kernels alone")
def test_the_checks_of_the_variants_for_hopper_pass() -> None:
    with on(HOPPER):
        families.check_fp8(torch.float16, DEVICE, 9, 10)


@pytest.mark.parametrize(("training", "c_up"), [(False, 0), pytest.param(True, 0, marks=pytest.mark.slow), (True, 3)])
def test_an_op_measures_its_kernels_and_runs_what_won(
    training: bool, c_up: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launches ask by the shape that was measured, forward and backward; a second configuration is tried. Of two
    inputs, with few channels and with many, the weight gradients have variants of their own.
    """
    monkeypatch.setattr(self_test, "check", lambda families, *_: dict.fromkeys(families, ""))
    monkeypatch.setattr(measuring, "_ROUNDS", 1)
    monkeypatch.setattr(measuring, "sets_past_cache", lambda *_: 1)
    monkeypatch.setattr(measuring, "process_budget", measuring.Budget(1e9))
    monkeypatch.setattr(dispatch, "is_to_measure", lambda choice, _: choice.unmeasured is not None)
    monkeypatch.setattr(dispatch, "ONEDNN_OPS", ())  # A CPU's own choice in inference.
    samples = measuring.interleaved_samples
    monkeypatch.setattr(measuring, "interleaved_samples", lambda *a, **k: samples(*a, **{**k, "warmup": 0}))
    name, dtype = gpu.target(DEVICE).name, autotune.format_of(torch.float32, dispatch.tf32_allowed())
    op = "conv3x3_batch_norm_relu" if training else "conv3x3_bias_relu"
    autotune.put(name, [{"op": op, "dtype": dtype, "shape": {}, "failed": ""}], keep=False)
    x, weight = torch.randn(2, 8, 4, 6, device=DEVICE), torch.randn(16, 8 + c_up, 3, 3, device=DEVICE)
    up = torch.randn(2, c_up, 4, 6, device=DEVICE)
    weight.requires_grad_(training)

    def call() -> None:
        if training:
            given = weight, None, None, None, None
            if c_up:
                y = fastunet.ops.concat_conv3x3_batch_norm_relu(x, up, *given, training=True)
            else:
                y = fastunet.ops.conv3x3_batch_norm_relu(x, *given, training=True)
            y.backward(torch.randn_like(y))
        else:
            fastunet.ops.conv3x3_bias_relu(x, weight)

    with fastunet.backend("auto"):
        call()
        (row,) = (row for row in autotune.table(name).values() if "speedup" in row)
        assert row["shape"] == {"c_in": 8 + c_up, "c_out": 16, "height": 4, "width": 6, "training": training}
        configs = {each["op"] for each in autotune.table(name).values() if "config" in each}
        assert configs == ({"conv3x3", "conv3x3_weight_grad"} if training else {"conv3x3"})
        for speedup, launches in ((2.0, 3 if training else 1), (0.5, 0)):
            autotune.put(name, [row | {"speedup": speedup}])
            with gpu.recording() as recorded:
                call()
            assert len(recorded) >= launches if launches else not recorded
