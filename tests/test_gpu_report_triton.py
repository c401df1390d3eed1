"""The GPU report's measurements where the kernels run: both backends are timed, ours after it was checked."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fastunet.benchmarks import measure, parity, search
from fastunet.benchmarks.steps import Settings, Step
from fastunet.kernels import config, config_search, gpu
from kernel_device import DEVICE, INTERPRETED, MARK

pytestmark = MARK
SMALL = Settings(device=DEVICE.type, size=16, batch=2, features=(8, 16), rounds=2, steady_seconds=0.05)


@pytest.mark.parametrize(
    "step",
    [
        Step("layer", "inc.c2", "forward"),
        Step("layer", "up1.c1", "backward"),
        pytest.param(Step("net", "training"), marks=pytest.mark.slow),
    ],
    ids=lambda step: f"{step.kind} {step.name}",
)
def test_both_backends_are_timed(step: Step) -> None:
    row = measure.run_step(SMALL, step)
    assert (row["status"], row["why_no_triton"]) == ("ok", "")
    ours, theirs = row["times"]["triton"], row["times"]["aten"]
    assert row["ratios"]["aten"]["ratio"] > 0
    assert row["speedup"] == min(found["ratio"] for name, found in row["ratios"].items() if "fastunet" not in name)
    if INTERPRETED:
        assert theirs["median_ms"] < ours["median_ms"]
        assert row["speedup"] < 1, "the interpreter is not the kernel it says it is"


@pytest.mark.parametrize("case", range(4), ids=lambda i: parity.cases()[i].op)
def test_our_kernels_are_compared(case: int) -> None:
    count = len(parity.cases())
    row = measure.run_step(SMALL, Step("parity", str(count // 2 + case), "bfloat16"))
    assert (row["status"], row["implementation"], row["reason"]) == ("ok", "triton", "")


def spoil_single_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel with one warp computes is wrong from now on."""
    run = gpu.Launch.run

    def spoilt(launch: gpu.Launch, device: torch.device) -> None:
        run(launch, device)
        if launch.num_warps == 1:
            for name in ("y_ptr", "out_ptr", "partial_ptr"):
                result = launch.arguments.get(name)
                if result is not None:
                    result.mul_(1.5)

    monkeypatch.setattr(gpu.Launch, "run", spoilt)


@pytest.mark.slow
@pytest.mark.parametrize("kind", search.KINDS)
def test_a_search_drops_what_is_off(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three candidates, of which the second, with one warp, is wrong."""
    subject_of = search.subject_of

    def three(*arguments: object) -> search.Subject:
        found = subject_of(*arguments)
        first, second, *_ = found.candidates
        wrong = dataclasses.replace(first, num_warps=1)
        return dataclasses.replace(found, candidates=[first, wrong, second])

    monkeypatch.setattr(search, "subject_of", three)
    spoil_single_warps(monkeypatch)
    row = measure.run_step(SMALL, Step("tune", "up1.c1", kind))
    assert (row["status"], row["tried"]) == ("ok", 3), row["reason"]
    (dropped,) = row["dropped"]
    assert dropped["config"]["num_warps"] == 1
    assert dropped["reason"].startswith("parity failed")
    assert row["entry"]["config"]["num_warps"] != 1
    assert row["margin_over_aten"]["median"] > 0


def test_other_forms_are_timed_if_they_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three forms beside the chosen one: one that is right, one that is wrong, one that does not run."""
    shape = config.ConvShape(8, 0, 8, 16, 16, aligned=False)
    chosen = config.derived_conv_config(shape, torch.bfloat16, gpu.INTERPRETER, False)
    forms = {"right": {"block_n": 64}, "wrong": {"num_warps": 1}, "broken": {"block_k": 3}}
    found = {chosen.form: chosen, **{name: dataclasses.replace(chosen, **change) for name, change in forms.items()}}
    monkeypatch.setattr(config_search, "conv_forms", lambda *_, **__: found)
    spoil_single_warps(monkeypatch)
    row = measure.run_step(SMALL, Step("layer", "inc.c2", "forward"))
    assert (row["status"], row["reason"]) == ("ok", "")
    assert {"triton", "triton, right form", "aten"} <= set(row["times"])
    assert not {"triton, wrong form", "triton, broken form"} & set(row["times"])
    assert row["absent"]["triton, wrong form"].startswith("parity failed")
    assert row["absent"]["triton, broken form"]
