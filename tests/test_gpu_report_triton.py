"""The GPU report's measurements where the kernels run: both backends are timed, ours after it was checked."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fastunet.benchmarks import measure, parity, search
from fastunet.benchmarks.steps import Settings, Step
from fastunet.kernels import gpu
from kernel_device import DEVICE, INTERPRETED, MARK

pytestmark = MARK
SMALL = Settings(device=DEVICE.type, size=16, batch=2, features=(8, 16), rounds=2)


@pytest.mark.parametrize(
    "step",
    [Step("layer", "inc.c2", "forward"), Step("layer", "up1.c1", "backward"), Step("net", "training")],
    ids=lambda step: f"{step.kind} {step.name}",
)
def test_both_backends_are_timed(step: Step) -> None:
    row = measure.run_step(SMALL, step)
    assert (row["status"], row["why_no_triton"]) == ("ok", "")
    ours, theirs = row["times"]["triton"], row["times"]["aten"]
    assert row["speedup"] == pytest.approx(theirs["median_ms"] / ours["median_ms"])
    if INTERPRETED:
        assert row["speedup"] < 1, "the interpreter is not the kernel it says it is"


@pytest.mark.parametrize("case", range(4), ids=lambda i: parity.cases()[i].op)
def test_our_kernels_are_compared(case: int) -> None:
    count = len(parity.cases())
    row = measure.run_step(SMALL, Step("parity", str(count // 2 + case), "bfloat16"))
    assert (row["status"], row["implementation"], row["reason"]) == ("ok", "triton", "")


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

    run = gpu.Launch.run

    def spoilt(launch: gpu.Launch, device: torch.device) -> None:
        run(launch, device)
        if launch.num_warps == 1:
            for name in ("y_ptr", "out_ptr", "partial_ptr"):
                result = launch.arguments.get(name)
                if result is not None:
                    result.mul_(1.5)

    monkeypatch.setattr(search, "subject_of", three)
    monkeypatch.setattr(gpu.Launch, "run", spoilt)
    row = measure.run_step(SMALL, Step("tune", "up1.c1", kind))
    assert (row["status"], row["tried"]) == ("ok", 3), row["reason"]
    (dropped,) = row["dropped"]
    assert dropped["config"]["num_warps"] == 1
    assert dropped["reason"].startswith("parity failed")
    assert row["entry"]["config"]["num_warps"] != 1
    assert row["margin_over_aten"]["median"] > 0
