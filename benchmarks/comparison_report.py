"""A comparison as tables for the terminal and as one picture: losing cases like winning ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from rich import box
from rich.table import Table

from fastunet.files import written_whole
from fastunet.outputs import SOFTWARE

from .comparison import STEADY
from .harness.timing import Quantiles
from .providers import OURS
from .results import Row

# Okabe and Ito's colours, apart for colour-blind readers; what loses is hatched as well.
WINS, LOSES = "#0072B2", "#D55E00"
MARKERS = "os^DvP*X"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#000000")
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_TITLES = {"inference": "Inference", "training": "Training step"}


def tables(report: Row) -> list[Table]:
    """Of the nets' tasks, of the layers, and of what was not measured."""
    rows = report["rows"]
    nets = [row for row in rows if row["kind"] == "net"]
    layers = [row for row in rows if row["kind"] == "layer"]
    found = [_net_table(row) for row in nets if "ratios" in row]
    if any("ratios" in row for row in layers):
        found.append(_layer_table([row for row in layers if "ratios" in row]))
    missing = _missing_table(rows)
    if found:
        found[-1].caption = f"ratio: its time by {OURS}'s in the same round; below 1, {OURS} is slower"
    return [*found, missing] if missing.row_count else found


def _table(*columns: str, title: str = "") -> Table:
    """A first column of names, the others of numbers; narrow, as terminals are."""
    table = Table(columns[0], title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in columns[1:]:
        table.add_column(heading, justify="right")
    return table


def _net_table(row: Row) -> Table:
    title = f"{_TITLES[row['name']]}: {row['flops'] / 1e9:.1f} GFLOP"
    if row.get("unsteady"):
        title += f" [bold red]unsteady: eager's p90 / p10 is above {STEADY}; repeat it on an idle machine[/]"
    table = _table("", "form", "ms", "p10 to p90", "ratio", "p10 to p90", title=title)
    for name, samples in row["samples_ms"].items():
        times, form = Quantiles.of(samples), row["forms"][name]
        spread = f"{times.p10:.2f} to {times.p90:.2f}"
        cells = [f"{form['layout']} {_SHORT[form['dtype']]}", f"{times.median:.2f}", spread]
        table.add_row(name, *cells, *_ratio_cells(row["ratios"].get(name)))
    return table


def _ratio_cells(found: Row | None) -> tuple[str, str]:
    if found is None:
        return "1", ""
    return _coloured(found["ratio"]), f"{found['p10']:.2f} to {found['p90']:.2f}"


def _coloured(ratio: float) -> str:
    """Red where ours is slower: a losing case is to be seen."""
    return f"{ratio:.2f}" if ratio >= 1 else f"[bold red]{ratio:.2f}[/]"


def _layer_table(rows: Sequence[Row]) -> Table:
    names = _providers(rows)
    table = _table("layer", "GFLOP", f"{OURS} ms", *names, title="Layers, forward: ratio (p10 to p90)")
    for row in rows:
        ours = Quantiles.of(row["samples_ms"][OURS]).median
        cells = [_layer_cell(row["ratios"].get(name)) for name in names]
        table.add_row(row["name"], f"{row['flops'] / 1e9:.2f}", f"{ours:.2f}", *cells)
    return table


def _layer_cell(found: Row | None) -> str:
    return "" if found is None else f"{_coloured(found['ratio'])} ({found['p10']:.2f} to {found['p90']:.2f})"


def _providers(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.get("ratios", {})))


def _missing_table(rows: Sequence[Row]) -> Table:
    """Each reason once, with where it holds."""
    where: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["missing"].items():
            where.setdefault((name, reason), []).append(row["name"])
    table = Table("not measured", "in", "why", box=box.SIMPLE_HEAD)
    for (name, reason), places in where.items():
        found_in = ", ".join(places) if len(places) < 4 else f"{len(places)} comparisons"
        table.add_row(name, found_in, reason.partition("\n")[0])
    return table


# --- the picture ---


def draw(report: Row, path: str | Path) -> None:
    """Write the ratios with their spread as PNG, whole or not at all: to the right of the line at 1, ours is faster."""
    nets = [row for row in report["rows"] if row["kind"] == "net" and row.get("ratios")]
    layers = [row for row in report["rows"] if row["kind"] == "layer" and row.get("ratios")]
    bars = sum(len(row["ratios"]) for row in nets)
    height = 2.2 + max(0.42 * bars + 0.9 * len(nets), 0.3 * len(layers), 2)
    figure = Figure(figsize=(7.2 * (bool(nets) + bool(layers)) or 7.2, height), dpi=110, layout="constrained")
    figure.suptitle(f"How many times as long as {OURS} the others take\n{_conditions(report)}", fontsize=11)
    if not nets and not layers:
        figure.text(0.5, 0.4, "Nothing was compared: see bench.json for the reasons.", ha="center")
    columns = [part for part in ("nets" if nets else "", "layers" if layers else "") if part]
    for part, axes in zip(columns, figure.subplots(1, len(columns), squeeze=False)[0] if columns else [], strict=True):
        _draw_nets(axes, nets) if part == "nets" else _draw_layers(axes, layers)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": SOFTWARE})


def _conditions(report: Row) -> str:
    settings, machine = report["settings"], report["environment"]
    threads = f", threads: {settings['threads']}" if settings["device"] == "cpu" else ""
    channels = "-".join(map(str, settings["features"]))
    return (
        f"{machine['device']}{threads}, torch {machine['torch']}, backend {settings['backend']}\n"
        f"U-Net {channels}, images {settings['batch']} x {settings['size']} x {settings['size']}"
    )


def _draw_nets(axes: Axes, rows: Sequence[Row]) -> None:
    """Horizontal bars, a group for each task, from 1 to the ratio, with a line from p10 to p90."""
    y, ticks, labels = 0.0, [], []
    for row in rows:
        axes.text(0.0, y, _TITLES[row["name"]], transform=axes.get_yaxis_transform(), weight="bold", va="center")
        y += 1
        for name, found in row["ratios"].items():
            _draw_bar(axes, y, found)
            ticks.append(y)
            labels.append(f"{name}\n{row['forms'][name]['layout']} {_SHORT[row['forms'][name]['dtype']]}")
            y += 1
        y += 0.4
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.set_ylim(y, -0.7)
    _finish(axes, [found for row in rows for found in row["ratios"].values()], "Whole net")


def _draw_bar(axes: Axes, y: float, found: Mapping[str, float]) -> None:
    wins = found["ratio"] >= 1
    axes.barh(
        y,
        found["ratio"] - 1,
        left=1,
        height=0.62,
        color=WINS if wins else LOSES,
        hatch="" if wins else "///",
        edgecolor="white",
    )
    axes.plot([found["p10"], found["p90"]], [y, y], color="black", linewidth=1.2, marker="|", markersize=7)
    right = max(found["p90"], found["ratio"], 1)
    axes.annotate(f"{found['ratio']:.2f}", (right, y), (5, 0), textcoords="offset points", va="center", fontsize=9)


def _draw_layers(axes: Axes, rows: Sequence[Row]) -> None:
    """A line for each layer, in the order they run, with a marker and the spread for each provider."""
    names = _providers(rows)
    for i, name in enumerate(names):
        shift = 0.6 * ((i + 0.5) / len(names) - 0.5)
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        points = [(y + shift, row["ratios"][name]) for y, row in enumerate(rows) if name in row["ratios"]]
        for y, found in points:
            axes.plot([found["p10"], found["p90"]], [y, y], color=colour, linewidth=1.2, alpha=0.7)
        axes.plot([found["ratio"] for _, found in points], [y for y, _ in points], marker, color=colour, label=name)
    axes.set_yticks(range(len(rows)), [f"{row['name']}  {_shape(row)}" for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    # Above the axes' labels would be theirs, and within them the lines'.
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, loc="outside lower right", ncols=4, fontsize=9, frameon=False)
    _finish(axes, [found for row in rows for found in row["ratios"].values()], "Layers, forward")


def _shape(row: Row) -> str:
    """ "64→128 @256": channels in and out, and the side of its input."""
    images = [shape for name, shape in row["shapes"].items() if name in ("x", "skip", "up")]
    weight = row["shapes"]["weight"]
    out = weight[1] if row["op"] == "conv_transpose2x2" else weight[0]
    return f"{sum(shape[1] for shape in images)}→{out} @{images[0][3]}"


def _finish(axes: Axes, shown: Sequence[Mapping[str, float]], title: str) -> None:
    axes.set_title(title, fontsize=10, pad=16)
    axes.set_xscale("log", base=2)
    low = min(1.0, *(found["p10"] for found in shown)) / 1.15
    high = max(1.0, *(found["p90"] for found in shown)) * 1.35
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(FuncFormatter(_power_of_two))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color="black", linewidth=1)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    beside: dict[str, Any] = {
        "textcoords": "offset points",
        "xycoords": axes.get_xaxis_transform(),
        "va": "bottom",
        "fontsize": 8,
    }
    axes.annotate(f"← {OURS} slower", (1, 1), (-8, 2), ha="right", color=LOSES, **beside)
    axes.annotate(f"{OURS} faster →", (1, 1), (8, 2), ha="left", color=WINS, **beside)
    axes.set_xlabel("time / fastunet's: median of the rounds' ratios, line from p10 to p90", fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _power_of_two(value: float, _: int) -> str:
    return f"{value:g}" if value >= 1 else f"1/{1 / value:g}"
