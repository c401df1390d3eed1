"""What a measurement gives: rows, and the tables written of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .harness.timing import Quantiles, ratio

# A row says what was measured ("kind", "name", "variant"), its "status" and, where that is not "ok", the "reason"; one
# of times has "samples_ms" and "ratios" (see timed), and "missing": the reason for each provider without a time.
Row = dict[str, Any]


def timed(samples: Mapping[str, Sequence[float]]) -> Row:
    """Return "samples_ms" by name, and "ratios": by how many times the others take longer than the first.

    samples: seconds, of the same rounds. A ratio is the median of the rounds', with the 10th and 90th percentile.
    """
    first, *others = samples
    found = {name: ratio(samples, name, first) for name in others}
    return {
        "samples_ms": {name: [1e3 * seconds for seconds in values] for name, values in samples.items()},
        "ratios": {
            name: {"ratio": r.median, "p10": r.p10, "p90": r.p90, "rounds": r.samples} for name, r in found.items()
        },
    }


def times_ms(row: Row) -> dict[str, Quantiles]:
    """Return the milliseconds of each provider that the row has times of, in its order."""
    return {name: Quantiles.of(samples) for name, samples in row.get("samples_ms", {}).items()}


def ratio_text(found: Row | None) -> str:
    """Write a ratio with its spread."""
    return "" if found is None else f"{found['ratio']:.2f} ({found['p10']:.2f} to {found['p90']:.2f})"


def failure(error: Exception) -> Row:
    """ "status" and "reason" of a row that the error has ended. An assertion is the parity check's."""
    if isinstance(error, AssertionError):
        return {"status": "parity failed", "reason": str(error)}
    return {"status": "failed", "reason": f"{type(error).__name__}: {str(error).strip()}"[:2000]}


def is_ours(implementation: str) -> bool:
    """Whether a name among a row's times is of fastunet with its kernels."""
    return implementation.startswith(("triton", "fastunet"))


def speedup(row: Row) -> float | None:
    """Return the least ratio that another than fastunet has: below 1, that is faster. None where there is none."""
    return min((found["ratio"] for name, found in row.get("ratios", {}).items() if not is_ours(name)), default=None)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table; "None." without lines."""
    if not lines:
        return "None."
    rule = ["---"] * len(header)
    # A bar would end the cell.
    cells = [[cell.replace("|", "/").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *cells))
