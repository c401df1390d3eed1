"""Compile every kernel in every configuration that can be chosen, for every target, and look at the result.

No GPU is needed:

    python -m benchmarks static [--quick] [--target 90] [--op forward] [--jobs 2]

prints a row for each and ends with exit code 1 if any row breaks a rule. --quick takes one configuration of each kernel
and target. The rules:

- no spills, by ptxas's report
- shared memory within the target's limit
- 16-bit and TF32 products on tensor cores: wgmma on sm_90 and tcgen05 on sm_100 where the product has the 64 rows they
  need, mma for smaller ones and on sm_80 to sm_89; float32 products not on tensor cores, where they would be rounded
- both 16-bit operands of wgmma in shared memory: the first may also come from registers, and does if it must be
  rearranged on the way, which is slower; right only where the kernel computes it
- no ptxas warning C75xx: a serialised wgmma
- products of 8 bits where the values have as many; on sm_90, whose tensor cores keep some 14 bits of their sums, a new
  sum for each step
- where warps have roles of their own: registers given from one to the other, no operand read by ldmatrix, and in the
  innermost loops around the products no load from shared memory into registers
- NaN kept: no plain `max.f32` anywhere, and a `max.NaN` where there is pooling

What is compiled is what the launchers would launch: their arguments, on tensors without memory, specialised as Triton
specialises them (1 becomes a constant, multiples of 16 are known to be).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastunet.kernels import gpu
from torch import Tensor

from .harness.worker import Spawned
from .jobs import TARGETS, TRITON_TYPES, Job, all_jobs, all_ops, describe, launch_of, one_of_each

# A product with fewer rows than this has no wgmma and no tcgen05 instruction.
_WARPGROUP_ROWS = 64

# Seconds one compilation may take: a few hundred times the usual, because machines stall.
_TIMEOUT = 300.0


@dataclass(frozen=True)
class Compiled:
    """What a compilation gave: registers, spills and warnings as ptxas reports them, instruction counts of the PTX; of
    kernels in Gluon also those of the machine code.

    product_rows: of the matrix products' results, which decide the tensor-core instruction; 0 where there are none.
    """

    registers: int
    spill_bytes: int
    shared_memory: int
    mma: int
    wgmma: int
    wgmma_from_registers: int
    tcgen05: int
    warnings: tuple[str, ...]
    ptx: str
    product_rows: int
    loads_between_products: int = 0


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    job: Job
    label: str
    compiled: Compiled | None
    seconds: float
    breaches: Sequence[str] = field(default=())


def compile_launch(launch: gpu.Launch, capability: int) -> Compiled:
    """Compile a launch for a capability. Triton's and ptxas's errors pass through."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    triton.knobs.compilation.always_compile = True  # The cache would give back the code without ptxas's report.
    triton.knobs.nvidia.dump_ptxas_log = True
    kind = GluonASTSource if isinstance(launch.kernel, GluonJITFunction) else ASTSource
    source = kind(launch.kernel, *_specialise(launch))
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        built = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options=launch.options,
        )
    report, ptx = log.getvalue(), built.asm["ptx"]
    is_gluon = kind is GluonASTSource
    return Compiled(
        registers=int(re.findall(r"Used (\d+) registers", report)[-1]),
        spill_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)),
        shared_memory=built.metadata.shared,
        mma=ptx.count("mma.sync."),
        wgmma=ptx.count("wgmma.mma_async."),
        wgmma_from_registers=len(re.findall(r"wgmma\.mma_async[^;]*\}\s*,\s*\{", ptx)),
        tcgen05=ptx.count("tcgen05.mma."),
        warnings=tuple(re.findall(r"\(C75\d\d\).*", report)),
        ptx=ptx,
        # Gluon's have no other form than warpgroups'.
        product_rows=_WARPGROUP_ROWS if is_gluon else _product_rows(built.asm["ttir"]),
        loads_between_products=loads_between_products(_disassembled(built.asm["cubin"])) if is_gluon else 0,
    )


def _product_rows(ttir: str) -> int:
    return min(map(int, re.findall(r"tt\.dot\b.* -> tensor<(\d+)x", ttir)), default=0)


def _disassembled(cubin: bytes) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def loads_between_products(sass: str) -> int:
    """How many loads from shared memory into registers there are in the innermost loops around wgmma, in nvdisasm's
    text: what should go to the tensor cores from where it lies. ValueError where it shows no such loop.
    """
    lines = sass.splitlines()
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"\s*(\.L_x_\d+):", line))}
    jumps = ((i, re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", line)) for i, line in enumerate(lines))
    loops = [(labels[found[1]], i) for i, found in jumps if found and labels.get(found[1], i) < i]
    around = [(a, b) for a, b in loops if any(re.search(r"\b[HQI]GMMA", line) for line in lines[a:b])]
    if not around:
        raise ValueError("expected a loop around wgmma in the machine code, found none")
    inner = [(a, b) for a, b in around if not any((a, b) != (c, d) and a <= c and d <= b for c, d in around)]
    return sum(bool(re.search(r"\bLDSM?\b", line)) for a, b in inner for line in lines[a:b])


def _specialise(launch: gpu.Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Triton's signature, constants and attributes for a launch's arguments, by the rules of its just-in-time path."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        divisible = False
        if isinstance(value, Tensor):
            signature[name] = f"*{TRITON_TYPES[value.dtype]}"
            divisible = True
        elif hasattr(value, "block_shape"):
            block = ", ".join(map(str, value.block_shape))
            layout = f",{value.layout!r}" if hasattr(value, "layout") else ""  # Gluon's say where they lie.
            signature[name] = f"tensordesc<{TRITON_TYPES[value.base.dtype]}[{block}]{layout}>"
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
    if job.op in ("pool", "max_pool") and "max.NaN." not in compiled.ptx:
        found.append("pooling without max.NaN drops NaN")
    found += _tensor_core_breaches(compiled, job, launch)
    if job.op in ("fp8", "fp8_pool", "fp8_two_inputs", "fp8_chain"):
        products = r"wgmma\.mma_async\S*e4m3|tcgen05\.mma\S*f8f6f4"
        found += [] if re.search(products, compiled.ptx) else ["no product of 8 bits"]
        # Scale-d 0: the instruction, of 32 channels, starts a new sum.
        new_sums = len(re.findall(r"wgmma\.mma_async[^;]*e4m3 \{[^}]*\}, %\w+, %\w+, 0,", compiled.ptx))
        if new_sums * launch.arguments["BLOCK_K"] != compiled.wgmma * 32:
            found.append("sums of several steps in the tensor core's accumulator")
    if job.op.startswith("halo"):
        found += [f"no {each}" for each in ("setmaxnreg.inc", "setmaxnreg.dec") if each not in compiled.ptx]
        found += ["an operand read by ldmatrix"] if "ldmatrix" in compiled.ptx else []
        loads = compiled.loads_between_products
        found += [f"{loads} loads from shared memory between products"] if loads else []
    return found


def _tensor_core_breaches(compiled: Compiled, job: Job, launch: gpu.Launch) -> list[str]:
    used = {"mma": compiled.mma, "wgmma": compiled.wgmma, "tcgen05": compiled.tcgen05}
    rows = compiled.product_rows
    if not rows or job.math == "fp32":
        return [f"{name} in float32 arithmetic" for name, count in used.items() if count]
    wanted = "mma"
    if rows >= _WARPGROUP_ROWS and job.capability >= 90:
        wanted = "wgmma" if job.capability < 100 else "tcgen05"
    found = [] if used[wanted] else [f"no {wanted} instruction"]
    # The gradient of conv1x1's input goes through the activation where it is loaded.
    computes_operand = job.op == "conv1x1_grad" and launch.arguments["y_ptr"] is not None
    if compiled.wgmma_from_registers and not computes_operand and job.math in ("bf16", "fp16"):
        found.append(f"{compiled.wgmma_from_registers} wgmma with an operand from registers")
    return found


def compile_job(job: Job) -> Row:
    """Compile and check one job; an exception becomes a breach."""
    start = time.perf_counter()
    label = ""
    try:
        launch = launch_of(job)
        label = describe(launch)
        compiled = compile_launch(launch, job.capability)
        return Row(job, label, compiled, time.perf_counter() - start, find_breaches(compiled, job, launch))
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200] if str(error) else ''}"
        return Row(job, label, None, time.perf_counter() - start, [reason])


def _row_of(job: Job, compiler: Spawned) -> Row:
    try:
        return compiler.ask(job, _TIMEOUT)
    except (TimeoutError, ChildProcessError) as error:
        return Row(job, "", None, 0.0, [str(error)])


def run_jobs(jobs: Sequence[Job], processes: int) -> Iterator[Row]:
    """Compile the jobs in `processes` processes; rows come in the jobs' order."""
    local = threading.local()
    compilers: list[Spawned] = []

    def run(job: Job) -> Row:
        if not hasattr(local, "compiler"):
            local.compiler = Spawned(compile_job)
            compilers.append(local.compiler)
        return _row_of(job, local.compiler)

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
    name = f"{job.op:<20}{row.label:<26}{job.math:<6}sm_{job.capability:<5}"
    compiled = row.compiled
    if compiled is not None:
        cores = {"wgmma": compiled.wgmma, "tcgen05": compiled.tcgen05, "mma": compiled.mma}
        used = " ".join(f"{kind} {count}" for kind, count in cores.items() if count) or "-"
        name += f"{compiled.registers:>4}{compiled.spill_bytes:>7}{compiled.shared_memory:>8}  {used:<14}"
    return name + (f"  FAIL: {'; '.join(row.breaches)}" if row.breaches else "")


HEADER = f"{'op':<20}{'config':<26}{'math':<6}{'target':<8}{'regs':>4}{'spills':>7}{'shared':>8}  tensor cores"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--quick", action="store_true", help="one configuration of each kernel and target")
    parser.add_argument("--target", type=int, choices=TARGETS, nargs="*", default=TARGETS, help="compute capabilities")
    parser.add_argument("--op", choices=all_ops(), nargs="*", default=all_ops())
    parser.add_argument("--jobs", type=int, default=2, help="compiling processes")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Compile and print; return 0 if every compilation keeps the rules, else 1."""
    start = time.perf_counter()
    os.environ.pop("TRITON_INTERPRET", None)  # Interpreted kernels cannot be compiled.
    jobs = [job for job in all_jobs() if job.capability in options.target and job.op in options.op]
    jobs = one_of_each(jobs) if options.quick else jobs
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
