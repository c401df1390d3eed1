"""Pictures of a comparison and of the roofline: losing cases like winning ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from fastunet.files import SOFTWARE, written_whole

from .cases import Pass
from .providers import OURS
from .results import Row, times_ms
from .roofline import PeakRates
from .tables import conditions

# Okabe and Ito's colours, apart for colour-blind readers; what loses is hatched as well.
WINS, LOSES = "#0072B2", "#D55E00"
# A row, a provider, and its ratio with the spread.
Bar = tuple[Row, str, Mapping[str, float]]


def draw(report: Row, path: str | Path) -> None:
    """Write the ratios with their spread as PNG, whole or not at all: to the right of the line at 1, ours is faster."""
    parts: dict[str, list[Bar]] = {}
    for row in report["rows"]:
        for name, found in row.get("ratios", {}).items():
            parts.setdefault(row["kind"], []).append((row, name, found))
    said = conditions(report).replace("; ", "\n")
    height = 3 + 0.25 * max(map(len, parts.values()), default=0)
    figure = Figure(figsize=(7.2 * max(1, len(parts)), height), dpi=110, layout="constrained")
    figure.suptitle(f"How many times as long as {OURS} the others take\n{said}", fontsize=11)
    if not parts:
        figure.text(0.5, 0.4, "Nothing was compared: see bench.json for the reasons.", ha="center")
    for i, (kind, found) in enumerate(parts.items(), 1):
        _draw_bars(figure.add_subplot(1, len(parts), i), kind, found)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": SOFTWARE})


def _draw_bars(axes: Axes, kind: str, bars: Sequence[Bar]) -> None:
    """A bar for each provider of each row, from 1 to the ratio, with a line from p10 to p90."""
    for y, (_, _, found) in enumerate(bars):
        ratio, wins = found["ratio"], found["ratio"] >= 1
        colour, hatch = (WINS, "") if wins else (LOSES, "///")
        axes.barh(y, ratio - 1, left=1, height=0.62, edgecolor="white", color=colour, hatch=hatch)
        axes.plot([found["p10"], found["p90"]], [y, y], color="black", linewidth=1.2, marker="|", markersize=7)
        at = max(found["p90"], ratio, 1), y
        axes.annotate(f"{ratio:.2f}", at, (5, 0), textcoords="offset points", va="center", fontsize=8)
    labels = [f"{row['name']}: {name}, {' '.join(row['forms'][name].values())}" for row, name, _ in bars]
    axes.set_yticks(range(len(bars)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_title({"net": "Whole net", "layer": "Layers, forward"}[kind], fontsize=10)
    axes.set_xscale("log", base=2)
    axes.margins(x=0.15)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color="black", linewidth=1)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"time / {OURS}'s, p10 to p90; left of 1, hatched, {OURS} is slower", fontsize=8)


def plot_roofline(rows: Sequence[Row], peaks: PeakRates, path: Path) -> None:
    """Write the roofline of measured layers as a PNG: FLOP/s against FLOP per byte of memory traffic, logarithmic.

    rows: of layers forward. A layer's lower bound in time lies on the roof; below it, joined by a line, is what ours
    reached, with a marker that tells whether another was faster.
    """
    figure = Figure(figsize=(12, 7.5), dpi=110, layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    axes.set_title("U-Net layers, forward")
    axes.set_xlabel("arithmetic intensity: FLOP per byte read from or written to GPU memory, at least")
    axes.set_ylabel("speed: TFLOP/s")
    axes.grid(which="major", alpha=0.25)
    peak, ridge = peaks.matmul_flops / 1e12, peaks.matmul_flops / peaks.copy_bytes
    works = [Pass(row["flops"], row["bytes"]) for row in rows]
    intensities = [work.flops / work.bytes for work in works]
    speeds = [work.flops / peaks.seconds(work) / 1e12 for work in works]
    left, right = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    rates = f"peak rates, memory: {peaks.copy_bytes / 1e12:.3g} TB/s, matrix products: {peak:.4g} TFLOP/s"
    axes.plot([left, ridge, right], [left * peak / ridge, peak, peak], color="black", label=rates)
    axes.plot(intensities, speeds, "o", markerfacecolor="white", color="black", label="one fused pass at these rates")
    for row, x, top in zip(rows, intensities, speeds, strict=True):
        ours, *others = (times.median for times in times_ms(row).values())
        reached = row["flops"] / ours / 1e9
        axes.plot([x, x], [reached, top], color="grey", linewidth=0.8, zorder=1)
        wins = ours <= min(others, default=ours)
        colour, marker, label = (WINS, "^", "as fast as any other") if wins else (LOSES, "v", "slower than another")
        axes.plot(x, reached, marker, markersize=9, color=colour, label=f"measured, {label}")
    in_order = sorted(zip(intensities, speeds, [row["name"] for row in rows], strict=True))
    for i, (x, top, name) in enumerate(in_order):  # Side by side at the bottom, each led to its marker.
        at, line = ((i + 0.5) / len(rows), 0.02), {"arrowstyle": "-", "color": "grey", "linewidth": 0.5}
        axes.annotate(name, (x, top), at, textcoords="axes fraction", rotation=90, ha="center", arrowprops=line)
    axes.set_ylim(bottom=axes.get_ylim()[0] / 20)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))  # A line for each point has the same label.
    axes.legend(once.values(), once.keys(), loc="upper left", framealpha=1)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png")
