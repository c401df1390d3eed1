"""How fast each layer of a U-Net could be on a GPU of given peak rates.

Prints for every layer its lower bound, the least time in which the rates let it run, and the least time of an eager net
in which every op is a pass of its own (cases.py has the accounting). The rates are to be measured on the same GPU: the
FLOP/s of a large matrix product, and the bytes/s that a copy reads and writes. The command `gpu` measures both, gives
every layer's share of its bound, and draws the roofline.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from fastunet.checks import ConfigError
from fastunet.measuring.timing import Clock, Quantiles, clock_of, interleaved_samples

from .cases import Layer, Pass, Settings, add_settings, eager_passes, fused_pass, settings_of
from .results import Row, markdown


@dataclass(frozen=True)
class PeakRates:
    """What a GPU was measured to reach: FLOP/s of a matrix product, and bytes/s that a copy reads and writes."""

    matmul_flops: float
    copy_bytes: float

    def __post_init__(self) -> None:
        if not (0 < self.matmul_flops < math.inf and 0 < self.copy_bytes < math.inf):
            raise ConfigError(f"expected rates above 0 and finite, got {self.matmul_flops} and {self.copy_bytes}")

    def seconds(self, work: Pass) -> float:
        """Return the least time of a pass: arithmetic and memory traffic overlap, and the longer of the two decides."""
        return max(work.flops / self.matmul_flops, work.bytes / self.copy_bytes)


def roofline_table(layers: Sequence[Layer], peaks: PeakRates, dtype: torch.dtype) -> str:
    """Write Markdown: each layer's work, its lower bound and eager's, in microseconds, and the sums."""
    batch = next(iter(layers[0].shapes.values()))[0]
    lines = []
    for name, part in [*((layer.name, [layer]) for layer in layers), ("total", layers)]:
        works = [fused_pass(layer, dtype.itemsize) for layer in part]
        flops, moved = (sum(getattr(work, what) for work in works) for what in ("flops", "bytes"))
        bound = sum(map(peaks.seconds, works))
        eager = sum(peaks.seconds(work) for layer in part for work in eager_passes(layer, dtype.itemsize))
        cells = [f"{flops / batch / 1e9:.1f}", f"{moved / batch / 1e6:.1f}", f"{1e6 * bound:.0f}", f"{1e6 * eager:.0f}"]
        lines.append([name, *cells])
    return markdown(["layer", "GFLOP/img", "MB/img", "bound µs", "eager µs"], lines)


# --- the peak rates of a device, measured: what copying, multiplying and reading L2 reach there ---

# By device, far past its caches and enough to fill it: bytes that are copied, the side of square matrices, and the
# seconds for which these are multiplied without a break.
SIZES = {"cuda": (1 << 30, 8192, 2.0), "cpu": (1 << 27, 1024, 0.5)}

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
_VECTOR, _REPEATS = 16, 64
# Samples of a burst: too few to heat anything.
_BURST = 10


def burst_and_steady(run: Callable[[], Any], clock: Clock, *, seconds: float) -> tuple[Quantiles, Quantiles]:
    """The first samples after a second of rest, and the last half of the samples of `seconds` without a break.

    A GPU begins at its highest clock and lowers it when its power limit is reached.
    """
    for _ in range(3):  # Warm-up.
        run()
    clock.wait()
    time.sleep(1.0)
    end, samples = time.perf_counter() + seconds, list[float]()
    while not samples or time.perf_counter() < end:
        # Back to back: the end of a sample is the beginning of the next.
        marks = [clock.mark()]
        for _ in range(_BURST):
            run()
            marks.append(clock.mark())
        clock.wait()
        samples += [clock.elapsed(begin, finish) for begin, finish in itertools.pairwise(marks)]
    return Quantiles.of(samples[:_BURST]), Quantiles.of(samples[len(samples) // 2 :])


def measure_peak_rates(device: torch.device, clock: Clock | None = None) -> Row:
    """Measure "copy" and "l2" in GB/s (10^9 bytes), and "matmul" in TFLOP/s in a burst and in steady state, each with
    how it was measured; of "l2" and "timer", the second clock, None and a reason where they cannot be.
    """
    clock = clock or clock_of(device)
    size, side, seconds = SIZES[device.type]
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    copy = _rate("Tensor.copy_, counted twice,", lambda: target.copy_(source), 2 * size, clock)
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    burst, steady = burst_and_steady(lambda: torch.mm(a, b, out=out), clock, seconds=seconds)
    how = (
        f"torch.mm of {side} x {side} normal bfloat16; burst: median of the first {burst.samples} after a second of "
        f"rest; steady: of the last {steady.samples} of {seconds:g} s without a break"
    )
    matmul: Row = {"burst_tflops": 2e-12 * side**3 / burst.median, "steady_tflops": 2e-12 * side**3 / steady.median}
    matmul |= {"how": how, "seconds": {"burst": asdict(burst), "steady": asdict(steady)}}
    l2 = _by_cupy(device, "gb_per_s", lambda: _l2_rate(device, clock))
    timer = _by_cupy(device, "ratio", lambda: _second_clock(device, lambda: torch.mm(a, b, out=out), burst.median))
    return {"copy": copy, "matmul": matmul, "l2": l2, "timer": timer}


def _by_cupy(device: torch.device, name: str, measure: Callable[[], Row]) -> Row:
    """Return what is measured; None by that name, and a "reason", where there is no CUDA, or no CuPy."""
    if device.type != "cuda":
        return {name: None, "reason": f"the device is {device.type}, not cuda"}
    try:
        return measure()
    except Exception as error:  # CuPy's own, such as a compiler that it does not find: the other peaks still count.
        return {name: None, "reason": f"{type(error).__name__}: {error}"}


def _second_clock(device: torch.device, run: Callable[[], Any], seconds: float) -> Row:
    """Time a run by CuPy's profiler too, on torch's stream: the "ratio" of its median to ours, on which all other times
    rest. It waits for the GPU before each sample, so that a launch is part of its time.
    """
    import cupy
    from cupyx import profiler

    with cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream):
        median = float(np.median(profiler.benchmark(run, n_repeat=_BURST, n_warmup=3).gpu_times))
    how = f"torch.mm by cupyx.profiler.benchmark, {1e3 * median:.3g} ms / in a burst by events, {1e3 * seconds:.3g} ms"
    return {"ratio": median / seconds, "how": how}


def _l2_rate(device: torch.device, clock: Clock) -> Row:
    run, size = _l2_reader(device)
    return _rate("a kernel of 16-byte ld.global.cg", run, size * _REPEATS, clock)


def _rate(what: str, run: Callable[[], Any], size: int, clock: Clock) -> Row:
    times = Quantiles.of(interleaved_samples({"run": [run]}, clock, rounds=20)["run"])
    how = f"{what} of {size} bytes; median of {times.samples}"
    return {"gb_per_s": size / times.median / 1e9, "how": how, "seconds": asdict(times)}


def _l2_reader(device: torch.device) -> tuple[Callable[[], Any], int]:
    """A reader on the current stream, compiled by CuPy, and the bytes it reads so many times."""
    import cupy

    properties = torch.cuda.get_device_properties(device)
    # The largest power of two within a quarter of L2: half of a divided L2 is then enough for all of it.
    size = 1 << int(math.log2(properties.L2_cache_size // 4))
    data, out = torch.randn(size // 4, device=device), torch.zeros(1, device=device)
    kernel = cupy.RawKernel(_READ_L2, "read_l2")
    arguments = cupy.from_dlpack(data), cupy.from_dlpack(out), cupy.uint32(size // _VECTOR), cupy.uint32(_REPEATS)

    def run() -> None:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream):
            kernel((4 * properties.multi_processor_count,), (512,), arguments)

    return run, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tflops", type=float, required=True, help="measured rate of a matrix product, TFLOP/s")
    parser.add_argument("--tbps", type=float, required=True, help="measured rate of a copy, read and written, TB/s")
    add_settings(parser, Settings(), "features", "size", "batch", "dtype")


def run(options: argparse.Namespace) -> int:
    settings = settings_of(options)
    peaks = PeakRates(1e12 * options.tflops, 1e12 * options.tbps)
    print(roofline_table(settings.net_layers(), peaks, settings.torch_dtype))
    return 0
