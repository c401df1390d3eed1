"""A training in several processes (ranks), one a GPU, as torchrun and accelerate launch begin them.

Each rank takes its part of every batch, and of the images to be validated on; the first one alone writes. What decides
how the training goes on (the loss, a request to stop, the clock) is the same number in all of them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from fastunet import dispatch
from fastunet.checks import ConfigError, FastUNetError
from fastunet.train.config import TrainConfig, is_faster_in_bf16

LONGEST_READING = timedelta(days=1)  # that the other ranks wait for
Result = TypeVar("Result")


def is_first_rank() -> bool:
    """Whether this process is the one that writes, as its launcher says: before the ranks have met."""
    return int(os.environ.get("RANK", 0)) == 0


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Choose device and precision, and meet the other ranks.

    Raises ConfigError where the machine does not have them.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: expected a CUDA device for 'cuda', got none")
    cpu = config.device == "cpu"
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if is_faster_in_bf16(cpu) else "fp32"
    # accelerate keeps device and precision for the whole process; a second training may choose others.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=cpu)
        if precision == "fp16" and accelerator.device.type == "cpu":  # which accelerate takes, and trains in float32
            raise ValueError("a CPU trains in fp32 or bf16")
    except ValueError as error:
        raise ConfigError(f"precision: expected one that the device has, got {precision}: {error}") from error
    if config.sync_batch_norm and accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        raise ConfigError("sync_batch_norm: expected GPUs, whose torch alone has it, got processes on the CPU")
    return accelerator


def agree(accelerator: Accelerator, loss: float, stopping: bool, seconds: float) -> tuple[float, bool, float]:
    """Return the mean loss of all ranks, whether any of them is to stop, and the first one's clock."""
    clock = seconds if accelerator.is_main_process else 0.0
    shared = torch.tensor([loss / accelerator.num_processes, stopping, clock], dtype=torch.float64)
    mean, stops, seconds = sum_of_ranks(shared, accelerator.device).tolist()
    return mean, stops > 0, seconds


def of_first_rank(make: Callable[[], Result]) -> Result:
    """Have the first rank make something, and return it in all of them; what it raises is raised in all."""
    if dispatch.ranks() == 1:
        return make()
    # Of its own, as that of GPUs waits for minutes only.
    group = torch.distributed.new_group(backend="gloo", timeout=LONGEST_READING)
    outcome: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome = [make()]
        except Exception as error:
            outcome = [error]
    torch.distributed.broadcast_object_list(outcome, src=0, group=group)
    torch.distributed.destroy_process_group(group)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def sum_of_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Add up what each rank has, by way of the device on which they meet."""
    if dispatch.ranks() > 1:
        values = values.to(device)
        torch.distributed.all_reduce(values)
    return values


def least_of_ranks(value: int, accelerator: Accelerator) -> int:
    """Return the least of the numbers that the ranks have."""
    if accelerator.num_processes == 1:
        return value
    return int(accelerator.gather(torch.tensor([value], device=accelerator.device)).min())


@contextmanager
def naming_lost_ranks(accelerator: Accelerator, out: Path) -> Iterator[None]:
    """Raise FastUNetError where a rank has ended without the others, in place of what its broken connection raises."""
    try:
        yield
    except FastUNetError:
        raise
    except RuntimeError as error:
        signs_of_gloo = ("gloo", "Connection closed by peer", "Connection reset by peer")
        is_lost = isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in signs_of_gloo)
        if accelerator.num_processes == 1 or not is_lost:
            raise
        text = " ".join(str(error).split())
        raise FastUNetError(
            f"process {accelerator.process_index}: expected all {accelerator.num_processes} processes to go on, got "
            f"one that has ended ({text}); its own error says why, and --resume continues from {out}"
        ) from error


@contextmanager
def stop_requests(accelerator: Accelerator) -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM asks to stop; in a single process a second one interrupts at once.

    Of several, torchrun passes on what the terminal has sent them already: there it kills what does not end.
    """
    requests: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if requests and accelerator.num_processes == 1:
            raise KeyboardInterrupt
        requests.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = {number: signal.signal(number, ask) for number in numbers}
    except ValueError:  # not the main thread: whoever runs it there handles signals
        previous = {}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
