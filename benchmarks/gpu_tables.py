"""The GPU report as Markdown, and the figures it comes to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .cases import DIRECTIONS, TASKS
from .gpu_steps import COMPILED
from .harness.timing import Quantiles
from .results import Row, markdown, speedup, times_ms

Report = dict[str, Any]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts and totals. Totals are over the layers with times under both backends; "faster" counts those that no other
    implementation beats. "inference" and "training": by how many times each provider takes longer than ours.
    """
    checked = [row for row in rows if row["kind"] == "parity" and row["status"] in ("ok", "parity failed")]
    passed = sum(row["status"] == "ok" for row in checked)
    summary: dict[str, Any] = {
        "parity": {"passed": passed, "failed": len(checked) - passed},
        "not_measured": sum(row["status"] in ("failed", "timed out", "skipped") for row in rows),
    }
    for direction in DIRECTIONS:
        compared = [row for row in rows if _is_compared(row) and row["variant"] == direction]
        summary[f"layers_{direction}"] = _totals(compared)
    timed = [row for row in rows if row["kind"] == "net" and "samples_ms" in row]
    for task in TASKS:
        nets = [row for row in timed if row["name"] == task]
        summary[task] = {name: found for row in nets for name, found in row.get("ratios", {}).items()}
        summary[f"{task}_images_per_s"] = {
            name: _images_per_s(row, times) for row in reversed(nets) for name, times in times_ms(row).items()
        }
    return summary


def _totals(compared: Sequence[Row]) -> dict[str, Any]:
    faster = sum((speedup(row) or 0) > 1 for row in compared)
    totals: dict[str, Any] = {"compared": len(compared), "faster": faster}
    if compared:
        ours, theirs = (sum(times_ms(row)[name].median for row in compared) for name in ("triton", "aten"))
        totals |= {"triton_ms": ours, "aten_ms": theirs, "speedup": theirs / ours}
    return totals


def _is_compared(row: Row) -> bool:
    return row["kind"] == "layer" and speedup(row) is not None and "triton" in row["samples_ms"]


def _images_per_s(row: Row, times: Quantiles) -> float:
    return 1e3 * row["images"] / times.median


def render(report: Report) -> str:
    """Every row, whatever came of it."""
    rows = report["rows"]
    parts = ["# GPU report", _environment(report), _conditions(report["settings"])]
    parts += ["## Roofs", _roofs([row for row in rows if row["kind"] == "roofs"])]
    for variant in (*DIRECTIONS, COMPILED):
        chosen = [row for row in rows if row["kind"] == "layer" and row["variant"] == variant]
        title = "forward, beside torch.compile" if variant == COMPILED else variant
        parts += [f"## Layers, {title}", _layers_table(chosen)]
    parts += ["## Whole net", _nets_table([row for row in rows if row["kind"] == "net"])]
    parts += ["## Parity with float64", _parity_table([row for row in rows if row["kind"] == "parity"])]
    parts += ["## The timer beside CuPy's", _clock_table([row for row in rows if row["kind"] == "clock"])]
    parts += ["## Configurations measured", _tune_table([row for row in rows if row["kind"] == "tune"])]
    parts += ["## Layers beside ATen", _margin_table([row for row in rows if row["kind"] == "margin"])]
    parts += ["## Tests on the GPU", _tests(report["tests"])]
    return "\n\n".join(parts) + "\n"


def _conditions(settings: Row) -> str:
    shape = " x ".join(str(settings[name]) for name in ("batch", "in_channels", "size", "size"))
    features = ", ".join(map(str, settings["features"]))
    return (
        f"Images {shape}, features {features}, bfloat16. Times are medians in milliseconds, p10 to p90 in brackets, of "
        "samples taken in turn with short rests (burst); `steady` is without a break. `speedup` is the fastest other "
        "implementation's time / ours: below 1, ours is slower. `of floor` is the least time that the measured roofs "
        "allow / ours."
    )


def _roofs(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row["status"] != "ok":
            return _note(row)
        copy, matmul, l2 = row["copy"], row["matmul"], row["l2"]
        rate = "" if l2["gb_per_s"] is None else _significant(l2["gb_per_s"])
        lines = [
            ["copy, GB/s", _significant(copy["gb_per_s"]), copy["how"]],
            ["matmul in a burst, TFLOP/s", _significant(matmul["burst_tflops"]), matmul["how"]],
            ["matmul in steady state, TFLOP/s", _significant(matmul["steady_tflops"]), ""],
            ["reading L2, GB/s", rate, l2.get("how") or l2["reason"]],
        ]
    return markdown(["roof", "rate", "how"], lines)


def _environment(report: Report) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in report["environment"].items())


def _layers_table(rows: Sequence[Row]) -> str:
    """A line for each layer, with a column for each implementation that any of them has."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("samples_ms", {})))
    lines = []
    for row in rows:
        times, ratio = times_ms(row), speedup(row)
        floor = f"{row['floor_ms']:.3f}" if "floor_ms" in row else ""
        share = f"{row['of_floor']:.0%}" if "of_floor" in row else ""
        cells = [_time(times.get(name)) for name in names]
        least = "" if ratio is None else f"{ratio:.2f}"
        lines.append([row["name"], _significant(row["flops"] / 1e9), *cells, least, floor, share, _note(row)])
    return markdown(["layer", "GFLOP", *names, "speedup", "floor ms", "of floor", "note"], lines)


def _nets_table(rows: Sequence[Row]) -> str:
    """A line for each implementation of each task."""
    lines = []
    for row in rows:
        task = f"{row['name']} {row['variant']}".strip()
        for name, times in times_ms(row).items():
            found = row["ratios"].get(name)
            ratio = f"{found['ratio']:.2f} [{found['p10']:.2f}, {found['p90']:.2f}]" if found else ""
            share = f"{row['floor_ms'] / times.median:.0%}" if "floor_ms" in row else ""
            rate, steady = f"{_images_per_s(row, times):.1f}", f"{row['steady_ms'][name]:.3f}"
            peak, tflops = _gigabytes(row["peak_bytes"].get(name)), _significant(row["flops"] / times.median / 1e9)
            lines.append([task, name, _time(times), steady, ratio, rate, tflops, share, peak, ""])
        if _note(row) or "samples_ms" not in row:
            lines.append([task, *[""] * 8, _note(row)])
    header = ["task", "implementation", "ms", "steady", "time / ours", "img/s", "TFLOP/s", "of floor", "GB", "note"]
    return markdown(header, lines)


def _tune_table(rows: Sequence[Row]) -> str:
    """A line for each shape: what won, and by how much."""
    lines = []
    for row in rows:
        entry = row.get("entry", {})
        config = " ".join(f"{key}={value}" for key, value in entry.get("config", {}).items())
        margins = [_margin(row, key) for key in ("margin_over_derived", "margin_over_aten")]
        dropped = str(len(row["dropped"])) if "dropped" in row else ""
        lines.append([row["name"], row["variant"], config, *margins, str(row.get("tried", "")), dropped, _note(row)])
    return markdown(["layer", "kernel", "config", "derived / it", "aten / it", "tried", "dropped", "note"], lines)


def _margin_table(rows: Sequence[Row]) -> str:
    """A line for each layer as a net runs it: `auto` takes our kernels where ATen takes longer at p10."""
    lines = [
        [row["name"], row["variant"], _margin(row.get("layer", {}), "margin_over_aten"), _note(row)] for row in rows
    ]
    return markdown(["layer", "task", "aten / ours", "note"], lines)


def _margin(row: Row, key: str) -> str:
    return f"{row[key]['median']:.2f} [{row[key]['p10']:.2f}, {row[key]['p90']:.2f}]" if key in row else ""


def _clock_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        found = row.get("cross_check", {})
        figures = [_significant(found[name]) if name in found else "" for name in ("event_ms", "cupy_ms", "ratio")]
        lines.append([row["name"], *figures, found.get("reason") or _note(row)])
    return markdown(["layer", "ours, ms", "CuPy's, ms", "ratio", "note"], lines)


def _time(times: Quantiles | None) -> str:
    return "" if times is None else f"{times.median:.3f} [{times.p10:.3f}, {times.p90:.3f}]"


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
    reasons = [f"{name}: {_shortened(reason)}" for name, reason in row.get("missing", {}).items()]
    if row.get("why_no_triton"):
        reasons.insert(0, f"no triton: {row['why_no_triton']}")
    return "; ".join(reasons)


def _shortened(text: str) -> str:
    return text if len(text) <= 240 else f"{text[:240]} ..."


def _parity_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        passed = "passed" if row["status"] == "ok" else ""
        lines.append([row["name"], row["variant"], row.get("implementation", ""), passed, _note(row)])
    return markdown(["op", "format", "runs on", "parity", "note"], lines)


def _tests(tests: Row) -> str:
    if "counts" not in tests:
        return f"Not run: {tests['reason']}."
    counts = ", ".join(f"{number} {outcome}" for outcome, number in tests["counts"].items())
    failed = "".join(f"\n- {name}" for name in tests["failed"])
    return f"`pytest -m gpu`: {counts or 'no result'}. {tests['reason']}{failed}"
