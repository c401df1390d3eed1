"""Every op is timed, by the command and by pytest-benchmark, and nothing that is wrong is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastunet.benchmarks import ops as bench
from fastunet.benchmarks.__main__ import main

import fastunet
from fastunet import ops
from fastunet.testing import parity

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # Listing needs no GPU.
def test_every_op_is_timed_in_every_dtype_and_direction(device: str) -> None:
    works = list(bench.works(torch.device(device)))
    assert len({work.group for work in works}) == len(works)
    assert {work.case.op for work in works} == set(ops.__all__)
    dtypes = {torch.float32, torch.bfloat16} | ({torch.float16} if device == "cuda" else set())
    timed = {(work.case.op, work.dtype, work.direction) for work in works}
    without = {case.op for case in parity.cases() if not case.backward}
    assert len(timed) == len(dtypes) * (2 * len(ops.__all__) - len(without))
    assert {"fastunet", bench.TORCH} <= {each.name for each in works[0].providers(CPU)}


def test_a_wrong_op_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench.SIZES, "cpu", (1, 4, 8, 8, 4))
    command = ["ops", "--device", "cpu", "--dtype", "float32", "--only", "max_pool2x2", "--rounds", "3", "--out"]
    assert main([*command, str(tmp_path / "right.json")]) == 0
    forward, backward = json.loads((tmp_path / "right.json").read_text())["rows"]
    assert {name: len(samples) for name, samples in forward["samples_ms"].items()} == {"fastunet": 3, "torch": 3}
    assert f"{backward['ratios']['torch']['ratio']:.2f} (" in capsys.readouterr().out
    pool = ops.max_pool2x2
    monkeypatch.setattr(ops, "max_pool2x2", lambda x: 1.1 * pool(x))
    assert main([*command, str(tmp_path / "wrong.json")]) == 1
    for row in json.loads((tmp_path / "wrong.json").read_text())["rows"]:
        assert row["missing"]["fastunet"].startswith("parity failed: max_pool2x2: y")
        assert "samples_ms" not in row


@pytest.mark.parametrize("case", parity.cases_of(1, 4, 8, 8, 4), ids=str)
def test_torchs_compositions_are_right(case: parity.Case) -> None:
    """The two compositions that `reference` lacks among them."""
    with fastunet.backend("aten"):
        parity.check(case, torch.float32, CPU, run=bench.run_reference)


@pytest.mark.slow  # pytest-benchmark's look at the processor may take more than ten seconds.
def test_pytest_writes_the_facts_of_each_benchmark(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    # As a worker of pytest-xdist it would run, and measure nothing.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    options = ["-p", "no:cacheprovider", "benchmarks/", "-k", "pool2x2", "--benchmark-only", f"--benchmark-json={out}"]
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=inherited)
    assert done.returncode == 0, done.stdout
    found = json.loads(out.read_text())["benchmarks"]
    assert {each["extra_info"]["implementation"] for each in found} >= {"fastunet", "torch"}
    for each in found:
        assert {"device", "dtype", "commit", "shapes", "direction"} <= set(each["extra_info"])
        assert each["stats"]["rounds"] >= 3


@pytest.mark.slow  # Imports every test.
def test_the_tests_are_found_without_the_extra_train() -> None:
    """A machine that is there for its GPU may have no more than the kernels need: one error would stop all tests."""
    pytest.importorskip("triton", reason="the kernels' tests are among them")
    missing = ("accelerate", "imagecodecs", "kornia", "matplotlib", "monai", "PIL", "rich", "safetensors", "tifffile")
    missing += ("typer",)
    script = f"import sys; sys.modules.update(dict.fromkeys({missing})); import pytest; sys.exit(pytest.main())"
    options = "--collect-only -q -m interpreter -p no:cacheprovider -p no:xdist"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": options}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"SKIPPED .* needs the extra train", done.stdout)
    assert "tests/kernels/test_kernels_conv3x3.py::" in done.stdout
