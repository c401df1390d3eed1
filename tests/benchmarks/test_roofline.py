"""The roofline: the bounds of a net's layers, from them the table, the plot and the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, call

import pytest

pytest.importorskip("matplotlib", reason="needs the extra train")

import numpy as np
import torch
from fake_clock import FakeClock
from fastunet.benchmarks import gpu, roofline
from fastunet.benchmarks.__main__ import main
from fastunet.benchmarks.cases import Settings
from fastunet.benchmarks.gpu_steps import Step, describe
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

# --- what was measured ---


def test_the_roofline_has_the_reports_forward_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer is faster than another, one slower, one timed alone, and others not at all."""
    settings = Settings(size=32, batch=2, features=(8, 16))
    rows: list[dict[str, Any]] = [{"kind": "peak rates", "status": "ok", "matmul": {"burst_tflops": 790}}]
    rows[0]["copy"] = {"gb_per_s": 3000}
    times = {"inc.c1": {"triton": 1.0, "aten": 2.0}, "inc.c2": {"triton": 3.0, "aten": 2.0}, "outc": {"triton": 4.0}}
    for step in (Step("layer", layer.name, way) for layer in settings.net_layers() for way in ("forward", "backward")):
        samples = {name: [ms] for name, ms in times.get(step.name, {}).items()}
        rows.append(describe(settings, step) | ({"samples_ms": samples} if samples else {}))
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: drawn.append(figure) or save(figure, *a, **k))
    assert gpu.draw_roofline(tmp_path, json.loads(json.dumps({"rows": rows}))) == ""
    texts = {text.get_text() for text in drawn[0].findobj(Text)}
    assert {"inc.c1", "inc.c2", "outc", "peak rates, memory: 3 TB/s, matrix products: 790 TFLOP/s"} <= texts
    assert "up1.c1" not in texts
    marks = [(str(line.get_label()), line.get_ydata()[0]) for line in drawn[0].axes[0].lines]
    flops = {layer.name: layer.flops / 1e9 for layer in settings.net_layers()}
    assert [mark for mark in marks if mark[0].startswith("measured")] == [
        ("measured, as fast as any other", flops["inc.c1"] / 1.0),
        ("measured, slower than another", flops["inc.c2"] / 3.0),
        ("measured, as fast as any other", flops["outc"] / 4.0),
    ]
    with Image.open(tmp_path / "roofline.png") as image:
        assert image.format == "PNG"


# --- peak rates, measured ---


class SteppedClock(FakeClock):
    """Each mark is half a second after the one before."""

    def mark(self) -> float:
        self.time += 0.5
        return self.time


def test_burst_is_the_beginning_and_steady_the_second_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that slows down from 1 s to 2 s after three runs of warm-up and 25 more."""
    clock, rests = FakeClock(), []
    monkeypatch.setattr(roofline, "time", SimpleNamespace(perf_counter=lambda: clock.time, sleep=rests.append))
    burst, steady = roofline.burst_and_steady(clock.run("run", *[1.0] * 28, 2.0), clock, seconds=97.0)
    assert (burst.median, burst.p90, steady.p10, steady.median) == (1.0, 1.0, 2.0, 2.0)
    assert (rests, burst.samples, steady.samples) == ([1.0], 10, (clock.log.count("run") - 3) // 2)


def test_rates_are_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, clock = torch.device("cpu"), torch.device("cuda"), SteppedClock()
    monkeypatch.setitem(roofline.SIZES, "cpu", (1 << 20, 16, 0.0))
    found = json.loads(json.dumps(roofline.measure_peak_rates(cpu, clock)))
    assert found["copy"]["gb_per_s"] == pytest.approx(2 * (1 << 20) / 0.5 / 1e9)
    matmul = found["matmul"]
    assert matmul["burst_tflops"] == matmul["steady_tflops"] == pytest.approx(2 * 16**3 / 0.5 / 1e12)
    assert found["l2"] == {"gb_per_s": None, "reason": "the device is cpu, not cuda"}
    monkeypatch.setattr(roofline, "_l2_reader", lambda device: (lambda: None, 1 << 20))
    assert roofline._l2_rate(cuda, clock)["gb_per_s"] == pytest.approx((1 << 26) / 0.5 / 1e9)
    failed = roofline._by_cupy(cuda, "ratio", lambda: {}["no compiler"])
    assert failed == {"ratio": None, "reason": "KeyError: 'no compiler'"}


def test_the_second_timer_times_the_run_on_torchs_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = MagicMock()
    modules.cupyx.profiler.benchmark.return_value.gpu_times = np.array([[0.004, 0.003, 0.1]])
    for name in ("cupy", "cupyx"):
        monkeypatch.setitem(sys.modules, name, getattr(modules, name))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    found = roofline._second_clock(torch.device("cuda"), len, 0.002)
    assert found["ratio"] == pytest.approx(2.0)
    stream = call.cupy.cuda.ExternalStream(77)
    timed = call.cupyx.profiler.benchmark(len, n_repeat=10, n_warmup=3)
    assert modules.mock_calls == [stream, stream.__enter__(), timed, stream.__exit__(None, None, None)]


# --- the command ---


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline", "--tflops", "790", "--tbps", "3.0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| layer | GFLOP/img | MB/img | bound µs | eager µs |"
    # Microseconds derived by hand, independently of the code.
    assert lines[2] == "| inc.c1 | 0.9 | 35.1 | 187 | 903 |"
    assert lines[-1] == "| total | 385.4 | 675.5 | 8397 | 16288 |"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tflops", "0"], "expected rates above 0 and finite, got 0.0 and"),
        (["--size", "8"], "expected size >= 16 and batch >= 1, got 8 and 16"),
    ],
)
def test_the_command_refuses(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["roofline", "--tflops", "1", "--tbps", "1", *arguments])
    assert said in capsys.readouterr().err
