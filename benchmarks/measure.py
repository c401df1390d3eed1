"""One measurement: an op's parity here, a time in `times`, a search. Each gives a row for the report."""

from __future__ import annotations

import torch

import fastunet
from fastunet.testing import float32_precision, parity
from fastunet.testing.parity import backends_for

from .steps import Row, Settings, Step, describe, failure

# Side of the lone image whose launches are timed on the host: small enough for them to matter.
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
