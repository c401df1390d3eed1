"""The GPU report as Markdown, and the figures it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .cases import DIRECTIONS, TASKS
from .gpu_steps import COMPILED
from .results import Row, markdown, speedup, times_ms

Report = dict[str, Any]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts and totals. Layers are "faster" where no other implementation beats ours. "inference" and "training": by
    how many times each provider takes longer than ours.
    """
    checked = [row for row in rows if row["kind"] == "parity" and row["status"] in ("ok", "parity failed")]
    passed = sum(row["status"] == "ok" for row in checked)
    summary: dict[str, Any] = {
        "parity": {"passed": passed, "failed": len(checked) - passed},
        "not_measured": sum(row["status"] in ("failed", "timed out", "skipped") for row in rows),
    }
    for direction in DIRECTIONS:
        found = [speedup(row) for row in rows if row["kind"] == "layer" and row["variant"] == direction]
        compared = [ratio for ratio in found if ratio is not None]
        faster = sum(ratio > 1 for ratio in compared)
        summary[f"layers_{direction}"] = {"compared": len(compared), "faster": faster}
    for task in TASKS:
        nets = [row for row in rows if row["kind"] == "net" and row["name"] == task]
        summary[task] = {name: found for row in nets for name, found in row.get("ratios", {}).items()}
        summary[f"{task}_images_per_s"] = {
            name: 1e3 * row["images"] / times.median for row in reversed(nets) for name, times in times_ms(row).items()
        }
    return summary


def render(report: Report) -> str:
    """Every row, whatever came of it."""
    by_kind: dict[str, list[Row]] = {}
    for row in report["rows"]:
        kind = f"layer {row['variant']}" if row["kind"] == "layer" else row["kind"]
        by_kind.setdefault(kind, []).append(row)
    sections = {
        "Peak rates": _roofs(by_kind.get("roofs", [])),
        "Layers, forward": _layers_table(by_kind.get("layer forward", [])),
        "Layers, backward": _layers_table(by_kind.get("layer backward", [])),
        "Layers, forward, beside torch.compile": _layers_table(by_kind.get(f"layer {COMPILED}", [])),
        "Whole net": _nets_table(by_kind.get("net", [])),
        "The timer beside CuPy's": _clock_table(by_kind.get("clock", [])),
        "Parity with float64": _parity_table(by_kind.get("parity", [])),
        "Configurations measured": tune_table(by_kind.get("tune", []) + by_kind.get("speedup", [])),
    }
    settings, features = report["settings"], "-".join(map(str, report["settings"]["features"]))
    shape = " x ".join(str(settings[name]) for name in ("batch", "in_channels", "size", "size"))
    machine = "\n".join(f"- {name}: {value}" for name, value in report["environment"].items())
    conditions = (
        f"Images {shape}, U-Net {features}, bfloat16. Times are medians in milliseconds, p10 to p90 in brackets, of "
        "samples taken in turn with short rests (burst); `steady` is without a break. `speedup` is the fastest other "
        "implementation's time / ours: below 1, ours is slower. `of floor` is the least time that the measured peak "
        "rates allow / ours."
    )
    parts = ["# GPU report", machine, conditions]
    return "\n\n".join(parts + [f"## {title}\n\n{text}" for title, text in sections.items()]) + "\n"


def _roofs(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row["status"] != "ok":
            return _note(row)
        copy, matmul, l2 = row["copy"], row["matmul"], row["l2"]
        lines = [
            ["copy, GB/s", _figure(copy["gb_per_s"]), copy["how"]],
            ["matmul in a burst, TFLOP/s", _figure(matmul["burst_tflops"]), matmul["how"]],
            ["matmul in steady state, TFLOP/s", _figure(matmul["steady_tflops"]), ""],
            ["reading L2, GB/s", _figure(l2["gb_per_s"]), l2.get("how") or l2["reason"]],
        ]
    return markdown(["what", "rate", "how"], lines)


def _layers_table(rows: Sequence[Row]) -> str:
    """A line for each layer, with a column for each implementation that any of them has."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("samples_ms", {})))
    lines = []
    for row in rows:
        times = times_ms(row)
        cells = [_spread(vars(times[name]), 3) if name in times else "" for name in names]
        floor = [_figure(row.get("floor_ms")), _figure(row.get("of_floor"))]
        lines.append([row["name"], _figure(row["flops"] / 1e9), *cells, _figure(speedup(row)), *floor, _note(row)])
    return markdown(["layer", "GFLOP", *names, "speedup", "floor ms", "of floor", "note"], lines)


def _nets_table(rows: Sequence[Row]) -> str:
    """A line for each implementation of each task."""
    lines = []
    for row in rows:
        task = f"{row['name']} {row['variant']}".strip()
        for name, times in times_ms(row).items():
            ratio = row["ratios"].get(name)
            figures = [1e3 * row["images"] / times.median, row["flops"] / times.median / 1e9]
            figures.append(row["floor_ms"] / times.median if "floor_ms" in row else None)
            peak = row["peak_bytes"].get(name)
            cells = [_spread(vars(times), 3), _figure(row["steady_ms"][name])]
            cells.append("" if ratio is None else _spread({"median": ratio["ratio"], **ratio}))
            cells += [_figure(each) for each in (*figures, None if peak is None else peak / 1e9)]
            lines.append([task, name, *cells, ""])
        if _note(row) or "samples_ms" not in row:
            lines.append([task, *[""] * 8, _note(row)])
    header = ["task", "implementation", "ms", "steady", "time / ours", "img/s", "TFLOP/s", "of floor", "GB", "note"]
    return markdown(header, lines)


def tune_table(rows: Sequence[Row]) -> str:
    """Write a line for each kernel of a layer, with what won, and why others were dropped; and for each layer as a net
    runs it: `auto` takes our kernels where ATen takes longer at p10.
    """
    lines = []
    for row in rows:
        config = " ".join(f"{key}={value}" for key, value in row.get("entry", {}).get("config", {}).items())
        margins = row.get("layer", row)
        found = [_spread(margins[key]) if key in margins else "" for key in ("margin_over_derived", "margin_over_aten")]
        dropped = "; ".join(_shortened(each["reason"]) for each in row.get("dropped", ()))
        lines.append([row["name"], row["variant"], config, *found, _note(row) or dropped])
    return markdown(["layer", "what", "config", "heuristic / it", "aten / it", "note"], lines)


def _clock_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        figures = [f"{row[name]:.3g}" if name in row else "" for name in ("event_ms", "cupy_ms", "ratio")]
        lines.append([row["name"], *figures, row.get("reason", "")])
    return markdown(["layer", "fastunet's clock, ms", "CuPy's, ms", "ratio", "note"], lines)


def _parity_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        passed = "passed" if row["status"] == "ok" else ""
        lines.append([row["name"], row["variant"], row.get("implementation", ""), passed, _note(row)])
    return markdown(["op", "format", "runs on", "parity", "note"], lines)


def _spread(found: Any, digits: int = 2) -> str:
    median, p10, p90 = (f"{found[name]:.{digits}f}" for name in ("median", "p10", "p90"))
    return f"{median} [{p10}, {p90}]"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _note(row: Row) -> str:
    """Why something is missing."""
    if row["status"] != "ok":
        return f"**{row['status']}**: {_shortened(row['reason'])}"
    reasons = [f"{name}: {_shortened(reason)}" for name, reason in row.get("missing", {}).items()]
    if row.get("why_no_triton"):
        reasons.insert(0, f"no triton: {row['why_no_triton']}")
    return "; ".join(reasons)


def _shortened(text: str) -> str:
    return text if len(text) <= 240 else f"{text[:240]} ..."
