"""`fastunet bench` and `unet --host`: what they leave, and say of wrong or missing providers and bad arguments."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

pytest.importorskip("rich", reason="needs the extra train")

import generate
import numpy as np
import torch
from command import error_of, fastunet
from fastunet.benchmarks.__main__ import main
from fastunet.benchmarks.cases import Settings
from fastunet.benchmarks.charts import draw
from fastunet.benchmarks.providers import OURS, OURS_FROZEN, Provider
from fastunet.benchmarks.results import Unavailable
from fastunet.benchmarks.runs import measured, prepared
from fastunet.benchmarks.runtimes import NAMES, unavailable
from fastunet.benchmarks.tables import report_of
from fastunet.benchmarks.unet import tables
from PIL import Image

from fastunet import dispatch

TINY = Settings("cpu", "float32", 16, 1, (4, 8), rounds=3, warmup=1, compiles=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("bench") / "deep" / "er"
    size = ["--size", "16", "--batch", "2", "--features", "4,8", "--dtype", "float32"]
    result = fastunet("bench", "--quick", "--device", "cpu", "--out", out, *size)
    return result.stdout, out


def test_the_json_has_every_sample_and_the_ratios_of_its_rounds(done: tuple[str, Path]) -> None:
    report = json.loads((done[1] / "bench.json").read_text())
    assert set(report) == {"summary", "environment", "settings", "rows"}
    settings = report["settings"]
    assert (settings["size"], settings["batch"], settings["features"], settings["dtype"]) == (16, 2, [4, 8], "float32")
    assert settings["threads"] == torch.get_num_threads()
    assert report["environment"]["torch"] == torch.__version__
    assert [row["name"] for row in report["rows"]][:2] == ["inference", "training"]
    assert {row["name"] for row in report["rows"] if row["kind"] == "layer"} == {
        *("inc.c1", "inc.c2", "down1.c1", "up1.up", "up1.c1", "outc")
    }
    for row in report["rows"]:
        assert row["status"] == "ok"
        assert OURS in row["samples_ms"]
        for name, ratio in row["ratios"].items():
            each = [a / b for a, b in zip(row["samples_ms"][name], row["samples_ms"][OURS], strict=True)]
            assert ratio["ratio"] == pytest.approx(np.median(each))
            assert (ratio["p10"], ratio["p90"]) == pytest.approx(tuple(np.quantile(each, [0.1, 0.9])))
            assert ratio["rounds"] == len(each) <= settings["rounds"]
        assert all(reason for reason in row["missing"].values())
    nets = {row["name"]: row["ratios"] for row in report["rows"] if row["kind"] == "net"}
    exported = {name for name in NAMES if not unavailable(name, torch.device("cpu"), torch.float32)}
    frozen = {OURS_FROZEN} if dispatch.prepares_nets(torch.empty(1), torch.float32, []) else set()
    assert set(nets["inference"]) == {"eager", "eager channels_last", "eager folded"} | frozen | exported
    assert report["summary"]["inference"] == nets["inference"]
    assert report["summary"]["training"] == nets["training"]
    assert report["summary"]["not_measured"] == 0
    assert report["summary"]["layers_forward"]["onednn eager"]["compared"] == 6


def test_the_terminal_shows_all_that_the_file_has(done: tuple[str, Path]) -> None:
    output, out = done
    report = json.loads((out / "bench.json").read_text())
    for row in report["rows"]:
        for found in row.get("ratios", {}).values():
            assert f"{found['ratio']:.2f}" in output
    assert {path.name for path in out.iterdir()} == {"bench.json", "bench.png"}
    for text in ("inference", "training", "eager folded", "up1.c1", "CUDA graphs need CUDA", str(out)):
        assert text in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "expected one of auto, cpu, cuda, got 'tpu'"),
        (["--dtype", "int8"], "expected one of auto, float32, bfloat16, float16, got 'int8'"),
        (["--features", "4,x"], "got '4,x'"),
        (["--features", "4"], "two or more numbers from 1, got (4,)"),
        (["--size", "3", "--features", "4,8,16"], "expected size >= 4 and batch >= 1, got 3 and 1"),
        (["--batch", "0"], "got 256 and 0"),
        *(([option, 400 * "9"], "expected at most 65536, got 999") for option in ("--size", "--batch")),
        (["--features", "4," + 400 * "9"], "expected at most 65536, got 999"),
        (["--quick", "--all"], "expected --quick or --all, got both"),
    ],
)
def test_bad_arguments_are_one_error(arguments: list[str], message: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert message in error_of("bench", "--device", "cpu", "--out", out, *arguments)
    assert not out.exists()


def provider(name: str, unavailable: str = "") -> Provider:
    return Provider(name, "NHWC", "float32", lambda: lambda: name, unavailable)


def compared(*providers: Provider, check: Any = lambda each, result: None) -> dict[str, Any]:
    return measured(TINY, *prepared(providers, lambda each: [each.prepare()], check))


def test_whatever_becomes_of_a_provider_has_its_reason() -> None:
    def check(each: Provider, result: str) -> None:
        assert result == each.name
        if each.name == "wrong":
            raise AssertionError("off by one")

    refusing = Provider("refuses", "NHWC", "float32", MagicMock(side_effect=Unavailable("no plan")))
    broken = Provider("breaks", "NHWC", "float32", MagicMock(side_effect=RuntimeError("first line\nsecond line")))
    others = [provider("wrong"), refusing, broken, provider("absent", "not installed")]
    row = compared(provider(OURS), *others, provider("right"), check=check)
    assert row["status"] == "ok"
    assert row["missing"] == {
        "wrong": "parity failed: off by one",
        "refuses": "no plan",
        "breaks": "RuntimeError: first line\nsecond line",
        "absent": "not installed",
    }
    assert set(row["samples_ms"]) == {OURS, "right"}
    assert set(row["ratios"]) == {"right"}


def test_a_sample_of_a_small_net_on_a_cpu_is_the_mean_of_many_calls() -> None:
    calls = {OURS: 0, "other": 0}

    def run(name: str) -> None:
        calls[name] += 1
        time.sleep(0.002)

    runs = {name: [functools.partial(run, name)] for name in calls}
    row = measured(TINY, {"kind": "net"}, runs)
    assert 1 < row["calls"] <= 50
    assert calls["other"] == row["calls"] * (TINY.rounds + TINY.warmup) == calls[OURS] - 4
    assert min(row["samples_ms"]["other"]) >= 2
    assert "calls" not in measured(TINY, {"kind": "layer"}, runs)


def test_cudnn_tries_its_algorithms_for_the_provider_and_not_for_what_it_is_checked_with() -> None:
    states: list[tuple[str, bool]] = []

    def note(what: str) -> None:
        states.append((what, torch.backends.cudnn.benchmark))

    def prepare(each: Provider) -> list[Any]:
        note("prepare")
        return [lambda: note("run")]

    prepared([provider(OURS)], prepare, lambda each, result: note("check"))
    assert states == [("prepare", True), ("run", True), ("check", False)]


def test_a_wrong_net_of_ours_ends_with_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import fastunet as library

    forward = library.UNet.forward
    monkeypatch.setattr(library.UNet, "forward", lambda self, x: 1.1 * forward(self, x))
    size = ["--size", "16", "--features", "4,8", "--dtype", "float32"]
    result = fastunet("bench", "--quick", "--device", "cpu", "--out", tmp_path, *size, code=1)
    assert "fastunet itself failed in inference, training" in result.stderr
    assert "distance to float64" in result.stdout
    assert json.loads((tmp_path / "bench.json").read_text())["summary"]["not_measured"] == 2


def test_losing_cases_are_drawn_and_listed_like_winning_ones(tmp_path: Path) -> None:
    row = {
        **compared(provider(OURS), provider("slow"), provider("fast")),
        "kind": "net",
        "name": "inference",
        "flops": 10**9,
        "images": 1,
        "ratios": {
            "slow": {"ratio": 3.25, "p10": 3.0, "p90": 3.5, "rounds": 3},
            "fast": {"ratio": 0.25, "p10": 0.2, "p90": 0.3, "rounds": 3},
        },
    }
    report = report_of(TINY, [row])
    draw(report_of(TINY, []), tmp_path / "empty.png")
    draw(report, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):
        assert (pixels == colour).all(1).sum() > 300, colour
    shown = "\n".join(tables(report))
    assert "3.25" in shown
    assert "0.25" in shown


def test_the_hosts_time_is_a_file_that_the_pages_tables_take(tmp_path: Path) -> None:
    out, threads = tmp_path / "benchmarks/results/cpu/host.json", torch.get_num_threads()
    assert main(["unet", "--host", "--rounds", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [row["name"] for row in found["rows"]] == ["inference", "training"]
    for row in found["rows"]:
        assert {name: len(samples) for name, samples in row["samples_ms"].items()} == {
            "fastunet": 1,
            "eager channels_last": 1,
        }
        times = row["times_ms"]["fastunet"]
        assert 0 < times["p10"] <= times["median"] <= times["p90"]
    assert torch.get_num_threads() == threads
    assert "images of 16x16, batches of 1, 1 threads" in generate.speed_tables(tmp_path / "benchmarks/results")
