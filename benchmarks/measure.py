"""One measurement: an op's parity here, a time in `times`, a search. Each gives a row for the report; steps follow each
other within a budget of time, in a process that may hang, crash or lose its GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Protocol

import torch

import fastunet
from fastunet.testing import float32_precision, parity
from fastunet.testing.parity import backends_for

from .cases import Settings
from .harness.worker import Budget, Spawned
from .results import Row
from .steps import Step, describe, failure

# Seconds that one step may take: most go to Triton's and ptxas's first compilation, and none should take half of this.
STEP_LIMIT = 90.0
# The same where torch.compile tries every configuration of every op of a net.
_COMPILED_NET_LIMIT = 150.0
# The least that a step is begun with.
_LEAST_STEP = 2.0
# An op finds its launches, notes them down, and repeats them: each way is checked.
_CALLS = 3


def run_step(settings: Settings, step: Step) -> Row:
    """Measure: the row, with "status" "ok" or "parity failed" and a "reason". Errors of the op pass through."""
    row = describe(settings, step)
    try:
        with float32_precision("tf32" if step.variant == "tf32" else "ieee"):
            found = _measured(settings, step, row)
    except AssertionError as error:
        return row | failure(error)
    return row | {"status": "ok", "reason": ""} | found


def _measured(settings: Settings, step: Step, row: Row) -> Row:
    if step.kind == "parity":
        return _parity(settings, step, row)
    # Late: a commit that is compared with this one may lack what these measure beyond its ops.
    from .margins import margin
    from .search import search
    from .times import clock_check, layer_times, net_times, roofs

    if step.kind in ("tune", "margin"):
        return (search if step.kind == "tune" else margin)(settings, step)
    times = {"layer": layer_times, "net": net_times, "roofs": roofs, "clock": clock_check}
    return times[step.kind](settings, step, row)


def _parity(settings: Settings, step: Step, row: Row) -> Row:
    device, case = torch.device(settings.device), parity.cases()[int(step.name)]
    dtype, allow_tf32 = parity.FORMATS[step.variant]
    (ours, *_), reason = backends_for(case.op, device, dtype)
    # Known before the check, so that a failing row has it too.
    row["implementation"], row["why_no_triton"] = ours, reason
    with fastunet.backend(ours):
        for _ in range(_CALLS if device.type == "cuda" else 1):
            parity.check(case, dtype, device, allow_tf32=allow_tf32)
    return {}


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
    if settings.device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


class StepRunner(Protocol):
    """What `measure` needs of a Worker."""

    def run(self, step: Step, timeout: float) -> Row: ...

    def close(self) -> None: ...


def run_steps(
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
