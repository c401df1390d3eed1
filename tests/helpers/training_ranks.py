"""A training in two processes, as torchrun begins them."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import torch
from killed_training import FORKS
from stopped_training import losses_of, stop_at

from fastunet.checks import FastUNetError
from fastunet.data import DataOptions, Pair, survey
from fastunet.data.summary import Facts, read_facts
from fastunet.train.loop import TrainConfig


def train_in_ranks(data: Path, out: Path, config: TrainConfig | None, results: Path, **options: Any) -> list[int]:
    """Train in two processes; return their exit codes. Rank R writes its losses, or its error, as results/R.json.

    options: `resume`; `dies_at`, the step after which the second one is killed; `readings`, a file that gets a line for
    each pair that a rank surveys.
    """
    results.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [FORKS.Process(target=_rank, args=(rank, port, data, out, config, results, options)) for rank in range(2)]
    for each in ranks:
        each.start()
    deadline = time.monotonic() + 60
    for each in ranks:
        each.join(max(0.0, deadline - time.monotonic()))
    codes = [each.exitcode for each in ranks]
    for each in ranks:
        each.kill()
    assert None not in codes, f"exit codes a minute later: {codes}"
    return codes


def _rank(
    rank: int, port: int, data: Path, out: Path, config: TrainConfig | None, results: Path, options: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
    os.environ |= {key: str(value) for key, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dies_at = options.pop("dies_at", None)
    stop = stop_at(dies_at, lambda: os.kill(os.getpid(), signal.SIGKILL)) if rank == 1 else lambda progress: None
    if (readings := options.pop("readings", None)) is not None:
        _record(rank, readings)
    try:
        result: Any = losses_of(data, out, config, stop=stop, **options)
    except FastUNetError as error:
        result = str(error)
    (results / f"{rank}.json").write_text(json.dumps(result))


def _record(rank: int, readings: Path) -> None:
    def recorded(pair: Pair, options: DataOptions) -> Facts:
        with readings.open("a") as file:
            file.write(f"{rank} {pair.stem}\n")
        return read_facts(pair, options)

    survey.read_facts = recorded
