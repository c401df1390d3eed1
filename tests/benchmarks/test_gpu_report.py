"""The GPU report, on a CPU: layers and their work, the parity gate, the budget, the files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_clock import FakeClock
from fastunet.benchmarks import gpu as gpu_report
from fastunet.benchmarks import gpu_steps, providers, search, tune
from fastunet.benchmarks.cases import Settings, meta_unet, unet_layers
from fastunet.benchmarks.gpu_steps import COMPILED, COMPILED_NETS, Step, all_steps, describe, layer_of, parity_formats
from fastunet.benchmarks.gpu_tables import render, summarise
from fastunet.benchmarks.harness.worker import Budget
from fastunet.benchmarks.tune import margin_steps
from fastunet.kernels import gpu, tuning
from torch import nn

import fastunet
from fastunet import ops
from fastunet.testing import cpu_accumulates_in_float32, parity
from fastunet.testing.bounds import Expected, pool_grad

CPU = torch.device("cpu")
TINY = Settings(device="cpu", size=16, batch=2, features=(4, 8), rounds=2, steady_seconds=0.05)
BFLOAT16 = pytest.mark.skipif(
    not cpu_accumulates_in_float32(torch.bfloat16), reason="this processor sums products of bfloat16 in bfloat16"
)

# GFLOP of one 512x512 image, as the roofline of the classic net has them; an up-convolution counts with the
# convolution after it.
CLASSIC = {
    "inc.c1": 0.9,
    "inc.c2": 19.3,
    "down1.c1": 9.7,
    "down1.c2": 19.3,
    "down2.c1": 9.7,
    "down2.c2": 19.3,
    "down3.c1": 9.7,
    "down3.c2": 19.3,
    "down4.c1": 9.7,
    "down4.c2": 19.3,
    "outc": 0.1,
    **{f"up{i}.{part}": gflop for i in range(1, 5) for part, gflop in (("c1", 42.9), ("c2", 19.3))},
}


def test_the_layers_are_the_classic_nets() -> None:
    layers = unet_layers(meta_unet(3, 2, (64, 128, 256, 512, 1024)), 1, 512, 512)
    work: dict[str, float] = {}
    for layer in layers:
        name = layer.name.replace(".up", ".c1")
        work[name] = work.get(name, 0.0) + layer.flops / 1e9
    assert len(layers) == 19 + 4
    assert {name: round(gflop, 1) for name, gflop in work.items()} == CLASSIC
    assert round(sum(work.values()), 1) == 385.4


def test_a_layer_is_what_the_net_runs() -> None:
    """Shapes and ops against those that a forward pass of the model, without norm, is seen to call."""
    model = fastunet.UNet(3, 2, features=(4, 8, 16), norm=None)
    seen = [row.input for row in fastunet.explain(model, torch.zeros(2, 3, 20, 12)).rows if "conv" in row.op]
    layers = unet_layers(model, 2, 20, 12)
    assert [f"{list(next(iter(layer.shapes.values())))} float32" for layer in layers] == seen
    assert [layer.name for layer in layers if not layer.input_has_grad] == ["inc.c1"]


@pytest.mark.parametrize("upsample", ["transpose", "bilinear"])
def test_a_layers_outputs_are_what_its_modules_return(upsample: Any) -> None:
    model = fastunet.UNet(3, 2, features=(4, 8, 16), upsample=upsample)
    returned: list[tuple[int, ...]] = []

    def note(module: Any, inputs: Any, output: torch.Tensor) -> None:
        returned.append(tuple(output.shape))

    plain = model.to_reference()
    for module in plain.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Upsample, nn.MaxPool2d)):
            module.register_forward_hook(note)
    plain(torch.zeros(2, 3, 16, 24))
    assert [shape for layer in unet_layers(model, 2, 16, 24) for shape in layer.outputs.values()] == returned


def test_every_op_has_a_case_and_passes() -> None:
    cases = parity.cases()
    assert {case.op for case in cases} == set(ops.__all__)
    for case in cases:
        parity.check(case, torch.float32, CPU)


@pytest.mark.parametrize("case", parity.cases()[: len(parity.cases()) // 2], ids=lambda case: case.op)
def test_every_result_that_is_off_is_caught(case: parity.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """One element of each result in turn is off: by a hundredth of the largest, of gradients by three tenths.

    A gradient's bound is wide where an activation's sign or a pool's winner is open.
    """
    compare, caught = parity.compare, []

    def spoil_each(actual, call) -> None:
        for name in parity.expected(call):
            right = actual[name]
            flat = right.flatten().clone()
            share = 0.3 if name.startswith("grad") else 0.01
            flat[flat.numel() // 2] += share * flat.abs().max()
            spoilt = {**actual, name: flat.reshape(right.shape)}
            with pytest.raises(AssertionError, match=f"{call.op}: {name}: "):
                compare(spoilt, call)
            caught.append(name)

    monkeypatch.setattr(parity, "compare", spoil_each)
    parity.check(case, torch.float32, CPU)
    assert "y" in caught
    assert any(name.startswith("grad") for name in caught) == case.backward


def test_open_decisions_are_part_of_the_bound() -> None:
    x = torch.tensor([[1.0, 0.95, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64).reshape(1, 1, 2, 4)
    grad = pool_grad(torch.tensor([[[[2.0, 5.0]]]]), Expected(x, torch.full_like(x, 0.1)))
    assert grad.value.flatten().tolist() == [2, 0, 5, 0, 0, 0, 0, 0]
    assert grad.tolerance.flatten().tolist() == [2, 2, 0, 0, 0, 0, 0, 0]
    assert not pool_grad(torch.ones(1, 1, 1, 2), Expected.exact(torch.zeros(1, 1, 2, 4))).tolerance.any()


@BFLOAT16
@pytest.mark.parametrize("name", ["layer inc.c2 forward", "layer up1.c1 backward", "net inference"])
def test_what_is_wrong_has_no_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = next(step for step in all_steps(TINY) if f"{step.kind} {step.name} {step.variant}".strip() == name)
    assert gpu_steps.run_step(TINY, step)["status"] == "ok"

    def wrong(op):
        def run(*args, **kwargs):
            result = op(*args, **kwargs)
            return tuple(1.5 * y for y in result) if isinstance(result, tuple) else 1.5 * result

        return run

    for op in ("conv3x3_bias_relu_pool", "concat_conv3x3_bias_relu", "conv3x3_batch_norm_relu", "conv3x3_relu_conv1x1"):
        monkeypatch.setattr(ops, op, wrong(getattr(ops, op)))
    row = gpu_steps.run_step(TINY, step)
    assert row["status"] == "parity failed"
    assert "samples_ms" not in row
    assert row["reason"]


ROOFS = {
    "copy": {"gb_per_s": 100.0, "how": "copied"},
    "matmul": {"burst_tflops": 2.0, "steady_tflops": 1.0, "how": "multiplied"},
    "l2": {"gb_per_s": None, "reason": "no CuPy"},
}


class FakeWorker:
    """Gives each step a row, after a second on the given clock."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock, self.closed, self.timeouts = clock, False, []

    def run(self, step: Step, timeout: float) -> dict:
        self.timeouts.append(timeout)
        self.clock.time += 1
        ratios = {"aten": {"ratio": 0.5, "p10": 0.4, "p90": 0.6, "rounds": 3}}
        found = {"samples_ms": {"triton": [0.5, 1.0, 2.0], "aten": [0.5, 1.0, 2.0]}, "ratios": ratios}
        if step.kind == "net":
            found |= {"steady_ms": {"triton": 1.5, "aten": 1.5}, "peak_bytes": {"triton": None, "aten": None}}
        found = found if step.kind in ("layer", "net") else ROOFS if step.kind == "roofs" else {}
        return describe(TINY, step) | {"status": "ok", "reason": ""} | found

    def close(self) -> None:
        self.closed = True


def test_a_spent_budget_still_gives_a_row_for_every_step() -> None:
    clock, saved = FakeClock(), []
    fake, steps = FakeWorker(clock), all_steps(TINY)
    rows = gpu_steps.run_steps(TINY, steps, fake, Budget(10, lambda: clock.time), lambda rows: saved.append(len(rows)))
    assert [row["status"] for row in rows] == ["ok"] * 9 + ["skipped"] * (len(steps) - 9)
    assert saved == [*range(1, 10), len(steps)]
    assert fake.closed
    assert fake.timeouts == [10, 9, 8, 7, 6, 5, 4, 3, 2]
    assert {row["reason"] for row in rows[9:]} == {"no time left"}


def test_tables_show_every_row_and_what_lost() -> None:
    clock = FakeClock()
    fake = FakeWorker(clock)
    rows = [fake.run(step, 1.0) for step in all_steps(TINY)]
    rows[1] |= {"status": "parity failed", "reason": "y | off"}
    forward = [row for row in rows if row["variant"] == "forward"]
    forward[0].pop("samples_ms"), forward[0].pop("ratios")
    forward[0] |= {"status": "timed out", "reason": "no result after 90 s"}
    forward[1]["ratios"] = {"aten": {"ratio": 2.0, "p10": 1.9, "p90": 2.1, "rounds": 3}}
    report = {"environment": {"device": "a GPU"}, "settings": vars(TINY), "rows": rows, "tests": {"reason": "not yet"}}
    text = render(report)
    for row in rows:
        assert f"| {row['name']}" in text or row["kind"] == "roofs"
    assert "| copy, GB/s | 100 | copied |" in text
    assert "| reading L2, GB/s |  | no CuPy |" in text
    assert "**parity failed**: y / off" in text
    assert "**timed out**: no result after 90 s" in text
    layers = [row for row in rows if row["kind"] == "layer"]
    assert text.count("| 0.50 |") == len(layers) - 2
    assert text.count("| 0.50 [0.40, 0.60] |") == len([row for row in rows if row["kind"] == "net"])
    assert "Not run: not yet." in text
    summary = summarise(rows)
    assert summary["layers_forward"]["compared"] == len(forward) - 1
    assert summary["layers_forward"]["faster"] == 1
    assert summary["parity"] == {"passed": len(parity.cases()) * len(parity_formats("cpu")) - 1, "failed": 1}
    assert summary["inference"] == {"aten": {"ratio": 0.5, "p10": 0.4, "p90": 0.6, "rounds": 3}}
    assert summary["inference_images_per_s"] == {"triton": 2000.0, "aten": 2000.0}


def test_outcomes_of_tests_that_were_stopped() -> None:
    output = (
        "tests/a.py::b[1 2] PASSED [ 1%]\ntests/a.py::c FAILED [ 2%]\ntests/a.py::d SKIPPED (why) [ 3%]\ntests/a.py::e "
    )
    found = gpu_report.count_outcomes(output)
    assert found == {"counts": {"passed": 1, "failed": 1, "skipped": 1}, "failed": ["tests/a.py::c"]}
    assert gpu_report.run_tests("cpu", 100.0)["reason"] == "the device is cpu"
    assert gpu_report.run_tests("cuda", 100.0, Path("nowhere"))["reason"] == "there is no tests folder"


def test_a_command_that_hangs_is_ended_with_its_children() -> None:
    code = "import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', 'while 1: pass'])"
    begin = time.monotonic()
    output, ended = gpu_report.run_for([sys.executable, "-c", code], 2.0)
    assert time.monotonic() - begin < 20
    assert output == "begun\n"
    assert not ended


def hang_or_die(settings: Settings, connection) -> None:
    """Stands for gpu_steps.serve in the worker's process."""
    step = connection.recv()
    if step.variant == "forward":
        raise SystemExit(3)
    time.sleep(1000)


def test_a_worker_that_hangs_or_dies_gives_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "serve", hang_or_die)
    process = gpu_steps.Worker(TINY)
    try:
        died = process.run(Step("layer", "inc.c1", "forward"), 60)
        assert (died["status"], died["reason"]) == ("failed", "the process ended with exit code 3")
        hung = process.run(Step("layer", "inc.c1", "backward"), 0.1)
        assert (hung["status"], hung["op"]) == ("timed out", "conv3x3_bias_relu")
    finally:
        process.close()


def test_the_timer_is_held_against_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    row = gpu_steps.run_step(TINY, Step("clock", "inc.c2"))
    assert (row["status"], row["cross_check"]["reason"].partition(":")[0]) == ("ok", "CuPy cannot be imported")
    found = {"event_ms": 2.0, "cupy_ms": 2.5, "ratio": 1.25}
    rows = [row, row | {"cross_check": found}]
    report = {"environment": {}, "settings": vars(TINY), "rows": rows, "tests": {"reason": ""}}
    text = render(report)
    assert "| inc.c2 | 2.00 | 2.50 | 1.25 |" in text
    assert "CuPy cannot be imported" in text
    assert Step("clock", "inc.c2") in all_steps(replace(TINY, device="cuda"))
    assert Step("clock", "inc.c2") not in all_steps(TINY)


def test_floors_come_from_the_roofs_of_the_same_run() -> None:
    """By hand: inc.c1 of TINY moves its image, weight and result once at 100 GB/s, longer than 2 TFLOP/s take."""
    fake = FakeWorker(FakeClock())
    rows = [fake.run(step, 1.0) for step in all_steps(TINY) if step.kind != "parity"]
    without = [row for row in rows if row["kind"] != "roofs"]
    gpu_report.add_floors(without)
    assert not any("floor_ms" in row for row in without)
    gpu_report.add_floors(rows)
    first = next(row for row in rows if row["name"] == "inc.c1")
    moved = 2 * (2 * 3 * 16 * 16 + 4 * 3 * 9 + 4 + 2 * 4 * 16 * 16)
    assert first["floor_ms"] == pytest.approx(1e3 * moved / 100e9)
    assert first["of_floor"] == pytest.approx(first["floor_ms"] / 1.0)
    floors = {row["name"]: row["floor_ms"] for row in rows if row["kind"] == "layer" and row["variant"] == "forward"}
    net = next(row for row in rows if row["name"] == "inference")
    assert net["floor_ms"] == pytest.approx(sum(floors.values()))
    assert not any("floor_ms" in row for row in rows if row["variant"] == "backward" or row["name"] == "training")


@pytest.mark.parametrize("is_tuned", [False, True])
def test_what_the_search_finds_goes_into_the_table(
    is_tuned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's table, in the report's folder or where it is asked for; and the rows into the report."""
    clock = FakeClock()

    class Searching(FakeWorker):
        def __init__(self, settings: Settings) -> None:
            super().__init__(clock)

        def run(self, step: Step, timeout: float) -> dict:
            row = super().run(step, timeout)
            if step.kind == "tune":
                layer = layer_of(TINY, step.name)
                subject = search.subject_of(layer, step.variant, gpu.INTERPRETER)
                chosen = subject.candidates[0]
                row["entry"] = tuning.as_row(subject.op, subject.shape, torch.bfloat16, False, chosen)
            if step.kind == "margin":
                layer = tuning.MeasuredLayer(step.name, (8, 4), 8, 8, step.variant == "training")
                margin = {"median": 1.5, "p10": 1.2, "p90": 2.0, "samples": 5}
                row["layer"] = tuning.as_layer_row(layer, torch.bfloat16, False) | {"margin_over_aten": margin}
            return row

    for module in (gpu_report, tune):
        monkeypatch.setattr(module, "Worker", Searching)
    monkeypatch.setattr(gpu_report.dispatch, "triton_unsupported", lambda *_: None)
    folder = tmp_path / "tuned" if is_tuned else tmp_path
    report = gpu_report.make_report(TINY, tmp_path, 3.0, tuned=tmp_path / "tuned" if is_tuned else None)
    table = json.loads((folder / "interpreter.json").read_text())
    searched = [row for row in report["rows"] if row["kind"] == "tune"]
    assert len(table["configs"]) == len(searched) == len(search.tune_steps(TINY))
    assert len(table["layers"]) == len(margin_steps(TINY)) > 30
    assert table["gpu"] == "interpreter"
    assert json.loads((tmp_path / "gpu_report.json").read_text())["rows"] == report["rows"]
    text = (tmp_path / "gpu_report.md").read_text()
    assert "| inc.c2 | forward | tile_h=" in text
    assert "| inc.c2 conv3x3_batch_norm_relu_pool | training | 1.50 [1.20, 2.00] |" in text


def test_the_names_of_compiled_nets_are_those_of_providers() -> None:
    names = {each.name for each in providers.net_providers(CPU, torch.bfloat16, training=False)}
    assert set(COMPILED_NETS) == {name for name in names if name.startswith("compile")}


@BFLOAT16
def test_the_whole_report_on_a_cpu(tmp_path: Path) -> None:
    steps = [step for step in all_steps(TINY) if step.kind != "parity" or step.variant == "float32"]
    steps = [step for step in steps if step.kind != "parity" or int(step.name) in (0, 5)]
    # Compiling takes long, and is the providers' own tests' matter.
    steps = [step for step in steps if step.variant not in (COMPILED, *COMPILED_NETS)]
    steps.append(Step("parity", "0", "float7"))
    gpu_report.make_report(TINY, tmp_path, 3.0, steps)
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    assert len(report["rows"]) == len(steps)
    *rows, broken = report["rows"]
    assert (broken["status"], broken["reason"]) == ("failed", "KeyError: 'float7'")
    assert {row["status"] for row in rows} == {"ok"}
    for row in rows:
        if row["kind"] != "roofs":
            assert "the device is cpu, not cuda" in row["why_no_triton"], "without a GPU there are no kernels"
        if row["kind"] in ("layer", "net"):
            assert next(iter(row["samples_ms"])) == "aten"
            assert set(row["ratios"]) == set(row["samples_ms"]) - {"aten"}
            assert not set(row["missing"]) & set(row["samples_ms"])
        if row["kind"] == "layer" and row["variant"] == "forward":
            assert "onednn eager" in row["samples_ms"]
            assert row["missing"]["cudnn graph"] == "the device is cpu, not cuda"
            assert row["floor_ms"] > 0
        if row["kind"] == "net":
            assert row["steady_ms"]["aten"] > 0
            assert "eager channels_last AMP" in row["samples_ms"]
    assert report["summary"]["parity"] == {"passed": 2, "failed": 0}
    assert set(report["summary"]["training"]) == {"eager", "eager channels_last AMP"}
    assert {"torch", "python", "commit", "dirty"} <= set(report["environment"])
    assert (tmp_path / "gpu_report.md").read_text().count("no triton: the device is cpu") == len(rows) - 1
    names = ["gpu_report.json", "gpu_report.md", "roofline.png"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == names


def test_the_command_needs_neither_a_gpu_nor_the_extras_to_say_so(tmp_path: Path) -> None:
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("kornia", "monai", "safetensors", "tifffile", "PIL", "accelerate", "typer"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Block())
from benchmarks.__main__ import main
sys.exit(main(["gpu", *sys.argv[1:]]))
"""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "torch finds no CUDA device here" in done.stderr
    assert done.returncode == 2
    assert not (tmp_path / "out").exists()
