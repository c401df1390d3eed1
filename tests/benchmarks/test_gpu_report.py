"""The GPU report, on a CPU: layers and their work, the parity check, the budget, the files."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_clock import FakeClock
from fastunet.benchmarks import gpu as gpu_report
from fastunet.benchmarks import gpu_steps, tune
from fastunet.benchmarks.cases import Settings
from fastunet.benchmarks.gpu_steps import COMPILED, COMPILED_NETS, Step, all_steps, describe, parity_formats
from fastunet.benchmarks.harness.worker import Budget
from fastunet.benchmarks.tables import render, summarise
from fastunet.kernels import gpu, self_test

from fastunet import dispatch, ops
from fastunet.checks import ConfigError
from fastunet.testing import cpu_accumulates_in_float32, parity
from fastunet.testing.bounds import Expected, pool_grad

CPU = torch.device("cpu")
TINY = Settings(device="cpu", size=16, batch=2, features=(4, 8), rounds=2, steady_seconds=0.05)
BFLOAT16 = pytest.mark.skipif(
    not cpu_accumulates_in_float32(torch.bfloat16), reason="this processor sums products of bfloat16 in bfloat16"
)


@pytest.mark.parametrize("case", parity.cases()[len(parity.cases()) // 2 :], ids=lambda case: case.op)
def test_every_result_that_is_off_is_caught(case: parity.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """One element of each result in turn is off: by a hundredth of the largest, of gradients by three tenths.

    A gradient's bound is wide where an activation's sign or a pool's winner is open.
    """
    compare, caught = parity.compare, []

    def alter_each(actual, call) -> None:
        compare(actual, call)
        for name in parity.expected(call):
            right = actual[name]
            flat = right.flatten().clone()
            share = 0.3 if name.startswith("grad") else 0.01
            flat[flat.numel() // 2] += share * flat.abs().max()
            altered = {**actual, name: flat.reshape(right.shape)}
            with pytest.raises(AssertionError, match=f"{call.op}: {name}: "):
                compare(altered, call)
            caught.append(name)

    monkeypatch.setattr(parity, "compare", alter_each)
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
@pytest.mark.parametrize(
    "step", [Step("layer", "inc.c2", "forward"), Step("layer", "up1.c1", "backward"), Step("net", "inference")], ids=str
)
def test_what_is_wrong_has_no_time(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
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


PEAKS = {
    "copy": {"gb_per_s": 100.0, "how": "copied"},
    "matmul": {"burst_tflops": 2.0, "steady_tflops": 1.0, "how": "multiplied"},
    "l2": {"gb_per_s": None, "reason": "no CuPy"},
    "timer": {"ratio": 1.01, "how": "torch.mm"},
}


class FakeProcess(AbstractContextManager):
    """Answers each step with a row, after a second on the given clock."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock, self.closed, self.timeouts = clock, False, []

    def ask(self, step: Step, timeout: float) -> tuple[dict, bool]:
        self.timeouts.append(timeout)
        self.clock.time += 1
        return self.row(step), True

    def row(self, step: Step) -> dict:
        ratios = {"aten": {"ratio": 0.5, "p10": 0.4, "p90": 0.6, "rounds": 3}}
        found = {"samples_ms": {"fastunet": [0.5, 1.0, 2.0], "aten": [0.5, 1.0, 2.0]}, "ratios": ratios}
        if step.kind == "net":
            found |= {"steady_ms": {"fastunet": 1.5, "aten": 1.5}, "peak_bytes": {"fastunet": None, "aten": 10**9}}
        found = found if step.kind in ("layer", "net") else PEAKS if step.kind == "peak rates" else {}
        return describe(TINY, step) | {"status": "ok", "reason": ""} | found

    def __exit__(self, *error: object) -> None:
        self.closed = True


def test_a_spent_budget_still_gives_a_row_for_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, saved = FakeClock(), []
    fake, steps = FakeProcess(clock), all_steps(TINY)
    monkeypatch.setattr(gpu_steps, "Spawned", lambda *_: fake)
    budget = Budget(10, lambda: clock.time)
    rows = gpu_steps.run_steps(TINY, steps, budget, lambda rows: saved.append(len(rows)), [])
    assert [row["status"] for row in rows] == ["ok"] * 9 + ["skipped"] * (len(steps) - 9)
    assert saved == [*range(1, 10), len(steps)]
    assert fake.closed
    assert fake.timeouts == [10, 9, 8, 7, 6, 5, 4, 3, 2]
    assert {row["reason"] for row in rows[9:]} == {"no time left"}


def test_tables_show_every_row_and_what_lost() -> None:
    fake = FakeProcess(FakeClock())
    rows = [fake.row(step) for step in all_steps(TINY)]
    rows[1] |= {"status": "parity failed", "reason": "y | off"}
    forward = [row for row in rows if row["variant"] == "forward"]
    forward[0].pop("samples_ms"), forward[0].pop("ratios")
    forward[0] |= {"status": "timed out", "reason": "no result after 90 s"}
    forward[1]["ratios"] = {"aten": {"ratio": 2.0, "p10": 1.9, "p90": 2.1, "rounds": 3}}
    report = {"environment": {"device": "a GPU"}, "settings": vars(TINY), "rows": rows}
    text = render(report)
    shown = [f"| {row['name']} |" for row in rows if row["kind"] in ("parity", "layer")]
    shown += ["| copy, GB/s | 100 | copied |", "| reading L2, GB/s |  | no CuPy |"]
    shown += ["| CuPy's timer / this one | 1.01 | torch.mm |"]
    shown += ["**parity failed**: y / off", "**timed out**: no result after 90 s", "| 0.50 (0.40 to 0.60) |"]
    assert [part for part in shown if part not in text] == []
    summary = summarise(rows)
    assert summary["layers_forward"] == {"aten": {"compared": len(forward) - 1, "faster": 1}}
    assert summary["parity"] == {"passed": len(parity.cases()) * len(parity_formats("cpu")) - 1, "failed": 1}
    assert summary["inference"] == {"aten": {"ratio": 0.5, "p10": 0.4, "p90": 0.6, "rounds": 3}}


def hang_or_die(settings: Settings, step: Step) -> None:
    """Stands for gpu_steps.answer in the worker's process."""
    if step.variant == "forward":
        raise SystemExit(3)
    time.sleep(1000)


def test_a_process_that_hangs_or_dies_gives_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "answer", hang_or_die)
    monkeypatch.setattr(gpu_steps, "LEAST", 0.0)
    seconds = iter([60, 60, 0.1, 0])  # Asked for before a step and after it.
    budget = SimpleNamespace(left=lambda: next(seconds))
    steps = [Step("layer", "inc.c1", "forward"), Step("layer", "inc.c1", "backward")]
    died, hung = gpu_steps.run_steps(TINY, steps, budget, lambda rows: None, [])
    assert (died["status"], died["reason"]) == ("failed", "the process ended with exit code 3")
    assert (hung["status"], hung["op"]) == ("timed out", "conv3x3_bias_relu")


def test_bounds_come_from_the_peak_rates_of_the_same_run() -> None:
    """By hand: inc.c1 of TINY moves its image, weight and result once at 100 GB/s, longer than 2 TFLOP/s take."""
    fake = FakeProcess(FakeClock())
    rows = [fake.row(step) for step in all_steps(TINY) if step.kind != "parity"]
    without = [row for row in rows if row["kind"] != "peak rates"]
    gpu_report.add_bounds(without)
    assert not any("bound_ms" in row for row in without)
    gpu_report.add_bounds(rows)
    first = next(row for row in rows if row["name"] == "inc.c1")
    moved = 2 * (2 * 3 * 16 * 16 + 4 * 3 * 9 + 4 + 2 * 4 * 16 * 16)
    assert first["bound_ms"] == pytest.approx(1e3 * moved / 100e9)
    assert first["of_bound"] == pytest.approx(first["bound_ms"] / 1.0)
    bounds = {row["name"]: row["bound_ms"] for row in rows if row["kind"] == "layer" and row["variant"] == "forward"}
    net = next(row for row in rows if row["name"] == "inference")
    assert net["bound_ms"] == pytest.approx(sum(bounds.values()))
    assert not any("bound_ms" in row for row in rows if row["variant"] == "backward" or row["name"] == "training")


def test_what_the_search_finds_goes_into_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In what time is left."""
    monkeypatch.setattr(gpu_steps, "Spawned", lambda *_: FakeProcess(FakeClock()))
    monkeypatch.setattr(gpu_report.dispatch, "triton_unsupported", lambda *_: None)
    monkeypatch.setattr(gpu_report, "all_steps", lambda settings: [Step("layer", "inc.c1", "forward")])
    found = [{"op": "conv1x1", "dtype": "bfloat16", "shape": {"height": 8}, "speedup": 1.5}]
    asked: list[Path] = []
    monkeypatch.setattr(tune, "measure_table", lambda settings, path, budget: asked.append(path) or found)
    report = gpu_report.make_report(TINY, tmp_path, 3.0)
    assert asked == [tmp_path / "interpreter.json"]
    assert json.loads((tmp_path / "gpu_report.json").read_text())["tuned"] == report["tuned"] == found
    assert "| conv1x1 | bfloat16 | height=8 | 1.5 |" in (tmp_path / "gpu_report.md").read_text()


def test_a_second_call_measures_what_had_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = FakeClock(), []
    steps = [step for step in all_steps(TINY) if step.kind == "layer"]

    class Noting(FakeProcess):
        def ask(self, step: Step, timeout: float) -> tuple[dict, bool]:
            asked.append(step)
            if len(asked) == 2:
                raise TimeoutError("no result after 90 s")
            return super().ask(step, timeout)

    monkeypatch.setattr(gpu_steps, "Spawned", lambda *_: Noting(clock))
    monkeypatch.setattr(gpu_report, "Budget", lambda seconds: Budget(seconds, lambda: clock.time))
    monkeypatch.setattr(gpu_report, "all_steps", lambda settings: steps)
    gpu_report.make_report(TINY, tmp_path, 0.2)  # Six seconds, of which the last two are too few.
    assert asked == steps[:6]
    report = gpu_report.make_report(TINY, tmp_path, 3.0)
    assert asked == [*steps[:6], steps[1], *steps[6:]]
    assert [(row["kind"], row["name"], row["variant"], row["status"]) for row in report["rows"]] == [
        (step.kind, step.name, step.variant, "ok") for step in steps
    ]
    other = dataclasses.replace(TINY, batch=3)
    with pytest.raises(ConfigError, match=r"expected a report of \{'batch': 3\}, got one of \{'batch': 2\}"):
        gpu_report.make_report(other, tmp_path, 3.0)
    assert json.loads((tmp_path / "gpu_report.json").read_text()) == json.loads(json.dumps(report))


def test_each_family_of_kernels_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a wrong one is in the report."""
    found = {"conv1x1": "", "max_pool2x2": "its check failed: 3 of 4 of y are wrong"}
    monkeypatch.setattr(self_test, "check", lambda families, *_: {each: found.get(each, "") for each in families})
    monkeypatch.setattr(gpu_report.dispatch, "triton_unsupported", lambda *_: None)
    monkeypatch.setattr(gpu, "target", lambda device: gpu.known_target(90))
    rows = gpu_report.check_families(dataclasses.replace(TINY, device="cuda"), Budget(60.0))
    assert {row["name"] for row in rows} >= {*dispatch.TRITON_OPS, "conv3x3_halo", "conv3x3_fp8"}
    assert [row["name"] for row in rows if row["status"] == "failed"] == ["max_pool2x2"]
    monkeypatch.setattr(gpu_report, "check_families", lambda settings, budget: rows)
    monkeypatch.setattr(gpu_report, "all_steps", lambda settings: [])
    monkeypatch.setattr(tune, "measure_table", lambda *_: [])
    report = gpu_report.make_report(TINY, tmp_path, 3.0)
    assert report["rows"] == rows
    text = (tmp_path / "gpu_report.md").read_text()
    assert "| max_pool2x2 | bfloat16 |  | **failed**: its check failed: 3 of 4" in text


@BFLOAT16
def test_the_whole_report_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiling takes long, and is the providers' own tests' matter.
    steps = [
        step for step in all_steps(TINY) if step.kind != "parity" and step.variant not in (COMPILED, *COMPILED_NETS)
    ]
    steps += [Step("parity", "0", "float32"), Step("parity", "0", "float7")]
    monkeypatch.setattr(gpu_report, "all_steps", lambda settings: steps)
    gpu_report.make_report(TINY, tmp_path, 3.0)
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    *rows, broken = report["rows"]
    assert len(rows) == len(steps) - 1
    assert (broken["status"], broken["reason"]) == ("failed", "KeyError: 'float7'")
    assert {row["status"] for row in rows} == {"ok"}
    for row in rows:
        if row["kind"] != "peak rates":
            assert "the device is cpu, not cuda" in row["why_no_triton"], "without a GPU there are no kernels"
        if row["kind"] in ("layer", "net"):
            assert next(iter(row["samples_ms"])) == "fastunet"
            assert set(row["ratios"]) == set(row["samples_ms"]) - {"fastunet"}
            assert not set(row["missing"]) & set(row["samples_ms"])
        if row["kind"] == "layer" and row["variant"] == "forward":
            assert "onednn eager" in row["samples_ms"]
            assert row["missing"]["cudnn graph"] == "the device is cpu, not cuda"
            assert row["bound_ms"] > 0
        if row["kind"] == "net":
            assert row["steady_ms"]["fastunet"] > 0
            assert "eager channels_last AMP" in row["samples_ms"]
    assert report["summary"]["parity"] == {"passed": 1, "failed": 0}
    assert set(report["summary"]["training"]) == {"eager", "eager channels_last AMP"}
    assert {"torch", "python", "commit", "dirty"} <= set(report["environment"])
    names = ["gpu_report.json", "gpu_report.md", "roofline.png"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == names


def test_the_command_needs_neither_a_gpu_nor_the_extras_to_say_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    missing = ("kornia", "monai", "safetensors", "tifffile", "PIL", "accelerate", "typer")
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); from benchmarks.__main__ import main; main()"
    command = [sys.executable, "-c", code, "gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300)
    assert "torch finds no CUDA device here" in done.stderr
    assert done.returncode == 2
    assert not (tmp_path / "out").exists()
