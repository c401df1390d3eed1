"""The roofline: the work and the bounds of a net's layers, from them the table, the plot and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="needs the extra train")

import torch
from fastunet.benchmarks import charts, roofline
from fastunet.benchmarks.__main__ import main
from fastunet.benchmarks.cases import Layer, Settings, joined_layers, unet_layers
from fastunet.benchmarks.gpu_steps import Step, describe
from fastunet.benchmarks.roofline import PeakRates, eager_seconds, point_of
from PIL import Image

H100 = PeakRates(790e12, 3.0e12)
CLASSIC = (64, 128, 256, 512, 1024)
BATCH = 16
# Microseconds of the classic net, 16 images of 512x512 in bfloat16, at these peaks: the bound, and eager at the peaks.
# Derived by hand, independently of the code; a transposed convolution is counted with the convolution it feeds.
MICROSECONDS = {
    "inc.c1": (187, 903),
    "inc.c2": (403, 1331),
    "down1.c1": (196, 554),
    "down1.c2": (391, 861),
    "down2.c1": (196, 375),
    "down2.c2": (391, 626),
    "down3.c1": (196, 285),
    "down3.c2": (391, 509),
    "down4.c1": (196, 240),
    "down4.c2": (391, 436),
    "up1.c1": (870, 1094),
    "up1.c2": (391, 481),
    "up2.c1": (870, 1317),
    "up2.c2": (391, 570),
    "up3.c1": (917, 1812),
    "up3.c2": (391, 749),
    "up4.c1": (1051, 2841),
    "up4.c2": (391, 1107),
    "outc": (185, 196),
}


def classic() -> list[Layer]:
    return unet_layers(3, 2, CLASSIC, BATCH, 512, 512)


def test_bound_and_eager_of_the_classic_net_to_the_printed_digit() -> None:
    found: dict[str, list[float]] = {}
    for layer in classic():
        sums = found.setdefault(layer.name.replace(".up", ".c1"), [0.0, 0.0])
        sums[0] += point_of(layer, H100).bound
        sums[1] += eager_seconds(layer, H100)
    assert {name: tuple(round(1e6 * s) for s in sums) for name, sums in found.items()} == MICROSECONDS
    assert [round(1e6 * sum(column)) for column in zip(*found.values(), strict=True)] == [8397, 16288]


def test_what_is_left_to_gain_by_joining_layers() -> None:
    """With each up-convolution composed with the convolution that it feeds, and without the head's own pass."""
    layers = classic()
    joined = joined_layers(layers)
    assert round(BATCH / sum(point_of(layer, H100).bound for layer in layers if layer.name != "outc")) == 1948
    *others, last = joined
    assert round(1e6 * sum(point_of(each, H100).bound for each in (*others, layers[-2]))) == 7462
    assert last.flops == layers[-2].flops + layers[-1].flops
    flops = sum(layer.flops for layer in joined) / sum(layer.flops for layer in layers)
    assert round(1 - flops, 3) == 0.067


# --- what was measured ---


def small_report() -> dict[str, Any]:
    """As gpu_report writes it: one layer faster, one slower, one timed once, one not at all."""
    settings = Settings(size=32, batch=2, features=(8, 16))
    rows: list[dict[str, Any]] = [{"kind": "parity", "name": "x", "variant": "bf16"}]
    times = {"inc.c1": {"triton": 1.0, "aten": 2.0}, "inc.c2": {"triton": 3.0, "aten": 2.0}, "outc": {"triton": 4.0}}
    for layer in settings.net_layers():
        for direction in ("forward", "backward"):
            row = describe(settings, Step("layer", layer.name, direction))
            if layer.name in times:
                row["samples_ms"] = {name: [ms] for name, ms in times[layer.name].items()}
            rows.append(row)
    report: dict[str, Any] = json.loads(json.dumps({"settings": asdict(settings), "rows": rows}))
    return report


def test_points_are_the_reports_forward_layers() -> None:
    points = roofline.points_of_report(small_report(), H100)
    assert [(point.name, point.measured) for point in points] == [
        ("inc.c1", {"triton": 0.001, "aten": 0.002}),
        ("inc.c2", {"triton": 0.003, "aten": 0.002}),
        ("outc", {"triton": 0.004}),
    ]
    layers = {layer.name: layer for layer in Settings(size=32, batch=2, features=(8, 16)).net_layers()}
    assert [point.bound for point in points] == [point_of(layers[point.name], H100).bound for point in points]
    assert [charts.verdict(point) for point in points] == ["faster", "slower", "alone"]


def test_the_plot_names_rates_layers_and_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    texts: list[str] = []
    save = Figure.savefig

    def note(figure: Figure, *args: Any, **kwargs: Any) -> None:
        save(figure, *args, **kwargs)
        texts.extend(text.get_text() for text in figure.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", note)
    charts.plot_roofline(roofline.points_of_report(small_report(), H100), H100, tmp_path / "roofline.png")
    assert {"inc.c1", "inc.c2", "outc", "peak rates, memory: 3 TB/s, matrix products: 790 TFLOP/s"} <= {*texts}
    assert {style["label"] for style in charts._STYLES.values()} <= {*texts}
    with Image.open(tmp_path / "roofline.png") as image:
        assert image.format == "PNG"
    with pytest.raises(ValueError, match="at least one point"):
        charts.plot_roofline([], H100, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# --- peak rates, measured ---


class SteppedClock:
    """Each mark is `step()` seconds after the one before."""

    def __init__(self, step: Callable[[], float]) -> None:
        self.time, self._step = 0.0, step

    def prepare(self) -> None: ...

    def mark(self) -> float:
        self.time += self._step()
        return self.time

    def wait(self) -> None: ...

    def elapsed(self, begin: float, end: float) -> float:
        return end - begin


def test_burst_is_the_beginning_and_steady_the_second_half() -> None:
    """A device that slows down from 1 s to 2 s after 25 runs."""
    done, rests = [], []
    clock = SteppedClock(lambda: 1.0 if len(done) <= 25 + 3 else 2.0)
    burst, steady = roofline.burst_and_steady(
        lambda: done.append(1), clock, seconds=100.0, now=lambda: clock.time, pause=rests.append
    )
    assert (burst.median, burst.p90, steady.p10, steady.median) == (1.0, 1.0, 2.0, 2.0)
    assert (rests, burst.samples, steady.samples) == ([1.0], 10, (len(done) - 3) // 2)


def test_rates_are_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, clock = torch.device("cpu"), torch.device("cuda"), SteppedClock(lambda: 0.5)
    monkeypatch.setitem(roofline.SIZES, "cpu", (1 << 20, 16, 0.0))
    found = json.loads(json.dumps(roofline.measure_peak_rates(cpu, clock)))
    assert found["copy"]["gb_per_s"] == pytest.approx(2 * (1 << 20) / 0.5 / 1e9)
    matmul = found["matmul"]
    assert matmul["burst_tflops"] == matmul["steady_tflops"] == pytest.approx(2 * 16**3 / 0.5 / 1e12)
    assert found["l2"] == {"gb_per_s": None, "reason": "the device is cpu, not cuda"}
    monkeypatch.setattr(roofline, "_l2_reader", lambda device: (lambda: None, 1 << 20))
    assert roofline.l2_rate(cuda, clock)["gb_per_s"] == pytest.approx((1 << 26) / 0.5 / 1e9)
    monkeypatch.setattr(roofline, "_l2_reader", lambda device: {}["no compiler"])
    assert roofline.l2_rate(cuda, clock) == {"gb_per_s": None, "reason": "KeyError: 'no compiler'"}


# --- the command ---


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline", "--tflops", "790", "--tbps", "3.0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| layer | GFLOP/img | MB/img | bound µs | eager µs |"
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
