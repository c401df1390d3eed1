"""The GPU report's measurements where the kernels run: both backends are timed, ours after it was checked."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fastunet.benchmarks import gpu_steps, runs
from fastunet.benchmarks.cases import Settings
from fastunet.benchmarks.gpu_steps import Step
from fastunet.kernels import gpu
from fastunet.kernels.conv3x3 import config, config_search
from kernel_device import DEVICE, INTERPRETED, MARK

pytestmark = MARK
SMALL = Settings(device=DEVICE.type, size=16, batch=2, features=(8, 16), rounds=2, warmup=1, steady_seconds=0.05)


@pytest.fixture(autouse=True)
def one_set_of_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is too slow for a cache to matter."""
    monkeypatch.setattr(runs, "sets_past_cache", lambda *_: 1)


@pytest.mark.parametrize(
    "step",
    [Step("layer", "up1.c1", "backward"), pytest.param(Step("net", "training"), marks=pytest.mark.slow)],
    ids=str,
)
def test_the_kernels_are_timed_beside_others(step: Step) -> None:
    row = gpu_steps.run_step(SMALL, step)
    assert (row["status"], row["why_no_triton"], row["implementation"]) == ("ok", "", "triton"), row["reason"]
    assert row["ratios"]
    if INTERPRETED:
        others = [found["ratio"] for name, found in row["ratios"].items() if not name.startswith("fastunet")]
        assert max(others) < 1, "the interpreter is not the kernel it says it is"


def alter_single_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel with one warp computes is wrong from now on."""
    run = gpu.Launch.run

    def altered(launch: gpu.Launch, device: torch.device) -> None:
        run(launch, device)
        if launch.num_warps == 1:
            for name in ("y_ptr", "y_desc", "y00_desc", "out_ptr", "partial_ptr"):
                result = launch.arguments.get(name)
                if result is not None:
                    getattr(result, "base", result).mul_(1.5)

    monkeypatch.setattr(gpu.Launch, "run", altered)


def test_other_variants_are_timed_if_they_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three variants beside the chosen one: one that is right, one that is wrong, one that does not run."""
    shape = config.ConvShape(8, 0, 8, 16, 16, aligned=False)
    chosen = config.heuristic_conv_config(shape, torch.bfloat16, gpu.INTERPRETER, False)
    changes = {"right": {"block_n": 64}, "wrong": {"num_warps": 1}, "broken": {"block_k": 3}}
    found = {
        chosen.variant: chosen,
        **{name: dataclasses.replace(chosen, **change) for name, change in changes.items()},
    }
    monkeypatch.setattr(config_search, "conv_variants", lambda *_, **__: found)
    alter_single_warps(monkeypatch)
    row = gpu_steps.run_step(SMALL, Step("layer", "inc.c2", "forward"))
    assert (row["status"], row["reason"]) == ("ok", "")
    assert {"fastunet", "fastunet, right variant"} <= set(row["samples_ms"])
    assert not {"fastunet, wrong variant", "fastunet, broken variant"} & set(row["samples_ms"])
    assert row["missing"]["fastunet, wrong variant"].startswith("parity failed")
    assert row["missing"]["fastunet, broken variant"]
