"""A training in a process of its own, and what must hold of its folder after the process was killed at any moment."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from stopped_training import TINY

from fastunet.data.synthetic import write_dataset
from fastunet.pretrained import read_weights
from fastunet.train.checkpoint import CONFIG, checkpoints, find_damage
from fastunet.train.loop import train

# Imports everything once, then forks.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "accelerate.state", "matplotlib.backends.backend_agg"])
SMALL = replace(TINY, steps=12, crop=16)


def start(data: Path, out: Path, resume: bool) -> multiprocessing.process.BaseProcess:
    process = FORKS.Process(target=run, args=(data, out, resume))
    process.start()
    return process


def run(data: Path, out: Path, resume: bool) -> None:
    torch.set_num_threads(1)
    train(None if resume else data, out, None if resume else SMALL, resume=resume)


def check_files(out: Path) -> None:
    """Every file under its own name is whole."""
    for path in out.glob("[!.]*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            read_weights(path)
        elif path.suffix == ".png":
            Image.open(path).load()
    for folder in checkpoints(out):
        assert find_damage(folder) is None


def kill_at_random(data: Path, out: Path, times: int, seconds: float, choose: random.Random) -> int:
    """Start, kill after at most so many seconds, check and go on, so many times; how many died of it."""
    killed = 0
    for _ in range(times):
        begun = (out / CONFIG).exists()
        # Without a checkpoint a run may be begun anew as well.
        process = start(data, out, resume=begun and (bool(checkpoints(out)) or choose.random() < 0.5))
        process.join(choose.uniform(0, seconds))
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), "a dead end"
        if out.exists():
            check_files(out)
        if process.exitcode == 0:
            break
        killed += 1
    return killed


def kill_runs(folder: Path, kills: int, seed: int = 0) -> int:
    """Kill trainings so many times, up to five times each, and finish each; all end like one that was left alone."""
    choose = random.Random(seed)
    write_dataset(folder / "data", 4, size=32)
    run(folder / "data", folder / "whole", False)
    expected = read_weights(folder / "whole/model.safetensors")
    killed, number, seconds = 0, 0, 2.0
    while killed < kills:
        out = folder / f"run{number}"
        number += 1
        killed += kill_at_random(folder / "data", out, min(5, kills - killed), seconds, choose)
        begun, started = (out / CONFIG).exists(), time.perf_counter()
        last = start(folder / "data", out, resume=begun)
        last.join()
        assert last.exitcode == 0, "a dead end"
        # What is left of a training takes at most a whole one's time, whatever else the machine does.
        seconds = time.perf_counter() - started
        print(f"{killed} kills, {number} runs", flush=True)
        check_files(out)
        weights = read_weights(out / "model.safetensors")
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert {path.name for path in out.iterdir()} == {path.name for path in (folder / "whole").iterdir()}
    return killed


if __name__ == "__main__":
    print(kill_runs(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])), "kills: no dead end, no damaged file")
