"""The GPU report as Markdown, and the figures it comes to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .steps import DIRECTIONS, Row

Report = dict[str, Any]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts and totals; totals are over the layers that were timed under both backends."""
    checked = [row for row in rows if row["kind"] == "parity" and row["status"] in ("ok", "parity failed")]
    passed = sum(row["status"] == "ok" for row in checked)
    summary: dict[str, Any] = {
        "parity": {"passed": passed, "failed": len(checked) - passed},
        "not_measured": sum(row["status"] in ("failed", "timed out", "skipped") for row in rows),
    }
    for direction in DIRECTIONS:
        compared = [row for row in rows if _is_compared(row) and row["variant"] == direction]
        summary[f"layers_{direction}"] = _totals(compared)
    for row in rows:
        if row["kind"] == "net" and "times" in row:
            summary[row["name"]] = {name: times["images_per_s"] for name, times in row["times"].items()}
            summary[row["name"]]["speedup"] = row.get("speedup")
    return summary


def _totals(compared: Sequence[Row]) -> dict[str, Any]:
    totals: dict[str, Any] = {"compared": len(compared), "faster": sum(row["speedup"] > 1 for row in compared)}
    if compared:
        ours, theirs = (sum(row["times"][name]["median_ms"] for row in compared) for name in ("triton", "aten"))
        totals |= {"triton_ms": ours, "aten_ms": theirs, "speedup": theirs / ours}
    return totals


def _is_compared(row: Row) -> bool:
    return row["kind"] == "layer" and "speedup" in row


def render(report: Report) -> str:
    """Every row, whatever came of it."""
    parts = [
        "# GPU report",
        _environment(report),
        _conditions(report["settings"]),
    ]
    rows = report["rows"]
    for direction in DIRECTIONS:
        chosen = [row for row in rows if row["kind"] == "layer" and row["variant"] == direction]
        parts += [f"## Layers, {direction}", _times_table("layer", chosen)]
    parts += ["## Whole net", _times_table("task", [row for row in rows if row["kind"] == "net"], net=True)]
    parts += ["## Parity with float64", _parity_table([row for row in rows if row["kind"] == "parity"])]
    parts += ["## Tests on the GPU", _tests(report["tests"])]
    return "\n\n".join(parts) + "\n"


def _conditions(settings: Row) -> str:
    shape = " x ".join(str(settings[name]) for name in ("batch", "in_channels", "size", "size"))
    features = ", ".join(map(str, settings["features"]))
    return (
        f"Images {shape}, features {features}, bfloat16. Times are medians in milliseconds, p10 to p90 in brackets. "
        "`speedup` is aten / triton: below 1, ours is slower."
    )


def _environment(report: Report) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in report["environment"].items())


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; "None." without lines."""
    if not lines:
        return "None."
    rule = ["---"] * len(header)
    # A bar would end the cell.
    cells = [[cell.replace("|", "/").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *cells))


def _times_table(first: str, rows: Sequence[Row], *, net: bool = False) -> str:
    header = [first, "GFLOP", "triton", "TFLOP/s", "aten", "TFLOP/s", "speedup", "note"]
    header[-1:-1] = ["img/s triton", "img/s aten", "GB triton", "GB aten"] if net else []
    lines = []
    for row in rows:
        ours, theirs = (row.get("times", {}).get(name) for name in ("triton", "aten"))
        line = [row["name"], _significant(row["flops"] / 1e9), *_time(ours), *_time(theirs)]
        line.append(f"{row['speedup']:.2f}" if "speedup" in row else "")
        if net:
            line += [f"{t['images_per_s']:.1f}" if t else "" for t in (ours, theirs)]
            line += [
                f"{t['peak_bytes'] / 1e9:.2f}" if t and t["peak_bytes"] is not None else "" for t in (ours, theirs)
            ]
        lines.append([*line, _note(row)])
    return table(header, lines)


def _time(times: Row | None) -> tuple[str, str]:
    if times is None:
        return "", ""
    return (
        f"{times['median_ms']:.3f} [{times['p10_ms']:.3f}, {times['p90_ms']:.3f}]",
        _significant(times["tflops"]),
    )


def _gigabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f}"


def _significant(value: float) -> str:
    """Three significant digits, without an exponent."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f}"


def _note(row: Row) -> str:
    """Why something is missing."""
    if row["status"] != "ok":
        return f"**{row['status']}**: {_shortened(row['reason'])}"
    reason = row.get("why_no_triton")
    return f"aten alone: {reason}" if reason else ""


def _shortened(text: str) -> str:
    return text if len(text) <= 240 else f"{text[:240]} ..."


def _parity_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        passed = "passed" if row["status"] == "ok" else ""
        lines.append([row["name"], row["variant"], row.get("implementation", ""), passed, _note(row)])
    return table(["op", "format", "runs on", "parity", "note"], lines)


def _tests(tests: Row) -> str:
    if "counts" not in tests:
        return f"Not run: {tests['reason']}."
    counts = ", ".join(f"{number} {outcome}" for outcome, number in tests["counts"].items())
    failed = "".join(f"\n- {name}" for name in tests["failed"])
    return f"`pytest -m gpu`: {counts or 'no result'}. {tests['reason']}{failed}"
