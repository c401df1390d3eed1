"""The GPU report's measurements where the kernels run: both backends are timed, ours after it was checked."""

from __future__ import annotations

import pytest
from fastunet.benchmarks import measure, parity
from fastunet.benchmarks.steps import Settings, Step
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
