"""Pictures of a comparison and of the roofline: losing cases like winning ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from fastunet.files import SOFTWARE, written_whole

from .providers import OURS
from .results import Row
from .roofline import PeakRates, Point

# Okabe and Ito's colours, apart for colour-blind readers; what loses is hatched as well.
WINS, LOSES = "#0072B2", "#D55E00"
MARKERS = "os^DvP*X"
_BESIDE: dict[str, Any] = {"textcoords": "offset points"}
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#000000")
_TITLES = {"inference": "Inference", "training": "Training step"}
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def _providers(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.get("ratios", {})))


# --- the picture ---


def draw(report: Row, path: str | Path) -> None:
    """Write the ratios with their spread as PNG, whole or not at all: to the right of the line at 1, ours is faster."""
    nets = [row for row in report["rows"] if row["kind"] == "net" and row.get("ratios")]
    layers = [row for row in report["rows"] if row["kind"] == "layer" and row.get("ratios")]
    bars = sum(len(row["ratios"]) for row in nets)
    height = 2.2 + max(0.42 * bars + 0.9 * len(nets), 0.3 * len(layers), 2)
    parts = [(draw_part, rows) for draw_part, rows in ((_draw_nets, nets), (_draw_layers, layers)) if rows]
    figure = Figure(figsize=(7.2 * max(1, len(parts)), height), dpi=110, layout="constrained")
    figure.suptitle(f"How many times as long as {OURS} the others take\n{_conditions(report)}", fontsize=11)
    if not parts:
        figure.text(0.5, 0.4, "Nothing was compared: see bench.json for the reasons.", ha="center")
    for i, (draw_part, rows) in enumerate(parts, 1):
        draw_part(figure.add_subplot(1, len(parts), i), rows)
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


# --- the roofline ---

# Okabe and Ito's colours; shape tells the same as colour does.
_STYLES: dict[str, dict[str, Any]] = {
    "faster": {"marker": "^", "color": "#009E73", "label": "measured, faster than the others"},
    "slower": {"marker": "v", "color": "#D55E00", "label": "measured, slower than another"},
    "alone": {"marker": "s", "color": "#0072B2", "label": "measured, nothing to compare with"},
}


def verdict(point: Point) -> str:
    """Of the first implementation measured: "faster" or "slower" than the best of the others, "alone" without any."""
    ours, *others = point.measured.values()
    if not others:
        return "alone"
    return "faster" if ours < min(others) else "slower"


def plot_roofline(points: Sequence[Point], peaks: PeakRates, path: Path) -> None:
    """Write the roofline as a PNG: FLOP/s against FLOP per byte of memory traffic, both logarithmic.

    A layer's lower bound in time lies on the roof; below it, joined by a line, is what the first implementation of
    `measured` reached, with a marker that tells whether another was faster. Raises ValueError without a point.
    """
    if not points:
        raise ValueError("expected at least one point to plot, got none")
    figure = Figure(figsize=(12, 7.5), dpi=110, layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    axes.set_title("U-Net layers, forward")
    axes.set_xlabel("arithmetic intensity: FLOP per byte read from or written to GPU memory, at least")
    axes.set_ylabel("speed: TFLOP/s")
    axes.grid(which="major", alpha=0.25)
    peak, ridge = peaks.matmul_flops / 1e12, peaks.matmul_flops / peaks.copy_bytes
    intensities = [point.work.flops / point.work.bytes for point in points]
    left, right = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    axes.plot([left, ridge, right], [left * peak / ridge, peak, peak], color="black")
    axes.annotate(f"memory: {peaks.copy_bytes / 1e12:.3g} TB/s", (ridge, peak), (-30, -40), ha="right", **_BESIDE)
    axes.annotate(f"matrix products: {peak:.4g} TFLOP/s", (right, peak), (0, 5), ha="right", **_BESIDE)
    speeds = [point.work.flops / point.bound / 1e12 for point in points]
    axes.plot(intensities, speeds, "o", markerfacecolor="white", color="black", label="one fused pass at these rates")
    for kind, style in _STYLES.items():
        for point, x, top in zip(points, intensities, speeds, strict=True):
            if point.measured and verdict(point) == kind:
                reached = point.work.flops / next(iter(point.measured.values())) / 1e12
                axes.plot([x, x], [reached, top], color="grey", linewidth=0.8, zorder=1)
                axes.plot(x, reached, linestyle="", markersize=9, **style)
    in_order = sorted(zip(intensities, speeds, points, strict=True), key=lambda found: found[0])
    for i, (x, top, point) in enumerate(in_order):  # Side by side at the bottom, each led to its marker.
        at, line = ((i + 0.5) / len(points), 0.02), {"arrowstyle": "-", "color": "grey", "linewidth": 0.5}
        axes.annotate(point.name, (x, top), at, textcoords="axes fraction", rotation=90, ha="center", arrowprops=line)
    axes.set_ylim(bottom=axes.get_ylim()[0] / 20)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))  # A line for each point has the same label.
    axes.legend(once.values(), once.keys(), loc="upper left", framealpha=1)
    if peaks.source:
        figure.supxlabel(f"rates: {peaks.source}", fontsize=9, x=0.99, ha="right")
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png")
