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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .cases import DTYPE, DTYPES, Layer, Pass, Settings, eager_passes, fused_pass
from .harness.timing import Clock, Quantiles, burst_and_steady, clock_of, interleaved_samples
from .results import Row, markdown, times_ms


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


# --- the peak rates of a device, measured: what copying, multiplying and reading L2 reach there ---

# What runs on CUDA: reads, past L1 (.cg), `count` vectors `repeats` times. Each pass begins elsewhere, so that no load
# of it can be taken from the pass before. The sum is stored where it can never be seen to be the value.
_READ_L2 = r"""
extern "C" __global__ void read_l2(const float4* data, float* out, unsigned count, unsigned repeats) {
    float sum = 0.0f;
    for (unsigned pass = 0; pass < repeats; ++pass)
        for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
            const float4 v = __ldcg(data + ((i + pass * 4099u) & (count - 1u)));
            sum += v.x + v.y + v.z + v.w;
        }
    if (sum == 1.0e30f) out[0] = sum;
}
"""
_VECTOR = 16


@dataclass(frozen=True)
class Sizes:
    """copy_bytes: of the tensor that is copied. side: of the square matrices. rounds: samples of a copy. seconds: of
    multiplying without a break.
    """

    copy_bytes: int
    side: int
    rounds: int = 20
    seconds: float = 2.0

    @classmethod
    def of(cls, device: torch.device) -> Sizes:
        """Far past the caches, and products that fill the device."""
        if device.type == "cuda":
            return cls(1 << 30, 8192)
        return cls(1 << 27, 1024, seconds=0.5)


def measure_roofs(device: torch.device, sizes: Sizes | None = None, clock: Clock | None = None) -> Row:
    """The row: "copy", "matmul" and "l2", each with its rate and how it was measured; of the last, None and a reason
    where it cannot be.
    """
    sizes, clock = sizes or Sizes.of(device), clock or clock_of(device)
    return {
        "copy": copy_rate(device, sizes, clock),
        "matmul": matmul_rate(device, sizes, clock),
        "l2": l2_rate(device, clock),
    }


def copy_rate(device: torch.device, sizes: Sizes, clock: Clock) -> Row:
    """ "gb_per_s" (10^9 bytes), read and written, of one large Tensor.copy_."""
    source = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    samples = interleaved_samples({"copy": [lambda: target.copy_(source)]}, clock, rounds=sizes.rounds)
    times = Quantiles.of(samples["copy"])
    how = f"Tensor.copy_ of {sizes.copy_bytes} bytes, counted twice; median of {times.samples}"
    return {"gb_per_s": 2 * sizes.copy_bytes / times.median / 1e9, "how": how, "seconds": asdict(times)}


def matmul_rate(device: torch.device, sizes: Sizes, clock: Clock) -> Row:
    """ "burst_tflops" and "steady_tflops" (10^12 multiplications and additions) of square bfloat16 matrices."""
    side = sizes.side
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    burst, steady = burst_and_steady(lambda: torch.mm(a, b, out=out), clock, seconds=sizes.seconds)
    how = (
        f"torch.mm of {side} x {side} normal bfloat16; burst: median of the first {burst.samples} after a second of "
        f"rest; steady: of the last {steady.samples} of {sizes.seconds:g} s without a break"
    )

    def tflops(times: Quantiles) -> float:
        return 2 * side**3 / times.median / 1e12

    return {
        "burst_tflops": tflops(burst),
        "steady_tflops": tflops(steady),
        "how": how,
        "seconds": {"burst": asdict(burst), "steady": asdict(steady)},
    }


@dataclass(frozen=True)
class Reader:
    """run reads `total_bytes` of a buffer of `buffer_bytes` that stays in L2."""

    run: Callable[[], Any]
    buffer_bytes: int
    total_bytes: int


def l2_rate(
    device: torch.device, clock: Clock, make_reader: Callable[[torch.device], Reader] | None = None, rounds: int = 20
) -> Row:
    """ "gb_per_s" of reading what lies in L2; None and a "reason" where there is no CUDA, or no CuPy."""
    if device.type != "cuda" and make_reader is None:
        return {"gb_per_s": None, "reason": f"the device is {device.type}, not cuda"}
    try:
        reader = (make_reader or cupy_reader)(device)
        times = Quantiles.of(interleaved_samples({"read": [reader.run]}, clock, rounds=rounds)["read"])
    except ImportError as error:
        return {"gb_per_s": None, "reason": f"CuPy cannot be imported: {error}"}
    except Exception as error:  # CuPy's own, such as a compiler that it does not find: the other roofs still count.
        return {"gb_per_s": None, "reason": f"{type(error).__name__}: {error}"}
    how = f"a kernel of 16-byte ld.global.cg over {reader.buffer_bytes} bytes; median of {times.samples}"
    return {"gb_per_s": reader.total_bytes / times.median / 1e9, "how": how, "seconds": asdict(times)}


def l2_buffer_bytes(cache: int) -> int:
    """The largest power of two within a quarter of L2: half of a divided L2 is then enough for all of it."""
    return 1 << int(math.log2(cache // 4))


def cupy_reader(device: torch.device) -> Reader:
    """The reader on the current stream, compiled by CuPy. ImportError without it."""
    import cupy

    properties = torch.cuda.get_device_properties(device)
    size, repeats, threads = l2_buffer_bytes(properties.L2_cache_size), 64, 512
    data = torch.randn(size // 4, device=device)
    out = torch.zeros(1, device=device)
    kernel = cupy.RawKernel(_READ_L2, "read_l2")
    arrays = cupy.from_dlpack(data), cupy.from_dlpack(out)
    counts = cupy.uint32(size // _VECTOR), cupy.uint32(repeats)
    grid = 4 * properties.multi_processor_count

    def run() -> None:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream):
            kernel((grid,), (threads,), (*arrays, *counts))

    return Reader(run, size, size * repeats)


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
        from .charts import plot_roofline

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
