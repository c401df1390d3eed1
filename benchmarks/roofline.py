"""How fast each layer of a U-Net could be on a GPU of given roofs, and how near to that it came.

    python -m benchmarks roofline --tflops 790 --tbps 3.0 [--features 64 128 ...] [--size 512] [--batch 16]
    python -m benchmarks roofline --tflops 790 --tbps 3.0 --report gpu_report.json --out roofline.png

prints for every layer its floor, the least time in which the roofs let it run, and the least time of an eager net in
which every op is a pass of its own (cases.py has the accounting); with --report, a file of `gpu`, the measured
times and what share of them the floor is. --out draws the roofline. The roofs are to be measured on the same GPU: the
FLOP/s of a large matrix product, and the bytes/s that a copy reads and writes. UNets of either upsampling are counted.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastunet.files import written_whole

from .cases import DTYPE, DTYPES, Layer, Pass, Settings, eager_passes, fused_pass
from .results import markdown, times_ms


@dataclass(frozen=True)
class Roofs:
    """What a GPU was measured to reach.

    matmul_flops: FLOP/s of a matrix product. copy_bytes: bytes/s that a copy reads and writes. l2_bytes: bytes/s read
    from L2, None where not measured. source: who measured them, and on what.
    """

    matmul_flops: float
    copy_bytes: float
    l2_bytes: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("matmul_flops", "copy_bytes", "l2_bytes"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"expected {name} above 0 and finite, got {value}")


@dataclass(frozen=True)
class Point:
    """A layer in the roofline plot.

    flops, bytes: of its fused pass. floor: seconds. measured: seconds, by implementation ("triton" and "aten" in a
    report); empty where nothing was measured.
    """

    name: str
    flops: int
    bytes: int
    floor: float
    measured: Mapping[str, float]


def pass_seconds(work: Pass, roofs: Roofs) -> float:
    """The least time of one pass: arithmetic and memory traffic overlap, and the longer of the two decides."""
    return max(work.flops / roofs.matmul_flops, work.bytes / roofs.copy_bytes)


def floor_seconds(layer: Layer, roofs: Roofs, dtype: torch.dtype = DTYPE) -> float:
    """The least time of the layer as one fused pass over tensors of dtype."""
    return pass_seconds(fused_pass(layer, dtype.itemsize), roofs)


def eager_seconds(layer: Layer, roofs: Roofs, dtype: torch.dtype = DTYPE, *, instance_norm: bool = False) -> float:
    """The least time of the layer where every op is a pass of its own."""
    return sum(pass_seconds(work, roofs) for work in eager_passes(layer, dtype.itemsize, instance_norm=instance_norm))


def point_of(
    layer: Layer, roofs: Roofs, measured: Mapping[str, float] | None = None, dtype: torch.dtype = DTYPE
) -> Point:
    """The layer's place in the plot; measured: seconds by implementation."""
    work = fused_pass(layer, dtype.itemsize)
    return Point(layer.name, work.flops, work.bytes, pass_seconds(work, roofs), measured or {})


def points_of_report(report: Mapping[str, Any], roofs: Roofs) -> list[Point]:
    """The layers that a report of `gpu` has forward times of, in its order; medians."""
    points = []
    for row in report["rows"]:
        if row["kind"] == "layer" and row["variant"] == "forward" and "samples_ms" in row:
            shapes = {name: tuple(shape) for name, shape in row["shapes"].items()}
            measured = {name: times.median / 1e3 for name, times in times_ms(row).items()}
            points.append(point_of(Layer(row["name"], row["op"], shapes, row["flops"]), roofs, measured))
    return points


def roofline_table(layers: Sequence[Layer], eager: Callable[[Layer], float], points: Sequence[Point]) -> str:
    """Markdown: each layer's work, its floor and eager's, in microseconds; what was measured, and their sums.

    points: of those layers, by name. A measured total is shown only where every layer was measured.
    """
    by_name = {point.name: point for point in points}
    names = list(dict.fromkeys(name for point in points for name in point.measured))
    header = ["layer", "GFLOP/img", "MB/img", "floor µs", "eager µs"]
    header += [part for name in names for part in (f"{name} µs", "floor is")]
    lines = [_line(layer.name, layer.shapes, [by_name[layer.name]], eager(layer), names) for layer in layers]
    lines.append(
        _line("total", layers[0].shapes, [by_name[layer.name] for layer in layers], sum(map(eager, layers)), names)
    )
    return markdown(header, lines)


def _line(
    name: str, shapes: Mapping[str, tuple[int, ...]], points: Sequence[Point], eager: float, names: Sequence[str]
) -> list[str]:
    batch = next(iter(shapes.values()))[0]
    flops, moved, floor = (sum(getattr(p, what) for p in points) for what in ("flops", "bytes", "floor"))
    cells = [
        name,
        f"{flops / batch / 1e9:.1f}",
        f"{moved / batch / 1e6:.1f}",
        f"{1e6 * floor:.0f}",
        f"{1e6 * eager:.0f}",
    ]
    for implementation in names:
        if all(implementation in point.measured for point in points):
            seconds = sum(point.measured[implementation] for point in points)
            cells += [f"{1e6 * seconds:.0f}", f"{floor / seconds:.0%}"]
        else:
            cells += ["", ""]
    return cells


# --- the plot ---

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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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


# --- the command ---


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print the table and write the plot. Returns 0."""
    try:
        roofs = Roofs(1e12 * options.tflops, 1e12 * options.tbps, source=options.source)
        settings, report = _settings(options)
        layers = settings.net_layers()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    dtype = settings.torch_dtype
    floors = [point_of(layer, roofs, dtype=dtype) for layer in layers]
    measured = [] if report is None else points_of_report(report, roofs)
    points = [*{point.name: point for point in (*floors, *measured)}.values()]
    is_instance = settings.norm == "instance"
    print(roofline_table(layers, lambda layer: eager_seconds(layer, roofs, dtype, instance_norm=is_instance), points))
    if options.out is not None:
        plot_roofline(points, roofs, options.out)
        print(options.out)
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    usual = Settings()
    parser.add_argument("--tflops", type=float, required=True, help="measured roof of a matrix product, TFLOP/s")
    parser.add_argument("--tbps", type=float, required=True, help="measured roof of a copy, read and written, TB/s")
    parser.add_argument("--source", default="", help="where these come from, for the plot")
    parser.add_argument("--features", type=int, nargs="+", default=[*usual.features])
    parser.add_argument("--in-channels", type=int, default=usual.in_channels)
    parser.add_argument("--out-channels", type=int, default=usual.out_channels)
    parser.add_argument("--norm", choices=("batch", "instance", "none"), default="batch")
    parser.add_argument("--upsample", choices=("transpose", "bilinear"), default="transpose")
    parser.add_argument("--size", type=int, default=usual.size, help="side of the square images")
    parser.add_argument("--batch", type=int, default=usual.batch)
    parser.add_argument("--dtype", choices=[*DTYPES], default="bfloat16")
    parser.add_argument("--report", type=Path, metavar="JSON", help="measured times; it tells net, images and dtype")
    parser.add_argument("--out", type=Path, metavar="PNG")


def _settings(options: argparse.Namespace) -> tuple[Settings, dict[str, Any] | None]:
    """The net and its images, from the report if there is one, and the report."""
    if options.report is not None:
        report = json.loads(options.report.read_text())
        found = report["settings"] | {"features": tuple(report["settings"]["features"])}
        return Settings(**found), report
    features = tuple(options.features)
    if options.batch < 1 or options.size < 2 ** (len(features) - 1):
        raise ValueError(
            f"expected --batch from 1 and --size from {2 ** (len(features) - 1)}, got {options.batch}, {options.size}"
        )
    size = {"size": options.size, "batch": options.batch, "features": features}
    net = {"in_channels": options.in_channels, "out_channels": options.out_channels, "upsample": options.upsample}
    norm = None if options.norm == "none" else options.norm
    return Settings(**size, **net, norm=norm, dtype=options.dtype), None
