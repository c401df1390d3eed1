"""`python -m benchmarks unet --host`: both nets are timed, in turn, and the file is one the README's table takes."""

from __future__ import annotations

import json
from pathlib import Path

import generate
import torch
from fastunet.benchmarks.__main__ import main


def test_the_command_writes_what_the_readmes_table_takes(tmp_path: Path) -> None:
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
