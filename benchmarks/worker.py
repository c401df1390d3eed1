"""A process that measures step after step, and may hang, crash or lose its GPU without taking the report along."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

from .measure import run_step
from .steps import Row, Settings, Step, describe


class Worker:
    """Runs steps in a process of its own, started at the first one and anew after each that ended it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: Any = None
        self._connection: Any = None

    def run(self, step: Step, timeout: float) -> Row:
        """The step's row within `timeout` seconds; of a step that gives none, one that says why."""
        if self._process is None:
            self._start()
        try:
            self._connection.send(step)
            if not self._connection.poll(timeout):
                return self._end(step, "timed out", f"no result after {timeout:.0f} s")
            row, is_usable = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(timeout=5)
            return self._end(step, "failed", f"the process ended with exit code {self._process.exitcode}")
        if not is_usable:
            self.close()
        return row

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(self._settings, theirs), daemon=True)
        self._process.start()
        theirs.close()  # So that the process's death ends our reading.

    def _end(self, step: Step, status: str, reason: str) -> Row:
        self.close()
        return describe(self._settings, step) | {"status": status, "reason": reason}


def serve(settings: Settings, connection: Connection) -> None:
    """Answer each step with its row and whether this process can go on."""
    while True:
        try:
            step = connection.recv()
        except EOFError:  # The report is gone.
            return
        try:
            row = run_step(settings, step)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            row = describe(settings, step) | {"status": "failed", "reason": reason[:2000]}
        connection.send((row, _clean_up(settings)))


def _clean_up(settings: Settings) -> bool:
    """Free the step's memory; False where an error has left the GPU's context unusable."""
    import torch

    if settings.device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
