"""What a measurement gives: rows, and the tables written of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastunet.measuring.timing import Quantiles, ratio

# A row says what was measured ("kind", "name", "variant"), its "status" and, where that is not "ok", the "reason"; one
# of times has "samples_ms" and "ratios" (see timed), and "missing": the reason for each provider without a time.
Row = dict[str, Any]


def timed(samples: Mapping[str, Sequence[float]]) -> Row:
    """Return "samples_ms" and "times_ms" by name, and "ratios": how many times as long as the first the others take.

    samples: seconds, of the same rounds. A ratio is the median of the rounds', with the 10th and 90th percentile.
    """
    first, *others = samples
    row: Row = {"samples_ms": {name: [1e3 * seconds for seconds in values] for name, values in samples.items()}}
    row["times_ms"] = {name: {"median": t.median, "p10": t.p10, "p90": t.p90} for name, t in times_ms(row).items()}
    row["ratios"] = {}
    for name in others:
        found = ratio(samples, name, first)
        row["ratios"][name] = {"ratio": found.median, "p10": found.p10, "p90": found.p90, "rounds": found.samples}
    return row


def times_ms(row: Row) -> dict[str, Quantiles]:
    """Return the milliseconds of each provider that the row has times of, in its order."""
    return {name: Quantiles.of(samples) for name, samples in row.get("samples_ms", {}).items()}


def ratio_text(found: Row | None) -> str:
    """Write a ratio with its spread."""
    return "" if found is None else f"{found['ratio']:.2f} ({found['p10']:.2f} to {found['p90']:.2f})"


def spread_text(found: Quantiles, digits: int = 3) -> str:
    """Write times, or ratios, with their spread."""
    return f"{found.median:.{digits}f} ({found.p10:.{digits}f} to {found.p90:.{digits}f})"


class Unavailable(RuntimeError):
    """A provider cannot do this work: the message says why."""


def failure(error: Exception) -> Row:
    """ "status" and "reason" of a row that the error has ended. An assertion is the parity check's."""
    if isinstance(error, AssertionError):
        return {"status": "parity failed", "reason": str(error)}
    name = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
    return {"status": "failed", "reason": f"{name}{str(error).strip()}"[:2000]}


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], right: Collection[str] = ()) -> str:
    """Write a Markdown table, without the columns that are empty throughout; "None." without lines.

    right: columns of figures, by their headers.
    """
    columns = [i for i in range(len(header)) if any(line[i] for line in lines)]
    head = [header[i] for i in columns]
    # A bar would end the cell.
    cells = [[line[i].replace("|", "/").replace("\n", " ") for i in columns] for line in lines]
    rules = "|".join("--:" if name in right else "---" for name in head)
    rows = [f"| {' | '.join(row)} |" for row in (head, *cells)]
    return "\n".join([rows[0], f"|{rules}|", *rows[1:]]) if lines else "None."
