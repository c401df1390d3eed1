"""Compile every kernel in every configuration that can be chosen, for every target, and look at the result.

No GPU is needed:

    python -m benchmarks.static [--target 90] [--op forward] [--jobs 2]

prints a row for each and ends with exit code 1 if any row breaks a rule:

- no spills, by ptxas's report
- shared memory within the target's limit
- 16-bit and TF32 products on tensor cores: wgmma on sm_90 and tcgen05 on sm_100 where the product has the 64 rows they
  need, mma for smaller ones and on sm_80 to sm_89; float32 products not on tensor cores, where they would be rounded
- no ptxas warning C75xx: a serialised wgmma
- NaN kept: no plain `max.f32` anywhere, and `max.NaN.f32` where there is pooling

What is compiled is what the launchers would launch: their arguments, on tensors without memory, specialised as Triton
specialises them (1 becomes a constant, multiples of 16 are known to be).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from fastunet.kernels import config, gpu
from torch import Tensor

TARGETS = tuple(gpu.SHARED_MEMORY_LIMITS)
OPS = (
    *("forward", "pool", "two_inputs", "contiguous_weight", "leaky", "input_grad"),
    *("weight_grad", "bias_grad", "reduce", "activation_grad", "unpool"),
)

# A product with fewer rows than this has no wgmma and no tcgen05 instruction.
_WARPGROUP_ROWS = 64

# Seconds one compilation may take: a few hundred times the usual, because machines stall.
_TIMEOUT = 300.0

_TRITON_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Job:
    """One compilation."""

    op: str
    dtype: torch.dtype
    allow_tf32: bool
    capability: int
    shape: config.ConvShape

    @property
    def math(self) -> str:
        """The products' number format."""
        if self.dtype == torch.float32:
            return "tf32" if self.allow_tf32 else "fp32"
        return _TRITON_TYPES[self.dtype]


@dataclass(frozen=True)
class Compiled:
    """What a compilation gave: registers, spills and warnings as ptxas reports them, instruction counts of the PTX."""

    registers: int
    spill_bytes: int
    shared_memory: int
    mma: int
    wgmma: int
    tcgen05: int
    warnings: tuple[str, ...]
    ptx: str


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    job: Job
    label: str
    compiled: Compiled | None
    seconds: float
    breaches: Sequence[str] = field(default=())


def all_jobs() -> list[Job]:
    """Everything there is to compile: bf16 and both kinds of float32 in full, fp16, which compiles alike, in part."""
    formats = ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True))
    found: list[Job] = []
    for capability, (dtype, tf32) in itertools.product(TARGETS, formats):
        found += _jobs(capability, dtype, tf32)
    for job in [job for job in found if job.dtype == torch.bfloat16 and job.shape.c1 == job.shape.c_out == 64]:
        found.append(replace(job, dtype=torch.float16))
    return found


def _jobs(capability: int, dtype: torch.dtype, allow_tf32: bool) -> Iterator[Job]:
    target = gpu.known_target(capability)
    make = functools.partial(Job, dtype=dtype, allow_tf32=allow_tf32, capability=capability)
    shapes = config.conv_configs(dtype, target, allow_tf32=allow_tf32).values()
    for shape in shapes:
        for op in ("forward", "pool", "input_grad"):
            yield make(op, shape=shape)
        if shape.c1 >= config.FOLDED_BELOW:
            yield make("two_inputs", shape=replace(shape, c2=shape.c1))
            if shape.aligned:
                yield make("contiguous_weight", shape=shape)
    for c_in, c_out in config.weight_grad_configs(dtype, target, allow_tf32=allow_tf32).values():
        yield make("bias_grad", shape=config.ConvShape(c_in, 0, c_out, 64, 64))
    widest = max((shape for shape in shapes if shape.aligned), key=lambda shape: (shape.c1, shape.c_out))
    for op in ("leaky", "weight_grad"):
        yield make(op, shape=widest)
    if not allow_tf32:
        yield make("reduce", shape=widest)
        yield make("activation_grad", shape=widest)
        for channels in (*config.pointwise_configs().values(), 3, 100):  # The last two load no vectors.
            yield make("unpool", shape=replace(widest, c_out=channels))


def launch_of(job: Job) -> gpu.Launch:
    """What the launchers would launch for this job's shape on its target."""
    from fastunet.kernels import conv3x3, conv3x3_grad  # Late: triton is imported by the compiling process alone.

    shape, target = job.shape, gpu.known_target(job.capability)

    def tensor(*sizes: int, layout: torch.memory_format = torch.channels_last) -> Tensor:
        return torch.empty(sizes, dtype=job.dtype, device="meta", memory_format=layout)

    def pixels(channels: int, step: int = 1) -> Tensor:
        return tensor(2, channels, shape.height // step, shape.width // step)

    x, y = pixels(shape.c1), pixels(shape.c_out)
    bias = torch.empty(shape.c_out, dtype=job.dtype, device="meta")
    if job.op in ("activation_grad", "unpool"):
        pooled = pixels(shape.c_out, 2) if job.op == "unpool" else None
        return conv3x3_grad.activation_grad_launch(y, y, pooled, y, 0.0)
    if job.op in ("weight_grad", "bias_grad", "reduce"):
        weight = tensor(shape.c_out, shape.c1, 3, 3)
        grad_bias = None if job.op == "weight_grad" else bias
        launches = conv3x3_grad.weight_grad_launches(y, x, weight, grad_bias, allow_tf32=job.allow_tf32, target=target)
        return launches[job.op == "reduce"]
    input_grad = job.op == "input_grad"
    layout = torch.contiguous_format if job.op == "contiguous_weight" else torch.channels_last
    sizes = (shape.c1, shape.c_out) if input_grad else (shape.c_out, shape.c1 + shape.c2)
    weight = tensor(*sizes, 3, 3, layout=layout)
    return conv3x3.conv3x3_launch(
        x,
        pixels(shape.c2) if shape.c2 else None,
        weight,
        None if input_grad else bias,
        y,
        pixels(shape.c_out, 2) if job.op == "pool" else None,
        negative_slope=None if input_grad else 0.1 if job.op == "leaky" else 0.0,
        input_grad=input_grad,
        allow_tf32=job.allow_tf32,
        target=target,
    )


def compile_launch(launch: gpu.Launch, capability: int) -> Compiled:
    """Compile a launch for a capability. Triton's and ptxas's errors pass through."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton.knobs.compilation.always_compile = True  # The cache would give back the code without ptxas's report.
    triton.knobs.nvidia.dump_ptxas_log = True
    source = ASTSource(launch.kernel, *_specialise(launch))
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        built = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options=launch.options,
        )
    report, ptx = log.getvalue(), built.asm["ptx"]
    return Compiled(
        registers=int(re.findall(r"Used (\d+) registers", report)[-1]),
        spill_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)),
        shared_memory=built.metadata.shared,
        mma=ptx.count("mma.sync."),
        wgmma=ptx.count("wgmma.mma_async."),
        tcgen05=ptx.count("tcgen05.mma."),
        warnings=tuple(re.findall(r"\(C75\d\d\).*", report)),
        ptx=ptx,
    )


def _specialise(launch: gpu.Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Triton's signature, constants and attributes for a launch's arguments, by the rules of its just-in-time path."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        divisible = False
        if isinstance(value, Tensor):
            signature[name] = f"*{_TRITON_TYPES[value.dtype]}"
            divisible = True
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def find_breaches(compiled: Compiled, job: Job, launch: gpu.Launch, *, shared_memory: int | None = None) -> list[str]:
    """The rules a compilation breaks, in words. shared_memory: the limit, by default that of the job's target."""
    limit = gpu.SHARED_MEMORY_LIMITS[job.capability] if shared_memory is None else shared_memory
    found = list(compiled.warnings)
    if compiled.spill_bytes:
        found.append(f"spills {compiled.spill_bytes} B")
    if compiled.shared_memory > limit:
        found.append(f"shared memory {compiled.shared_memory} B, the limit is {limit} B")
    if re.search(r"\bmax(\.ftz)?\.(f32|f16|bf16)\b", compiled.ptx):
        found.append("a plain max drops NaN")
    if job.op == "pool" and "max.NaN.f32" not in compiled.ptx:
        found.append("pooling without max.NaN.f32 drops NaN")
    found += _tensor_core_breaches(compiled, job, launch)
    return found


def _tensor_core_breaches(compiled: Compiled, job: Job, launch: gpu.Launch) -> list[str]:
    arguments = launch.arguments
    used = {"mma": compiled.mma, "wgmma": compiled.wgmma, "tcgen05": compiled.tcgen05}
    if "PRECISION" not in arguments or job.math == "fp32":
        return [f"{name} in float32 arithmetic" for name, count in used.items() if count]
    rows = arguments.get("BLOCK_OUT", arguments["TILE_H"] * arguments["TILE_W"])
    wanted = "mma"
    if rows >= _WARPGROUP_ROWS and job.capability >= 90:
        wanted = "wgmma" if job.capability < 100 else "tcgen05"
    return [] if used[wanted] else [f"no {wanted} instruction"]


def compile_job(job: Job) -> Row:
    """Compile and check one job; an exception becomes a breach."""
    start = time.perf_counter()
    label = ""
    try:
        launch = launch_of(job)
        label = describe(job, launch)
        compiled = compile_launch(launch, job.capability)
        return Row(job, label, compiled, time.perf_counter() - start, find_breaches(compiled, job, launch))
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200] if str(error) else ''}"
        return Row(job, label, None, time.perf_counter() - start, [reason])


def describe(job: Job, launch: gpu.Launch) -> str:
    """The configuration in short: pixels x channels, K, warps, stages."""
    a = launch.arguments
    if "BLOCK_N" in a:
        blocks = f"{a['TILE_H']}x{a['TILE_W']}x{a['BLOCK_N']} k{a['BLOCK_K']}"
    elif "BLOCK_OUT" in a:
        blocks = f"{a['BLOCK_OUT']}x{a['BLOCK_IN']} k{a['TILE_H'] * a['TILE_W']}"
    else:
        blocks = f"{a['BLOCK_P']}x{a['BLOCK_C']}" if "BLOCK_P" in a else f"{a['BLOCK']}"
    folded = " folded" if a.get("FOLDED") else ""
    unaligned = "" if config.aligned(job.shape.c1, job.shape.c_out) else " unaligned"
    return f"{blocks} w{launch.num_warps} s{launch.num_stages}{folded}{unaligned}"


class _Compiler:
    """A process that compiles jobs one by one, replaced when it dies or takes too long."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Any = None

    def run(self, job: Job) -> Row:
        if self._process is None:
            self._start()
        try:
            self._connection.send(job)
            if self._connection.poll(_TIMEOUT):
                return self._connection.recv()
            reason = f"took more than {_TIMEOUT:.0f} s"
        except (EOFError, OSError):
            self._process.join()
            reason = f"the compiling process died with exit code {self._process.exitcode}"
        self.close()
        return Row(job, "", None, 0.0, [reason])

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # So that the process's death ends our reading.

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def _serve(connection: Connection) -> None:
    while True:
        connection.send(compile_job(connection.recv()))


def run_jobs(jobs: Sequence[Job], processes: int) -> Iterator[Row]:
    """Compile the jobs in `processes` processes; rows come in the jobs' order."""
    os.environ.pop("TRITON_INTERPRET", None)  # Interpreted kernels cannot be compiled.
    local = threading.local()
    compilers: list[_Compiler] = []

    def run(job: Job) -> Row:
        if not hasattr(local, "compiler"):
            local.compiler = _Compiler()
            compilers.append(local.compiler)
        return local.compiler.run(job)

    try:
        with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(processes) as pool:
            os.environ["TRITON_CACHE_DIR"] = cache
            yield from pool.map(run, jobs)
    finally:
        for compiler in compilers:
            compiler.close()


def format_row(row: Row) -> str:
    """One line of the table, breaches last."""
    job = row.job
    name = f"{job.op:<18}{row.label:<34}{job.math:<6}sm_{job.capability:<5}"
    compiled = row.compiled
    if compiled is not None:
        cores = {"wgmma": compiled.wgmma, "tcgen05": compiled.tcgen05, "mma": compiled.mma}
        used = " ".join(f"{kind} {count}" for kind, count in cores.items() if count) or "-"
        name += f"{compiled.registers:>4}{compiled.spill_bytes:>7}{compiled.shared_memory:>8}  {used:<14}"
    return name + (f"  FAIL: {'; '.join(row.breaches)}" if row.breaches else "")


HEADER = f"{'op':<18}{'config':<34}{'math':<6}{'target':<8}{'regs':>4}{'spills':>7}{'shared':>8}  tensor cores"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if every compilation keeps the rules, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=int, choices=TARGETS, nargs="*", default=TARGETS, help="compute capabilities")
    parser.add_argument("--op", choices=OPS, nargs="*", default=OPS)
    parser.add_argument("--jobs", type=int, default=2, help="compiling processes")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    jobs = [job for job in all_jobs() if job.capability in options.target and job.op in options.op]
    print(HEADER)
    rows: list[Row] = []
    for row in run_jobs(jobs, options.jobs):
        print(format_row(row), flush=True)
        rows.append(row)
    failed = sum(bool(row.breaches) for row in rows)
    registers = max((row.compiled.registers for row in rows if row.compiled), default=0)
    print(
        f"{len(rows)} compiled in {time.perf_counter() - start:.0f} s, at most {registers} registers, {failed} failed"
    )
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
