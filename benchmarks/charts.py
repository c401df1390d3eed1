"""Pictures of a comparison and of the roofline: losing cases like winning ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from fastunet.files import SOFTWARE, written_whole

from .providers import OURS
from .results import Row
from .roofline import Point, Roofs
from .unet import TITLES

# Okabe and Ito's colours, apart for colour-blind readers; what loses is hatched as well.
WINS, LOSES = "#0072B2", "#D55E00"
MARKERS = "os^DvP*X"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#000000")
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
        axes.text(0.0, y, TITLES[row["name"]], transform=axes.get_yaxis_transform(), weight="bold", va="center")
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

# Okabe and Ito's colours; shape and filling tell the same as colour does.
_STYLES = {
    "faster": {"marker": "^", "color": "#009E73", "label": "{ours}: measured, faster than {others}"},
    "slower": {"marker": "v", "color": "#D55E00", "label": "{ours}: measured, slower than {others}"},
    "alone": {"marker": "s", "color": "#0072B2", "label": "{ours}: measured, nothing to compare with"},
}
_LABEL_GAP = 0.024  # of the plot's width, between the labels' centres


def verdict(point: Point) -> str:
    """Of the first implementation measured: "faster" or "slower" than the best of the others, "alone" without any."""
    ours, *others = point.measured.values()
    if not others:
        return "alone"
    return "faster" if ours < min(others) else "slower"


def plot_roofline(points: Sequence[Point], roofs: Roofs, path: Path, *, title: str = "U-Net layers, forward") -> None:
    """Write the roofline as a PNG: FLOP/s against FLOP per byte of memory traffic, both logarithmic.

    A layer's floor lies on the roof; below it, joined by a line, is what the first implementation of `measured`
    reached, with a marker that tells whether another was faster. Raises ValueError without a point.
    """
    if not points:
        raise ValueError("expected at least one point to plot, got none")
    figure = Figure(figsize=(12, 7.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", yscale="log")
    axes.set_title(title)
    axes.set_xlabel("arithmetic intensity: FLOP per byte read from or written to GPU memory, at least")
    axes.set_ylabel("speed: TFLOP/s")
    axes.grid(which="major", alpha=0.25)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    intensities = [point.flops / point.bytes for point in points]
    ridge = roofs.matmul_flops / roofs.copy_bytes
    left, right = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    speeds = [point.flops / seconds / 1e12 for point in points for seconds in (point.floor, *_first(point))]
    # The labels stand in the lowest quarter.
    top, lowest = roofs.matmul_flops / 1e12 * 2.2, min(speeds)
    axes.set_xlim(left, right)
    axes.set_ylim(lowest / (top / lowest) ** 0.4, top)
    _draw_roofs(axes, roofs, left, right)
    _draw_points(axes, points)
    _draw_labels(axes, points, intensities)
    axes.legend(loc="upper left", framealpha=1)
    if roofs.source:
        figure.supxlabel(f"roofs: {roofs.source}", fontsize=9, x=0.99, ha="right")
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png")


def _first(point: Point) -> list[float]:
    return [*point.measured.values()][:1]


def _draw_roofs(axes: Any, roofs: Roofs, left: float, right: float) -> None:
    peak = roofs.matmul_flops / 1e12
    slopes = [(roofs.copy_bytes, "-", "memory")]
    if roofs.l2_bytes is not None:
        slopes.append((roofs.l2_bytes, "--", "L2, for data that is there already"))
    for rate, line, name in slopes:
        ridge = roofs.matmul_flops / rate
        # From the first intensity shown to the ridge, where arithmetic takes over.
        axes.plot([left, ridge], [left * rate / 1e12, peak], color="black", linestyle=line, linewidth=1.5)
        at = math.sqrt(max(left, ridge / 30) * ridge)
        axes.annotate(
            f"{name}: {rate / 1e12:.3g} TB/s", (at, at * rate / 1e12), (-6, 6), textcoords="offset points",
            rotation=_slope_angle(axes), rotation_mode="anchor", ha="center", va="bottom",
        )  # fmt: skip
    axes.plot([min(roofs.matmul_flops / rate for rate, _, _ in slopes), right], [peak, peak], color="black")
    axes.annotate(
        f"matrix products: {peak:.4g} TFLOP/s", (right, peak), (-6, 5), textcoords="offset points", ha="right"
    )


def _slope_angle(axes: Any) -> float:
    """Degrees at which proportionality rises in the axes as they are laid out by now."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    box = axes.get_position()
    width, height = axes.figure.get_size_inches()
    rise = height * box.height / math.log(top / bottom)
    return math.degrees(math.atan2(rise, width * box.width / math.log(right / left)))


def _draw_points(axes: Any, points: Sequence[Point]) -> None:
    def place(group: Iterable[Point], seconds: Callable[[Point], float]) -> list[list[float]]:
        group = list(group)
        return [[p.flops / p.bytes for p in group], [p.flops / seconds(p) / 1e12 for p in group]]

    axes.plot(
        *place(points, lambda p: p.floor), linestyle="", marker="o", markerfacecolor="white", color="black",
        markersize=6, label="floor: one fused pass at the roofs", zorder=3,
    )  # fmt: skip
    measured = [point for point in points if point.measured]
    for point in measured:
        speeds = [point.flops / seconds / 1e12 for seconds in (*_first(point), point.floor)]
        at = point.flops / point.bytes
        axes.plot([at, at], speeds, color="grey", linewidth=0.8, zorder=1)
    for kind, style in _STYLES.items():
        group = [point for point in measured if verdict(point) == kind]
        if group:
            label = style["label"].format(ours=_names(group, slice(0, 1)), others=_names(group, slice(1, None)))
            x, y = place(group, lambda p: _first(p)[0])
            axes.plot(
                x, y, linestyle="", marker=style["marker"], color=style["color"], markersize=9, label=label, zorder=4
            )


def _names(group: Sequence[Point], which: slice) -> str:
    return " and ".join(dict.fromkeys(name for point in group for name in [*point.measured][which]))


def _draw_labels(axes: Any, points: Sequence[Point], intensities: Sequence[float]) -> None:
    """Names side by side at the bottom, upright, each led to its lowest marker."""
    (left, right), order = axes.get_xlim(), sorted(range(len(points)), key=lambda i: intensities[i])
    wanted = [math.log(intensities[i] / left) / math.log(right / left) for i in order]
    for i, x in zip(order, spread(wanted, _LABEL_GAP), strict=True):
        point = points[i]
        speed = point.flops / max(point.floor, *_first(point), 0) / 1e12
        axes.annotate(
            point.name, (intensities[i], speed), (x, 0.015), textcoords="axes fraction", rotation=90, ha="center",
            va="bottom", fontsize=9, arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.5, "shrinkB": 4},
        )  # fmt: skip


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending positions, each at least `gap` from the next and all as near to the ascending `wanted` as that allows
    within 0 to 1 (least squares: runs that are too close share the room about their mean).
    """
    if len(wanted) * gap > 1:
        gap = 1 / len(wanted)
    # Isotonic regression of wanted[i] - i * gap, by pooling neighbours that are out of order.
    pools: list[tuple[float, int]] = []
    for i, x in enumerate(wanted):
        total, count = x - i * gap, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before, number = pools.pop()
            total, count = total + before, count + number
        pools.append((total, count))
    offsets = [total / count for total, count in pools for _ in range(count)]
    highest = 1 - gap / 2 - (len(wanted) - 1) * gap
    return [min(max(offset, gap / 2), highest) + i * gap for i, offset in enumerate(offsets)]
