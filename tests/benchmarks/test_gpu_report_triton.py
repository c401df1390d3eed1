"""The GPU report's measurements where the kernels run: both backends are timed, ours after it was checked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fastunet.benchmarks import gpu_steps, runs, tune
from fastunet.benchmarks.cases import Settings
from fastunet.benchmarks.gpu_steps import Step
from fastunet.benchmarks.runs import case_run
from fastunet.kernels import gpu, tuning
from fastunet.kernels.conv3x3 import config, config_search
from kernel_device import DEVICE, INTERPRETED, MARK

from fastunet import dispatch
from fastunet.testing import parity

pytestmark = MARK
SEARCHED = (config.CONV3X3, config.INPUT_GRAD, config.COMPOSED)
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
        assert row["ratios"]["aten"]["ratio"] < 1, "the interpreter is not the kernel it says it is"


@pytest.mark.parametrize("case", [0, 11], ids=lambda i: parity.cases()[i].op)
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


@pytest.mark.parametrize("kernel", [tune.WEIGHT_GRAD, *(pytest.param(k, marks=pytest.mark.slow) for k in SEARCHED)])
def test_a_search_drops_what_is_off(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three candidates, of which the second, with one warp, is wrong."""
    settings, step = SMALL, Step("tune", "up1.c1" if kernel == config.COMPOSED else "inc.c2", kernel)
    if kernel == config.COMPOSED:
        settings = dataclasses.replace(SMALL, features=(64, 128), size=8)
        row = gpu_steps.run_step(settings, step)
        assert (row["status"], "sm_90" in row["reason"]) == ("skipped", True)
        monkeypatch.setattr(gpu, "INTERPRETER", dataclasses.replace(gpu.known_target(90), multiprocessors=4))
        dispatch._choices.clear()  # They were made for the GPU before.
    candidates_of = tune.candidates_of

    def three(*arguments: Any) -> list[Any]:
        first, second, *_ = candidates_of(*arguments)
        return [first, dataclasses.replace(first, num_warps=1), second]

    monkeypatch.setattr(tune, "candidates_of", three)
    spoil_single_warps(monkeypatch)
    row = gpu_steps.run_step(settings, step)
    assert (row["status"], row["tried"]) == ("ok", 3), row["reason"]
    (dropped,) = row["dropped"]
    assert dropped["config"]["num_warps"] == 1
    assert dropped["reason"].startswith("parity failed")
    assert (row["entry"]["op"], row["entry"]["config"]["num_warps"] > 1) == (kernel, True)
    assert row["margin_over_aten"]["median"] > 0


def test_other_variants_are_timed_if_they_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three variants beside the chosen one: one that is right, one that is wrong, one that does not run."""
    shape = config.ConvShape(8, 0, 8, 16, 16, aligned=False)
    chosen = config.derived_conv_config(shape, torch.bfloat16, gpu.INTERPRETER, False)
    changes = {"right": {"block_n": 64}, "wrong": {"num_warps": 1}, "broken": {"block_k": 3}}
    found = {
        chosen.variant: chosen,
        **{name: dataclasses.replace(chosen, **change) for name, change in changes.items()},
    }
    monkeypatch.setattr(config_search, "conv_variants", lambda *_, **__: found)
    spoil_single_warps(monkeypatch)
    row = gpu_steps.run_step(SMALL, Step("layer", "inc.c2", "forward"))
    assert (row["status"], row["reason"]) == ("ok", "")
    assert {"fastunet", "fastunet, right variant"} <= set(row["samples_ms"])
    assert not {"fastunet, wrong variant", "fastunet, broken variant"} & set(row["samples_ms"])
    assert row["missing"]["fastunet, wrong variant"].startswith("parity failed")
    assert row["missing"]["fastunet, broken variant"]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("inc.c2 conv3x3_bias_relu_pool", "inference"),
        ("outc segmentation_sums", "training"),
        pytest.param("up1.c1 concat_conv3x3_batch_norm_relu", "training", marks=pytest.mark.slow),
        pytest.param("up1.c2 conv3x3_relu_conv1x1", "inference", marks=pytest.mark.slow),
        pytest.param("up1.up conv_transpose2x2", "training", marks=pytest.mark.slow),
        pytest.param("outc conv1x1", "training", marks=pytest.mark.slow),
    ],
)
def test_auto_goes_by_the_margin_that_is_measured(
    name: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The op looks for its margin where the measurement has left it, forward and backward."""
    row = gpu_steps.run_step(SMALL, Step("speedup", name, task))
    assert row["status"] == "ok", row["reason"]
    assert row["layer"]["margin_over_aten"]["median"] > 0
    monkeypatch.setattr(dispatch, "ONEDNN_OPS", ())  # A CPU's own choice in inference.
    launches: list[gpu.Launch] = []
    run = gpu.Launch.run
    monkeypatch.setattr(gpu.Launch, "run", lambda launch, device: (launches.append(launch), run(launch, device)))
    case = tune.net_cases(SMALL)[name]
    options = {**case.options, **({"training": task == "training"} if "training" in case.options else {})}
    case = dataclasses.replace(case, options=options)
    inputs = parity.make_inputs(case.shapes, torch.bfloat16, DEVICE)
    counts = []
    for p10 in (1.5, 0.5):
        row["layer"]["margin_over_aten"]["p10"] = p10
        path = tmp_path / "table.json"
        path.write_text(json.dumps({"configs": [], "layers": [row["layer"]]}))
        with tuning.reading(path):
            call = case_run(case, inputs, "auto", "both" if task == "training" else "forward")
            launches.clear()
            call()
        counts.append(len(launches))
    # These two do not know in their forward whether there will be a backward: it goes by inference.
    keeps = not name.endswith(("conv1x1", "segmentation_sums"))
    assert counts[0] >= (2 if task == "training" and keeps else 1)
    assert counts[1] == 0


def test_a_step_up_is_measured_beside_its_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(SMALL, features=(64, 128), size=8)
    step = Step("speedup", "up1.c1 conv_transpose2x2_concat_conv3x3_relu", "inference")
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
    row = gpu_steps.run_step(SMALL, Step("speedup", "up1.c2 conv3x3_relu_conv1x1", "inference"))
    assert row["status"] == "parity failed"
    assert "layer" not in row
