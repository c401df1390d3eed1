"""Processes that answer one request after another, and may hang, crash or lose their GPU without taking ours along."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from .measure import run_step
from .steps import Row, Settings, Step, describe, failure


class Spawned:
    """A process that answers one request after the other: serve(*arguments, connection), which receives and sends.

    It is started at the first request, and anew at the next after each that ended it.
    """

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:
        self._serve, self._arguments = serve, arguments
        self._process: Any = None
        self._connection: Any = None

    def ask(self, request: Any, timeout: float) -> Any:
        """The answer. TimeoutError if it takes over `timeout` seconds, ChildProcessError if the process ends first."""
        if self._process is None:
            self._start()
        error: OSError
        try:
            self._connection.send(request)
            if self._connection.poll(timeout):
                return self._connection.recv()
            error = TimeoutError(f"no result after {timeout:.0f} s")
        except (EOFError, OSError):
            self._process.join(timeout=5)
            error = ChildProcessError(f"the process ended with exit code {self._process.exitcode}")
        self.close()
        raise error

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
        self._process = context.Process(target=self._serve, args=(*self._arguments, theirs), daemon=True)
        self._process.start()
        theirs.close()  # So that the process's death ends our reading.


class Worker:
    """Runs steps in a process of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process = Spawned(serve, settings)

    def run(self, step: Step, timeout: float) -> Row:
        """The step's row within `timeout` seconds; of a step that gives none, one that says why."""
        try:
            row, is_usable = self._process.ask(step, timeout)
        except (TimeoutError, ChildProcessError) as error:
            status = "timed out" if isinstance(error, TimeoutError) else "failed"
            return describe(self._settings, step) | {"status": status, "reason": str(error)}
        if not is_usable:
            self.close()
        return row

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.close()


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
            row = describe(settings, step) | failure(error)
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
