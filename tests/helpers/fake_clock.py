"""A clock for tests of what times: no test waits, and every sample is known beforehand."""

from __future__ import annotations

from collections.abc import Callable


class FakeClock:
    """Time passes only in runs; events are noted in order."""

    def __init__(self) -> None:
        self.time, self.log = 0.0, []

    def prepare(self) -> None:
        self.log.append("prepare")

    def mark(self) -> float:
        return self.time

    def wait(self) -> None:
        self.log.append("wait")

    def elapsed(self, begin: float, end: float) -> float:
        return end - begin

    def run(self, name: str, *durations: float) -> Callable[[], None]:
        remaining = list(durations)

        def work() -> None:
            self.log.append(name)
            self.time += remaining.pop(0) if len(remaining) > 1 else remaining[0]

        return work
