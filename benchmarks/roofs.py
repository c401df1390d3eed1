"""The measured roofs of a device: what copying, multiplying and reading L2 reach there, and how that was measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .harness.timing import Clock, Quantiles, burst_and_steady, clock_of, interleaved_samples
from .results import Row

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
