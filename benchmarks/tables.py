"""Rows as Markdown: of nets, layers and what has no time; the GPU report; and the figures that rows come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from fastunet.dispatch import selected_backend

from .cases import DIRECTIONS, TASKS, Settings
from .harness.environment import environment
from .results import Row, markdown, ratio_text, spread_text, times_ms

# Of a layer's row: forward beside what torch.compile makes of it.
COMPILED = "compiled"


def report_of(settings: Settings, rows: Sequence[Row], **more: Any) -> Row:
    """Return what a JSON file of rows holds. more: settings beside those."""
    said = asdict(settings) | {"threads": torch.get_num_threads(), "backend": selected_backend()} | more
    return {"summary": summarise(rows), "environment": environment(settings.device), "settings": said, "rows": [*rows]}


def conditions(report: Mapping[str, Any], what: str = "") -> str:
    """Say where and of what the times are. what: in place of the net and its dtype."""
    settings, machine = report["settings"], report["environment"]
    side, threads = settings["size"], settings.get("threads")
    what = what or f"U-Net {'-'.join(map(str, settings['features']))}, {settings['dtype']}"
    said = f"{what}, images of {side}x{side}, batches of {settings['batch']}"
    said += f", {threads} threads" if threads else ""
    return f"{machine['device']}, torch {machine['torch']}; {said}"


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the ops that were right, and the rows without a time or verdict; by task ("inference", "training"), by how
    many times each provider takes longer than ours; by direction and provider, how many layers ours is faster in, and
    of how many.

    "unsteady": tasks whose figures count for nothing, since eager's own times vary too much.
    """
    checked = [row for row in rows if row["kind"] == "parity" and row["status"] in ("ok", "parity failed")]
    passed = sum(row["status"] == "ok" for row in checked)
    summary: dict[str, Any] = {
        "parity": {"passed": passed, "failed": len(checked) - passed},
        "not_measured": sum(row["status"] != "ok" for row in rows if row not in checked),
        "unsteady": [row["name"] for row in rows if row.get("unsteady")],
    }
    for direction in DIRECTIONS:
        counts: dict[str, Row] = summary.setdefault(f"layers_{direction}", {})
        for row in rows:
            if row["kind"] == "layer" and row.get("variant", "forward") == direction:
                for name, found in row.get("ratios", {}).items():
                    count = counts.setdefault(name, {"faster": 0, "compared": 0})
                    count["compared"] += 1
                    count["faster"] += found["ratio"] > 1
    for task in TASKS:
        nets = [row for row in rows if row["kind"] == "net" and row["name"] == task]
        summary[task] = {name: found for row in nets for name, found in row.get("ratios", {}).items()}
    return summary


# --- nets, layers, and what has no time ---


def times_table(rows: Sequence[Row]) -> str:
    """Write a line for each implementation of each layer, or task of the net, ours first."""
    lines = []
    for row in rows:
        what = f"{row['name']} {row.get('variant', '')}".strip() if row["kind"] == "net" else row["name"]
        forms, bound = row.get("forms", {}), row.get("bound_ms")
        for name, times in times_ms(row).items():
            peak = row.get("peak_bytes", {}).get(name)
            figures = [
                row.get("steady_ms", {}).get(name),
                1e3 * row["images"] / times.median if "images" in row else None,
                row["flops"] / times.median / 1e9 if "flops" in row else None,
                None if bound is None else bound / times.median,
                None if peak is None else peak / 1e9,
            ]
            cells = [spread_text(times), ratio_text(row["ratios"].get(name)), *map(figure, figures)]
            lines.append([what, name, " ".join(forms.get(name, {}).values()), *cells, ""])
        if note := _note(row):
            lines.append([what, *[""] * 9, note])
    header = ["what", "implementation", "form", "ms", "time / ours", "steady ms", "img/s", "TFLOP/s", "of bound", "GB"]
    return markdown([*header, "note"], lines)


def missing_table(rows: Sequence[Row]) -> str:
    """Write a line for each reason that something has no time in some rows."""
    where: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        reasons = {"triton": row["why_no_triton"]} if row.get("why_no_triton") else {}
        for name, reason in (reasons | row.get("missing", {})).items():
            where.setdefault((name, reason.partition("\n")[0]), []).append(row["name"])
    lines = [
        [name, ", ".join(places) if len(places) < 4 else f"{len(places)} comparisons", shortened(reason)]
        for (name, reason), places in where.items()
    ]
    return markdown(["not measured", "in", "why"], lines)


# --- the GPU report ---


def render(report: Row) -> str:
    """Write every row of a GPU report, whatever came of it."""
    by_kind: dict[str, list[Row]] = {}
    for row in report["rows"]:
        kind = f"layer {row['variant']}" if row["kind"] == "layer" else row["kind"]
        by_kind.setdefault(kind, []).append(row)
    sections = {
        "Families of kernels, on small images": _parity_table(by_kind.get("smoke", [])),
        "Peak rates": _peak_rates(by_kind.get("peak rates", [])),
        "Layers, forward": times_table(by_kind.get("layer forward", [])),
        "Layers, backward": times_table(by_kind.get("layer backward", [])),
        "Layers, forward, beside torch.compile": times_table(by_kind.get(f"layer {COMPILED}", [])),
        "Whole net": times_table(by_kind.get("net", [])),
        "Not measured": missing_table(report["rows"]),
        "Parity with float64": _parity_table(by_kind.get("parity", [])),
        "Configurations measured": tune_table(report.get("tuned", [])),
    }
    settings, features = report["settings"], "-".join(map(str, report["settings"]["features"]))
    shape = " x ".join(str(settings[name]) for name in ("batch", "in_channels", "size", "size"))
    machine = "\n".join(f"- {name}: {value}" for name, value in report["environment"].items())
    conditions = (
        f"Images {shape}, U-Net {features}, bfloat16. Times are medians, p10 to p90 in brackets, of samples taken in "
        "turn with short rests (burst); `steady` is without a break. Where time / ours is below 1, ours is slower. "
        "`of bound` is the least time that the measured peak rates allow / that of the implementation."
    )
    parts = ["# GPU report", machine, conditions]
    return "\n\n".join(parts + [f"## {title}\n\n{text}" for title, text in sections.items()]) + "\n"


def _peak_rates(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row["status"] != "ok":
            return _note(row)
        copy, matmul, l2, timer = (row[name] for name in ("copy", "matmul", "l2", "timer"))
        lines = [
            ["copy, GB/s", figure(copy["gb_per_s"]), copy["how"]],
            ["matmul in a burst, TFLOP/s", figure(matmul["burst_tflops"]), matmul["how"]],
            ["matmul in steady state, TFLOP/s", figure(matmul["steady_tflops"]), ""],
            ["reading L2, GB/s", figure(l2["gb_per_s"]), l2.get("how") or l2["reason"]],
            ["CuPy's timer / this one", figure(timer["ratio"]), timer.get("how") or timer["reason"]],
        ]
    return markdown(["what", "rate", "how"], lines)


def tune_table(rows: Sequence[Row]) -> str:
    """Write a line for each row of a table of `kernels.autotune`: which configuration of a kernel is fastest, by how
    many times ATen takes longer for a layer, and what is wrong.
    """
    lines = []
    for row in rows:
        shape, config = (" ".join(f"{k}={v}" for k, v in row.get(part, {}).items()) for part in ("shape", "config"))
        lines.append([row["op"], row["dtype"], shape, config, figure(row.get("speedup")), row.get("failed", "")])
    return markdown(["what", "format", "shape", "config", "aten / ours, p10", "failed"], lines)


def _parity_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        passed = "passed" if row["status"] == "ok" else ""
        lines.append([row["name"], row["variant"], row.get("implementation", ""), passed, _note(row)])
    return markdown(["op", "format", "runs on", "parity", "note"], lines)


def figure(value: float | None) -> str:
    """Write a number with three digits, or none."""
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _note(row: Row) -> str:
    """What is to be said of a row: why it has no result, or that its times count for nothing."""
    if row["status"] != "ok":
        return f"**{row['status']}**: {shortened(row['reason'])}"
    return "**unsteady**: eager's own times vary too much; repeat it on an idle machine" if row.get("unsteady") else ""


def shortened(text: str) -> str:
    return text if len(text) <= 240 else f"{text[:240]} ..."
