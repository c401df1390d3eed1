"""Ahead-of-time compilation: a handful of kernels compile cleanly, and each rule of the gate can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from fastunet.benchmarks import static
from fastunet.benchmarks.__main__ import main
from fastunet.benchmarks.harness.worker import Spawned
from fastunet.benchmarks.jobs import TARGETS, Job, all_jobs, all_ops, launch_of, one_of_each
from fastunet.benchmarks.static import Compiled, find_breaches, loads_between_products
from fastunet.kernels import gpu
from fastunet.kernels.conv3x3.config import ConvShape

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"
)

CLEAN = Compiled(
    registers=128,
    spill_bytes=0,
    shared_memory=98304,
    mma=0,
    wgmma=4,
    wgmma_from_registers=0,
    tcgen05=0,
    warnings=(),
    ptx="max.NaN.f32 %f1;",
    product_rows=128,
)


def job(op: str = "pool", dtype: torch.dtype = torch.bfloat16, capability: int = 90, **options) -> Job:
    return Job(op, dtype, options.pop("allow_tf32", False), capability, ConvShape(64, 0, 64, 64, 64))


def breaches(compiled: Compiled, of: Job, **options) -> str:
    launch = gpu.Launch(None, 1, {}, 4, 3)
    return "; ".join(find_breaches(compiled, of, launch, **options))


def test_a_clean_compilation_passes() -> None:
    assert breaches(CLEAN, job()) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"spill_bytes": 8}, "spills 8 B"),
        ({"shared_memory": 232449}, "shared memory 232449 B, the limit is 232448 B"),
        ({"warnings": ("(C7510) wgmma serialized",)}, "C7510"),
        ({"ptx": "max.NaN.f32 %f1; max.f32 %f2, %f3, 0f00000000;"}, "plain max drops NaN"),
        ({"ptx": "max.ftz.f32 %f2; max.NaN.f32 %f1;"}, "plain max drops NaN"),
        ({"ptx": "setp.leu.f32 %p1;"}, "pooling without max.NaN"),
        ({"wgmma": 0, "mma": 16}, "no wgmma"),
        ({"wgmma_from_registers": 2}, "2 wgmma with an operand from registers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_rule_can_fail(change: dict, reason: str) -> None:
    assert reason in breaches(replace(CLEAN, **change), job())


@pytest.mark.parametrize(
    ("first", "found"), [("0", []), ("%p32", ["sums of several steps in the tensor core's accumulator"])]
)
def test_a_step_of_8_bits_starts_a_new_sum_on_sm_90(first: str, found: list[str]) -> None:
    instruction = "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {{%r1,\n%r2}}, %rd10, %rd11, {}, 1, 1;\n"
    ptx = instruction.format(first) + instruction.format("%p32")
    launch = gpu.Launch(None, 1, {"BLOCK_K": 64}, 4, 3)
    assert find_breaches(replace(CLEAN, wgmma=2, ptx=ptx), job("fp8"), launch) == found


@pytest.mark.parametrize(
    ("capability", "rows", "instruction"), [(80, 128, "mma"), (90, 32, "mma"), (90, 64, "wgmma"), (100, 128, "tcgen05")]
)
def test_tensor_cores_by_target_and_rows(capability: int, rows: int, instruction: str) -> None:
    launch = gpu.Launch(None, 1, {}, 4, 3)
    other = next(name for name in ("wgmma", "mma") if name != instruction)
    right, wrong = (
        replace(CLEAN, product_rows=rows, **{"mma": 0, "wgmma": 0, name: 4}) for name in (instruction, other)
    )
    of = job("weight_grad", capability=capability)
    assert find_breaches(right, of, launch, shared_memory=10**6) == []
    assert find_breaches(wrong, of, launch, shared_memory=10**6) == [f"no {instruction} instruction"]


def test_float32_without_tf32_must_not_be_rounded_by_tensor_cores() -> None:
    assert "wgmma in float32 arithmetic" in breaches(CLEAN, job(dtype=torch.float32))
    assert breaches(CLEAN, job(dtype=torch.float32, allow_tf32=True)) == ""


def test_every_target_and_op_is_among_the_jobs() -> None:
    jobs = all_jobs()
    assert {job.capability for job in jobs} == set(TARGETS)
    assert {job.op for job in jobs} == set(all_ops())
    assert {job.math for job in jobs} == {"bf16", "fp16", "fp32", "tf32"}
    assert len(set(jobs)) == len(jobs)
    assert len(set(all_ops())) == len(all_ops())


def test_quick_takes_each_kernel_once_for_each_target() -> None:
    jobs = [job for job in all_jobs() if job.capability in (80, 90)]
    kernels = {(launch_of(job).kernel, job.capability) for job in jobs}
    quick = one_of_each(jobs)
    assert {(launch_of(job).kernel, job.capability) for job in quick} == kernels
    assert len(quick) == len(kernels) < 80


def test_a_few_compile_cleanly_and_one_that_cannot_is_a_failed_row() -> None:
    jobs = [job("pool"), job("input_grad", torch.float32, 89), replace(job("forward"), capability=70), job("fp8")]
    rows = list(static.run_jobs(jobs, 1))
    assert "KeyError" in rows.pop(2).breaches[0]
    for row in rows:
        assert list(row.breaches) == [], static.format_row(row)
        assert row.compiled is not None
        assert row.compiled.registers > 16


def test_what_is_compiled_is_what_triton_would_specialise() -> None:
    # Triton's own binder, told that it has an sm_90 before it, against ours: in a process of its own.
    script = """
import torch, triton
from triton.backends.compiler import GPUTarget
from fastunet.benchmarks import jobs, static

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
for job in jobs.one_of_each(jobs.all_jobs()):
    if job.capability == 90:
        launch = jobs.launch_of(job)
        bind = launch.kernel.create_binder()[-1]
        _, theirs, _ = bind(**launch.arguments, **launch.options, debug=False)
        signature, constants, attributes = static._specialise(launch)
        for index, (name, (kind, extra)) in enumerate(zip(launch.kernel.arg_names, theirs, strict=True)):
            assert signature[name] == kind, (job, name, kind)
            ours = constants[name] if kind == "constexpr" else (index,) in attributes
            assert ours == (extra if kind == "constexpr" else extra is not None and "D" in extra), (job, name, extra)
print("compared")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "compared" in done.stdout, done.stderr


def test_a_dead_compiler_is_one_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Spawned(static.compile_job)
    monkeypatch.setattr(static, "_TIMEOUT", 0.0)
    try:
        assert "no result after 0 s" in static._row_of(job("activation_grad"), compiler).breaches[0]
        compiler._start()
        monkeypatch.setattr(static, "_TIMEOUT", 60.0)
        compiler._process.kill()
        compiler._process.join()
        assert "ended with exit code -9" in static._row_of(job("activation_grad"), compiler).breaches[0]
    finally:
        compiler.close()


@pytest.mark.parametrize("is_clean", [True, False])
def test_exit_code(is_clean: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = static.Row(job(), "16x8", CLEAN, 1.0, [] if is_clean else ["spills 8 B"])
    monkeypatch.setattr(static, "run_jobs", lambda jobs, processes: [row])
    monkeypatch.setattr(static, "all_jobs", list)
    assert main(["static"]) == (0 if is_clean else 1)
    assert ("FAIL: spills 8 B" in capsys.readouterr().out) == (not is_clean)


SASS = """
        /*0000*/                   LDS R2, [R1] ;
.L_x_1:
        /*0010*/                   LDS.128 R4, [R2] ;
.L_x_2:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;{}
        /*0040*/              @!P0 BRA `(.L_x_2) ;
        /*0050*/                   STS [R1], R24 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   LDS R2, [R1] ;
        /*0080*/               @P1 BRA `(.L_x_3) ;
"""


def test_loads_between_products_are_those_of_the_innermost_loop_around_them() -> None:
    assert loads_between_products(SASS.format("")) == 0
    spoilt = SASS.format("\n        /*0038*/                   LDSM.16.M88.4 R8, [R2] ;")
    assert loads_between_products(spoilt) == 1
    with pytest.raises(ValueError, match="a loop around wgmma"):
        loads_between_products(SASS.replace("GMMA", "FMA"))
