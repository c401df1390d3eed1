"""Steps one after the other within a budget of time, whatever becomes of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from .steps import Row, Settings, Step, describe

# Seconds that one step may take: most go to Triton's and ptxas's first compilation, and none should take half of this.
STEP_LIMIT = 90.0
# The same where torch.compile tries every configuration of every op of a net.
_COMPILED_NET_LIMIT = 150.0
# The least that a step is begun with.
_LEAST_STEP = 2.0


class StepRunner(Protocol):
    """What `measure` needs of a Worker."""

    def run(self, step: Step, timeout: float) -> Row: ...

    def close(self) -> None: ...


class Budget:
    """Seconds that are left of a total, by `now`."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._end, self._now = now() + seconds, now

    def left(self) -> float:
        """Negative once it is spent."""
        return self._end - self._now()


def measure(
    settings: Settings, steps: Sequence[Step], worker: StepRunner, budget: Budget, save: Callable[[list[Row]], None]
) -> list[Row]:
    """A row for each step, "skipped" where the budget does not reach; save gets all rows there are after each."""
    rows: list[Row] = []
    try:
        for step in steps:
            left = budget.left()
            if left < _LEAST_STEP:
                rows.append(describe(settings, step) | {"status": "skipped", "reason": "no time left"})
                continue
            rows.append(worker.run(step, min(limit_of(step), left)))
            print(_progress(rows[-1], budget), flush=True)
            save(rows)
    finally:
        worker.close()
    save(rows)
    return rows


def limit_of(step: Step) -> float:
    """Seconds that the step may take."""
    return _COMPILED_NET_LIMIT if step.kind == "net" and step.variant else STEP_LIMIT


def _progress(row: Row, budget: Budget) -> str:
    what = f"{row['kind']} {row['name']} {row['variant']}".strip()
    return f"{budget.left():6.0f} s left  {what}: {row['status']} {row['reason'][:200]}".rstrip()
