"""Processes that answer one request after another, and may hang, crash or lose their GPU without taking ours along."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Seconds kept for ending a process and writing the files, and the least that something is begun with.
RESERVE, LEAST = 6.0, 2.0


class Spawned(contextlib.AbstractContextManager):
    """A process that gives answer(*arguments, request) for one request after the other.

    It is started at the first request, and anew at the next after each that ended it. path: where it looks for modules
    first.
    """

    def __init__(self, answer: Callable[..., Any], *arguments: Any, path: Path | None = None) -> None:
        self._answer, self._arguments, self._path = answer, arguments, path
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
            if self._process.pid is not None:  # A signal may have come while it was being started.
                self._process.kill()
                self._process.join()
            self._connection.close()
            self._process = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._answer, self._arguments, theirs), daemon=True)
        paths = sys.path
        try:  # A spawned process takes over the paths.
            sys.path = [*([] if self._path is None else [str(self._path)]), *paths]
            self._process.start()
        finally:
            sys.path = paths
        theirs.close()  # So that the process's death ends our reading.


def _serve(answer: Callable[..., Any], arguments: tuple[Any, ...], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process.
    with contextlib.suppress(EOFError):  # The parent is gone.
        while True:
            connection.send(answer(*arguments, connection.recv()))


class Budget:
    """Seconds that are left of a total, by `now`."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._end, self._now = now() + seconds, now

    def left(self) -> float:
        """Negative once it is spent."""
        return self._end - self._now()
