"""Processes that answer one request after another, and may hang, crash or lose their GPU without taking ours along."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from typing import Any


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


class Budget:
    """Seconds that are left of a total, by `now`."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._end, self._now = now() + seconds, now

    def left(self) -> float:
        """Negative once it is spent."""
        return self._end - self._now()
