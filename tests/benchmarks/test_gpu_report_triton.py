"""The GPU report's measurements where the kernels run: both backends are timed, ours after it was checked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fastunet.benchmarks import gpu_steps, search, tune
from fastunet.benchmarks.cases import Settings
from fastunet.benchmarks.gpu_steps import Step
from fastunet.benchmarks.results import speedup
from fastunet.kernels import gpu, tuning
from fastunet.kernels.conv3x3 import config, config_search
from kernel_device import DEVICE, INTERPRETED, MARK

from fastunet import dispatch
from fastunet.testing import parity

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
    row = gpu_steps.run_step(SMALL, step)
    assert (row["status"], row["why_no_triton"]) == ("ok", "")
    assert {"triton", "aten"} <= set(row["samples_ms"])
    assert row["ratios"]["aten"]["ratio"] > 0
    if INTERPRETED:
        assert speedup(row) < 1, "the interpreter is not the kernel it says it is"


@pytest.mark.parametrize("case", range(4), ids=lambda i: parity.cases()[i].op)
def test_our_kernels_are_compared(case: int) -> None:
    count = len(parity.cases())
    row = gpu_steps.run_step(SMALL, Step("parity", str(count // 2 + case), "bfloat16"))
    assert (row["status"], row["implementation"], row["reason"]) == ("ok", "triton", "")


def spoil_single_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel with one warp computes is wrong from now on."""
    run = gpu.Launch.run

    def spoilt(launch: gpu.Launch, device: torch.device) -> None:
        run(launch, device)
        if launch.num_warps == 1:
            for name in ("y_ptr", "y_desc", "y00_desc", "out_ptr", "partial_ptr"):
                result = launch.arguments.get(name)
                if result is not None:
                    getattr(result, "base", result).mul_(1.5)

    monkeypatch.setattr(gpu.Launch, "run", spoilt)


@pytest.mark.slow
def test_a_search_of_a_step_up_drops_what_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, step = dataclasses.replace(SMALL, features=(64, 128), size=8), Step("tune", "up1.c1", search.STEP_UP)
    row = gpu_steps.run_step(settings, step)
    assert (row["status"], "sm_90" in row["reason"]) == ("skipped", True)
    monkeypatch.setattr(gpu, "INTERPRETER", dataclasses.replace(gpu.known_target(90), multiprocessors=4))
    subject_of = search.step_up_subject

    def two(*arguments: Any) -> search.Subject:
        found = subject_of(*arguments)
        derived = found.candidates[0]
        return dataclasses.replace(found, candidates=[derived, dataclasses.replace(derived, num_warps=1)])

    monkeypatch.setattr(search, "step_up_subject", two)
    spoil_single_warps(monkeypatch)
    row = gpu_steps.run_step(settings, step)
    assert row["status"] == "ok", row["reason"]
    assert [each["config"]["num_warps"] for each in row["dropped"]] == [1]
    assert row["entry"]["op"] == "conv_transpose2x2_concat_conv3x3"
    assert row["entry"]["config"]["num_warps"] > 1


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
    row = gpu_steps.run_step(SMALL, Step("tune", "up1.c1", kind))
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
    found = {chosen.variant: chosen, **{name: dataclasses.replace(chosen, **change) for name, change in forms.items()}}
    monkeypatch.setattr(config_search, "conv_variants", lambda *_, **__: found)
    spoil_single_warps(monkeypatch)
    row = gpu_steps.run_step(SMALL, Step("layer", "inc.c2", "forward"))
    assert (row["status"], row["reason"]) == ("ok", "")
    assert {"triton", "triton, right form", "aten"} <= set(row["samples_ms"])
    assert not {"triton, wrong form", "triton, broken form"} & set(row["samples_ms"])
    assert row["missing"]["triton, wrong form"].startswith("parity failed")
    assert row["missing"]["triton, broken form"]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("inc.c2 conv3x3_bias_relu_pool", "inference"),
        ("up1.c1 concat_conv3x3_batch_norm_relu", "training"),
        ("up1.c2 conv3x3_relu_conv1x1", "inference"),
        ("outc segmentation_sums", "training"),
        pytest.param("inc.c2 conv3x3_batch_norm_relu_pool", "inference", marks=pytest.mark.slow),
        pytest.param("up1.c1 concat_conv3x3_instance_norm_relu", "training", marks=pytest.mark.slow),
        pytest.param("up1.up conv_transpose2x2", "training", marks=pytest.mark.slow),
        pytest.param("outc conv1x1", "training", marks=pytest.mark.slow),
    ],
)
def test_auto_goes_by_the_margin_that_is_measured(
    name: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The op looks for its margin where the measurement has left it, forward and backward."""
    row = gpu_steps.run_step(SMALL, Step("margin", name, task))
    assert row["status"] == "ok", row["reason"]
    assert row["layer"]["margin_over_aten"]["median"] > 0
    monkeypatch.setattr(dispatch, "ONEDNN_OPS", ())  # A CPU's own choice in inference.
    launches: list[gpu.Launch] = []
    run = gpu.Launch.run
    monkeypatch.setattr(gpu.Launch, "run", lambda launch, device: (launches.append(launch), run(launch, device)))
    case = tune.margin_cases(SMALL)[name]
    options = {**case.options, **({"training": task == "training"} if "training" in case.options else {})}
    case = dataclasses.replace(case, options=options)
    inputs = parity.make_inputs(case.shapes, torch.bfloat16, DEVICE)
    counts = []
    for p10 in (1.5, 0.5):
        row["layer"]["margin_over_aten"]["p10"] = p10
        path = tmp_path / "table.json"
        path.write_text(json.dumps({"configs": [], "layers": [row["layer"]]}))
        with tuning.reading(path):
            call = tune.run_of(case, inputs, "auto", task == "training")
            launches.clear()
            call()
        counts.append(len(launches))
    # These two do not know in their forward whether there will be a backward: it goes by inference.
    keeps = not name.endswith(("conv1x1", "segmentation_sums"))
    assert counts[0] >= (2 if task == "training" and keeps else 1)
    assert counts[1] == 0


def test_a_step_up_is_measured_beside_its_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(SMALL, features=(64, 128), size=8)
    step = Step("margin", "up1.c1 conv_transpose2x2_concat_conv3x3_relu", "inference")
    row = gpu_steps.run_step(settings, step)
    assert (row["status"], "sm_90" in row["reason"]) == ("skipped", True)
    monkeypatch.setattr(gpu, "INTERPRETER", dataclasses.replace(gpu.known_target(90), multiprocessors=4))
    dispatch._choices.clear()  # They were made for the GPU before.
    asked = []
    choose = dispatch.choose

    def noted(op: str, *args: Any, **options: Any) -> dispatch.Choice:
        asked.append((op, dispatch.selected_backend()))
        return choose(op, *args, **options)

    monkeypatch.setattr(dispatch, "choose", noted)
    row = gpu_steps.run_step(settings, step)
    assert row["status"] == "ok", row["reason"]
    assert row["layer"]["channels"] == [64, 128]
    assert {("conv_transpose2x2", "auto"), (row["layer"]["op"], "triton")} <= set(asked)
    assert (row["layer"]["op"], "auto") not in asked


def test_no_margin_of_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    run = gpu.Launch.run

    def spoilt(launch: gpu.Launch, device: torch.device) -> None:
        run(launch, device)
        launch.arguments["head_ptr"].mul_(1.5)

    monkeypatch.setattr(gpu.Launch, "run", spoilt)
    row = gpu_steps.run_step(SMALL, Step("margin", "up1.c2 conv3x3_relu_conv1x1", "inference"))
    assert row["status"] == "parity failed"
    assert "layer" not in row
