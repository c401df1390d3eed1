"""The pytest-benchmark suite: it covers every op and layer, skips by its estimate, and times nothing that is wrong."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastunet.benchmarks import bench_layers, bench_unet, suite, suite_ops
from fastunet.benchmarks.suite import Options, Work

import fastunet
from fastunet import ops
from fastunet.testing import parity

ROOT = Path(__file__).parents[1]
FILES = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py"))
CPU = Options(torch.device("cpu"), 0.5)
CUDA = Options(torch.device("cuda"), 2.0)


def modules() -> list[Any]:
    return [importlib.import_module(f"fastunet.benchmarks.{name}") for name in FILES]


def test_every_op_and_every_layer_is_timed_on_a_cpu() -> None:
    timed: dict[str, set[str]] = {"op": set(), "layer": set(), "net": set()}
    for module in modules():
        works = module.works(CPU)
        assert len({work.name for work in works}) == len(works), module.__name__
        for work in works:
            if not suite.obstacle(work, CPU, memory=1e12):
                kind = next(key for key in ("layer", "net", "op") if key in work.info)
                timed[kind].add(work.info[kind])
    assert timed["op"] == set(ops.__all__)
    assert len(timed["layer"]) == 19 + 4
    assert timed["net"] == set(bench_unet.NETS)


def test_a_gpu_gets_every_dtype_and_the_sizes_of_use() -> None:
    """Listing needs no GPU."""
    dtypes = ["bfloat16", "float16", "float32"]
    works = bench_unet.works(CUDA)
    assert {(work.info["task"], work.info["batch"], work.info["side"]) for work in works} == {
        *(("inference", batch, side) for batch in (1, 16) for side in (256, 512, 1024)),
        *(("training", batch, 512) for batch in (8, 16)),
    }
    for work in (works, bench_layers.works(CUDA)):
        assert sorted({each.info["dtype"] for each in work}) == dtypes
    assert sorted({work.info["dtype"] for work in suite_ops.op_works(ops.__all__, CUDA)}) == dtypes


def work(name: str = "w", **given: Any) -> Work:
    return Work(**{"name": name, "group": "g", "prepare": list, "flops": 1e9, "memory": 1e6, **given})


def test_what_does_not_fit_is_left_out_with_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert suite.obstacle(work(), CPU, memory=2e6) == ""
    slow = suite.obstacle(work(flops=4e10), CPU, memory=2e6)
    assert slow == "estimated 1 s a call (40 GFLOP at 40 GFLOP/s), more than --bench-seconds 0.5"
    large = suite.obstacle(work(memory=3e9), CPU, memory=2e9)
    assert large == "estimated 3 GB, more than the 2 GB that may be used"
    everything = Options(CPU.device, 0.5, everything=True)
    assert suite.obstacle(work(flops=1e15, memory=1e15), everything, memory=1.0) == ""
    assert suite.obstacle(work(unavailable="not here"), everything) == "not here"


def test_the_memory_of_a_net_is_at_least_what_it_allocates() -> None:
    layers = bench_unet.unet_layers(bench_unet.meta_unet(3, 2, (64, 128)), 2, 64, 64)
    weights = 4 * sum(p.numel() for p in fastunet.UNet(3, 2, features=(64, 128)).parameters())
    pixels = 2 * 64 * 64 * 64 * 4
    inference, training = (
        bench_unet.memory_of(layers, (64, 128), torch.float32, training=flag) for flag in (False, True)
    )
    assert inference > weights + 3 * pixels
    assert training > 4 * weights + 3 * 4 * pixels


def test_rounds_and_calls_follow_the_time_of_one() -> None:
    assert suite.pace(1e-4) == (25, 100)
    assert suite.pace(0.02) == (12, 1)
    assert suite.pace(5.0) == (3, 1)
    assert suite.pace(0.0099)[0] <= 50


class FakeBenchmark:
    """pytest-benchmark's fixture, which only calls."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.group = ""
        self.rounds: list[tuple[int, int]] = []

    def pedantic(self, function: Callable[[], Any], *, rounds: int, iterations: int, warmup_rounds: int) -> None:
        self.rounds.append((rounds, iterations))
        for _ in range(4):
            function()


def test_the_calls_take_their_inputs_in_turn_and_the_facts_are_kept() -> None:
    benchmark, seen = FakeBenchmark(), list[str]()
    runs = [lambda: seen.append("a"), lambda: seen.append("b")]
    given = work(prepare=lambda: runs, info={"implementation": "ours"}, after=lambda run: {"peak_bytes": 7})
    suite.time_work(benchmark, given, CPU)
    assert seen == ["a", "b", "a", "a", "b", "a", "b"]  # Each once, one to know the time, then in turn.
    assert benchmark.extra_info["flops"] == 1e9
    assert {"implementation": "ours", "peak_bytes": 7}.items() <= benchmark.extra_info.items()
    assert {"device", "commit"} <= set(benchmark.extra_info)
    assert benchmark.group == "g"


def test_a_wrong_op_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suite_ops.SIZES, "cpu", (1, 4, 8, 8, 4))
    pool = ops.max_pool2x2
    monkeypatch.setattr(ops, "max_pool2x2", lambda x: 1.1 * pool(x))
    wrong = {each.info["implementation"]: each for each in suite_ops.op_works(["max_pool2x2"], CPU)}
    benchmark = FakeBenchmark()
    with pytest.raises(AssertionError, match="max_pool2x2: y"):
        suite.time_work(benchmark, wrong["fastunet"], CPU)
    assert benchmark.rounds == []
    suite.time_work(benchmark, wrong[suite_ops.TORCH], CPU)
    assert len(benchmark.rounds) == 1


@pytest.mark.parametrize("case", parity.cases_of(1, 4, 8, 8, 4), ids=suite_ops.label_of)
def test_torchs_compositions_are_checked_as_ours_are(case: parity.Case) -> None:
    """The two compositions that `reference` lacks among them."""

    def wrong(*arguments: Any) -> Any:
        outputs = tuple(1.1 * y for y in parity.outputs_of(suite_ops.run_reference(*arguments)))
        return outputs if len(outputs) > 1 else outputs[0]

    with fastunet.backend("aten"):
        parity.check(case, torch.float32, CPU.device, run=suite_ops.run_reference)
        with pytest.raises(AssertionError, match=f"{case.op}: "):
            parity.check(case, torch.float32, CPU.device, run=wrong)


def run_suite(*arguments: str) -> subprocess.CompletedProcess[str]:
    # As a worker of pytest-xdist it would run, and measure nothing.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**inherited, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow  # pytest-benchmark's look at the processor may take more than ten seconds.
def test_the_command_writes_the_facts_of_each_benchmark(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run_suite("benchmarks/bench_max_pool2x2.py", f"--benchmark-json={out}", "--bench-device", "cpu")
    assert done.returncode == 0, done.stdout
    found = json.loads(out.read_text())["benchmarks"]
    assert {each["extra_info"]["implementation"] for each in found} == {"fastunet", "torch"}
    for each in found:
        facts = each["extra_info"]
        assert {"flops", "input_bytes", "device", "layout", "dtype", "commit", "shapes", "direction"} <= set(facts)
        assert each["stats"]["rounds"] >= 3
    assert re.search(r"SKIPPED \[\d+\].*the device is cpu, not cuda", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bench-seconds", "0"], "--bench-seconds: expected more than 0, got 0"),
        (["--bench-device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_bad_options_are_one_error(arguments: list[str], message: str) -> None:
    done = run_suite("benchmarks/bench_max_pool2x2.py", *arguments)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_plain_pytest_leaves_the_benchmarks_alone() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert settings["testpaths"] == ["tests"]
    assert "bench_*.py" in settings["python_files"]


def test_the_tests_are_found_without_the_extra_train() -> None:
    """A machine that is there for its GPU may have no more than the kernels need: one error would stop all tests."""
    pytest.importorskip("triton", reason="the kernels' tests are among them")
    missing = ("accelerate", "imagecodecs", "kornia", "matplotlib", "monai", "PIL", "rich", "safetensors", "tifffile")
    missing += ("torchmetrics", "typer")
    script = f"import sys; sys.modules.update(dict.fromkeys({missing})); import pytest; sys.exit(pytest.main())"
    options = "--collect-only -q -m interpreter -p no:cacheprovider -p no:xdist"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": options}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"SKIPPED .* needs the extra train", done.stdout)
    assert "tests/test_kernels_conv3x3.py::" in done.stdout
