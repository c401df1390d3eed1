"""Compile every kernel in every configuration that can be chosen, for every target, and look at the result.

No GPU is needed. Prints a row for each and ends with exit code 1 if any row breaks a rule:

- no spills, by ptxas's report; with Triton 3.8 and above at most 256 bytes where registers are limited for a second
  program on a multiprocessor
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

What is compiled is what the ops launch there (see launches.py), by Triton's own just-in-time path.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import torch
from fastunet.kernels import gpu
from fastunet.kernels.conv3x3.config import TWO_PROGRAMS

from fastunet.testing import parity

from .harness.worker import Spawned
from .launches import OPS, TARGETS, Job, describe, jobs, launch_of, one_of_each

# A product with fewer rows than this has no wgmma and no tcgen05 instruction.
_WARPGROUP_ROWS = 64

# Triton 3.8 and above read a part of the next step's operands ahead, into registers: where two programs share these, a
# few values are spilled, in favour of the second program. Unmeasured.
_SPILLS_OF_TWO_PROGRAMS = 256

# Seconds one compilation may take: a few hundred times the usual, because machines stall.
_TIMEOUT = 300.0


@dataclass(frozen=True)
class Compiled:
    """What a compilation gave: registers, spills and warnings as ptxas reports them, and the PTX.

    product_rows: of the matrix products' results, which decide the tensor-core instruction; 0 where there are none.
    loads_between_products: in the machine code, of the halo variant.
    """

    registers: int
    spill_bytes: int
    shared_memory: int
    warnings: tuple[str, ...]
    ptx: str
    product_rows: int
    loads_between_products: int = 0

    @property
    def products(self) -> dict[str, int]:
        """How many instructions there are, of each kind of tensor core."""
        names = {"wgmma": "wgmma.mma_async.", "tcgen05": "tcgen05.mma.", "mma": "mma.sync."}
        return {kind: count for kind, name in names.items() if (count := self.ptx.count(name))}

    @property
    def register_operands(self) -> int:
        """How many wgmma have an operand from registers: braces after those of the result."""
        return len(re.findall(r"wgmma\.mma_async[^;]*\}\s*,\s*\{", self.ptx))


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    job: Job
    label: str
    compiled: Compiled | None
    breaches: Sequence[str]


def _driver(capability: int) -> Any:
    """What Triton asks of a driver before it compiles: the current device, which has the capability for its number."""
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    return SimpleNamespace(
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )


def compile_launch(launch: gpu.Launch, capability: int) -> Compiled:
    """Compile a launch for a capability. Triton's and ptxas's errors pass through."""
    import triton

    triton.knobs.compilation.always_compile = True  # The cache would give back the code without ptxas's report.
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.runtime.driver.set_active(_driver(capability))
    launch.kernel.device_caches.clear()  # Nor is this process's own to give it back.
    arguments = [launch.arguments[name] for name in launch.kernel.arg_names]
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        built = launch.kernel.warmup(*arguments, grid=(launch.grid,), **launch.options)
    report, is_halo = log.getvalue(), _is_halo(launch)
    # Gluon has no such text, and no other form than warpgroups'.
    rows = [_WARPGROUP_ROWS] if is_halo else map(int, re.findall(r"tt\.dot\b.* -> tensor<(\d+)x", built.asm["ttir"]))
    return Compiled(
        registers=int(re.findall(r"Used (\d+) registers", report)[-1]),
        spill_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)),
        shared_memory=built.metadata.shared,
        warnings=tuple(re.findall(r"\(C75\d\d\).*", report)),
        ptx=built.asm["ptx"],
        product_rows=min(rows, default=0),
        loads_between_products=loads_between_products(_disassembled(built.asm["cubin"])) if is_halo else 0,
    )


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
    # Neither loops around others, nor jumps back into one from code that ptxas has moved past it.
    inner = [(a, b) for a, b in around if not any(a < d < b for _, d in around)]
    return sum(bool(re.search(r"\bLDSM?\b", line)) for a, b in inner for line in lines[a:b])


def _is_halo(launch: gpu.Launch) -> bool:
    return "SLOTS" in launch.arguments


def _multiplies_e4m3(launch: gpu.Launch) -> bool:
    x = launch.arguments.get("x_desc")  # None of an input gradient without a mask.
    return x is not None and x.base.dtype == torch.float8_e4m3fn


def find_breaches(compiled: Compiled, launch: gpu.Launch, math: str, capability: int) -> list[str]:
    """The rules a compilation breaks, in words. math: the products' number format, one of `parity.FORMATS`."""
    limit = gpu.SHARED_MEMORY_LIMITS[capability]
    found = list(compiled.warnings)
    reads_ahead = launch.max_registers == TWO_PROGRAMS and gpu.unknown_triton() is not None
    if compiled.spill_bytes > (_SPILLS_OF_TWO_PROGRAMS if reads_ahead else 0):
        found.append(f"spills {compiled.spill_bytes} B")
    if compiled.shared_memory > limit:
        found.append(f"shared memory {compiled.shared_memory} B, the limit is {limit} B")
    if re.search(r"\bmax(\.ftz)?\.(f32|f16|bf16)\b", compiled.ptx):
        found.append("a plain max drops NaN")
    pools = launch.kernel.__name__ == "max_pool2x2_kernel"
    named = any(launch.arguments.get(name) is not None for name in ("pooled_ptr", "pooled_desc"))
    pools |= launch.arguments.get("POOL", named)
    if pools and "max.NaN." not in compiled.ptx:
        found.append("pooling without max.NaN drops NaN")
    found += _tensor_core_breaches(compiled, launch, math, capability)
    if _multiplies_e4m3(launch):
        products = r"wgmma\.mma_async\S*e4m3|tcgen05\.mma\S*f8f6f4"
        found += [] if re.search(products, compiled.ptx) else ["no product of 8 bits"]
        # Scale-d 0: the instruction, of 32 channels, starts a new sum.
        new_sums = len(re.findall(r"wgmma\.mma_async[^;]*e4m3 \{[^}]*\}, %\w+, %\w+, 0,", compiled.ptx))
        if new_sums * launch.arguments["BLOCK_K"] != compiled.products.get("wgmma", 0) * 32:
            found.append("sums of several steps in the tensor core's accumulator")
    if _is_halo(launch):
        found += [f"no {each}" for each in ("setmaxnreg.inc", "setmaxnreg.dec") if each not in compiled.ptx]
        has_mask = launch.arguments.get("MASK", False)  # Which the epilogue reads.
        found += ["an operand read by ldmatrix"] if "ldmatrix" in compiled.ptx and not has_mask else []
        loads = compiled.loads_between_products
        found += [f"{loads} loads from shared memory between products"] if loads else []
    return found


def _tensor_core_breaches(compiled: Compiled, launch: gpu.Launch, math: str, capability: int) -> list[str]:
    used, rows = compiled.products, compiled.product_rows
    if not rows or math == "float32":
        return [f"{name} in float32 arithmetic" for name in used]
    wanted = "mma"
    if rows >= _WARPGROUP_ROWS and capability >= 90:
        wanted = "wgmma" if capability < 100 else "tcgen05"
    found = [] if wanted in used else [f"no {wanted} instruction"]
    # The gradient of conv1x1's input goes through the activation where it is loaded.
    name = launch.kernel.__name__
    computes_operand = name == "conv1x1_input_grad_kernel" and launch.arguments["y_ptr"] is not None
    if compiled.register_operands and not computes_operand and math in ("bfloat16", "float16"):
        found.append(f"{compiled.register_operands} wgmma with an operand from registers")
    return found


def compile_job(job: Job) -> Row:
    """Compile and check one job; an exception becomes a breach."""
    label = ""
    try:
        launch = launch_of(job)
        label = describe(launch)
        compiled = compile_launch(launch, job.capability)
        return Row(job, label, compiled, find_breaches(compiled, launch, job.math, job.capability))
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200] if str(error) else ''}"
        return Row(job, label, None, [reason])


def run_jobs(chosen: Sequence[Job], processes: int) -> Iterator[Row]:
    """Compile the jobs in `processes` processes; rows come in the jobs' order."""
    idle: SimpleQueue[Spawned] = SimpleQueue()

    def run(job: Job) -> Row:
        compiler = idle.get()
        try:
            return compiler.ask(job, _TIMEOUT)
        except (TimeoutError, ChildProcessError) as error:
            return Row(job, "", None, [str(error)])
        finally:
            idle.put(compiler)

    with contextlib.ExitStack() as stack:
        os.environ["TRITON_CACHE_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
        for _ in range(processes):
            idle.put(stack.enter_context(Spawned(compile_job)))
        yield from stack.enter_context(ThreadPoolExecutor(processes)).map(run, chosen)


_LINE = "{:<34}{:<40}{:<26}{:<9}{:<8}{:>4}{:>7}{:>8}  {:<14}"
HEADER = _LINE.format("kernel", "of", "config", "math", "target", "regs", "spills", "shared", "tensor cores")


def format_row(row: Row) -> str:
    """One line of the table, breaches last."""
    job, compiled = row.job, row.compiled
    figures = ["", "", "", ""]
    if compiled is not None:
        used = " ".join(f"{kind} {count}" for kind, count in compiled.products.items()) or "-"
        figures = [str(compiled.registers), str(compiled.spill_bytes), str(compiled.shared_memory), used]
    kernel, target = job.kernel.removesuffix("_kernel"), f"sm_{job.capability}"
    line = _LINE.format(kernel, job.op, row.label, job.math, target, *figures)
    return line + (f"  FAIL: {'; '.join(row.breaches)}" if row.breaches else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one configuration of each kernel and target")
    parser.add_argument("--target", type=int, choices=TARGETS, nargs="*", default=TARGETS, help="compute capabilities")
    parser.add_argument(
        "--op", choices=OPS, nargs="*", default=OPS, help="whose kernels, but those met with one before"
    )
    parser.add_argument("--jobs", type=int, default=2, help="compiling processes")


def run(options: argparse.Namespace) -> int:
    """Compile and print; return 0 if every compilation keeps the rules, else 1."""
    start = time.perf_counter()
    os.environ.pop("TRITON_INTERPRET", None)  # Interpreted kernels cannot be compiled.
    import triton

    # fp16 and float32 have no kernel that bf16 has not.
    chosen = list(jobs(options.target, ["bfloat16"] if options.quick else parity.FORMATS, options.op))
    chosen = one_of_each(chosen) if options.quick else chosen
    if gpu.unknown_triton() is not None:
        chosen = [job for job in chosen if job.kernel != "conv3x3_hopper_kernel"]
        print(f"left out: the halo variant, which is written for Triton {' and '.join(gpu.TRITON_VERSIONS)}")
    print(f"Triton {triton.__version__}\n{HEADER}")
    rows: list[Row] = []
    for row in run_jobs(chosen, options.jobs):
        print(format_row(row), flush=True)
        rows.append(row)
    failed = sum(bool(row.breaches) for row in rows)
    registers = max((row.compiled.registers for row in rows if row.compiled), default=0)
    print(
        f"{len(rows)} compiled in {time.perf_counter() - start:.0f} s, at most {registers} registers, {failed} failed"
    )
    return 1 if failed or not rows else 0
