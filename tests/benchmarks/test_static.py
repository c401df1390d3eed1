"""Ahead-of-time compilation: a handful of kernels compile cleanly, and each rule can be broken."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastunet.benchmarks import launches, reachable, static
from fastunet.benchmarks.__main__ import main
from fastunet.benchmarks.launches import Job, jobs, launch_of, one_of_each, record
from fastunet.benchmarks.static import Compiled, find_breaches, loads_between_products
from fastunet.kernels import gpu
from fastunet.kernels.conv3x3 import config

from fastunet.testing import parity

hopper = pytest.importorskip("fastunet.kernels.conv3x3.hopper", reason="needs triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"
)

WGMMA = "wgmma.mma_async.sync.aligned;"
CLEAN = Compiled(128, 0, 98304, (), f"max.NaN.f32 %f1; {WGMMA}", product_rows=128)


def launch(**arguments: Any) -> gpu.Launch:
    return gpu.Launch(SimpleNamespace(__name__="a_kernel"), 1, arguments, 4, 3)


def breaches(compiled: Compiled, math: str = "bfloat16") -> str:
    return "; ".join(find_breaches(compiled, launch(pooled_ptr="a tensor"), math, 90))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"shared_memory": 232449}, "shared memory 232449 B, the limit is 232448 B"),
        ({"warnings": ("(C7510) wgmma serialized",)}, "C7510"),
        ({"ptx": f"{CLEAN.ptx} max.f32 %f2, %f3, 0f00000000;"}, "plain max drops NaN"),
        ({"ptx": f"max.ftz.f32 %f2; {CLEAN.ptx}"}, "plain max drops NaN"),
        ({"ptx": "setp.leu.f32 %p1;"}, "pooling without max.NaN"),
        (
            {"ptx": f"{CLEAN.ptx} wgmma.mma_async.sync {{%r1}}, {{%r2}}, %rd1;"},
            "1 wgmma with an operand from registers",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_rule_can_fail(change: dict, reason: str) -> None:
    found = breaches(replace(CLEAN, **change))
    assert (reason in found, bool(found)) == (True, bool(reason))


@pytest.mark.parametrize(
    ("first", "found"), [("0", []), ("%p32", ["sums of several steps in the tensor core's accumulator"])]
)
def test_a_step_of_8_bits_starts_a_new_sum_on_sm_90(first: str, found: list[str]) -> None:
    instruction = "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {{%r1,\n%r2}}, %rd10, %rd11, {}, 1, 1;\n"
    ptx = instruction.format(first) + instruction.format("%p32")
    x = SimpleNamespace(base=torch.empty(0, dtype=torch.float8_e4m3fn))
    assert find_breaches(replace(CLEAN, ptx=ptx), launch(BLOCK_K=64, x_desc=x), "bfloat16", 90) == found


@pytest.mark.parametrize(
    ("capability", "rows", "instruction"), [(80, 128, "mma"), (90, 32, "mma"), (90, 64, "wgmma"), (100, 128, "tcgen05")]
)
def test_tensor_cores_by_target_and_rows(capability: int, rows: int, instruction: str) -> None:
    ptx = {"mma": "mma.sync.aligned;", "wgmma": WGMMA, "tcgen05": "tcgen05.mma.cta_group;"}
    for name, instructions in ptx.items():
        found = find_breaches(replace(CLEAN, product_rows=rows, ptx=instructions), launch(), "bfloat16", capability)
        assert found == ([] if name == instruction else [f"no {instruction} instruction"])


def test_float32_without_tf32_must_not_be_rounded_by_tensor_cores() -> None:
    assert "wgmma in float32 arithmetic" in breaches(CLEAN, "float32")
    assert breaches(CLEAN, "tf32") == ""


@pytest.fixture(scope="module")
def on_hopper() -> list[Job]:
    return list(jobs([90], ["bfloat16"]))


def test_quick_takes_each_kernel_once(on_hopper: list[Job]) -> None:
    quick = one_of_each(on_hopper)
    assert {job.kernel for job in quick} == {job.kernel for job in on_hopper}
    assert len(quick) == len({(job.kernel, job.stride, job.op == launches.E4M3) for job in on_hopper}) < 42
    assert {job.op for job in on_hopper} <= set(launches.OPS)
    assert len(set(on_hopper)) == len(on_hopper)
    job = quick[-1]
    assert launch_of(job).kernel.__name__ == job.kernel


@pytest.mark.parametrize(("math", "capability"), [("bfloat16", 90), ("float32", 80)])
def test_every_configuration_is_among_the_launches(math: str, capability: int) -> None:
    """Those that the choices can come to, whatever the op."""
    dtype, allow_tf32 = parity.FORMATS[math]
    target = gpu.known_target(capability)
    options = {"dtype": dtype, "target": target, "allow_tf32": allow_tf32}
    recorded = [each for call in launches.calls(math, capability) for each in record(call, math, capability)]

    def of(kernels: str) -> set[tuple[Any, ...]]:
        return {blocks(each.arguments.get, each) for each in recorded if each.kernel.__name__.startswith(kernels)}

    def blocks(argument: Callable[[str], Any], each: Any) -> tuple[Any, ...]:
        found = sorted((name, argument(name)) for name in NAMES if argument(name) is not None)
        return *found, each.num_warps, each.num_stages, each.max_registers

    def expected(found: Any) -> set[tuple[Any, ...]]:
        chosen = [each[0] if isinstance(each, tuple) else each for each in found]
        return {blocks(each.constants().get, each) for each in chosen}

    assert expected(reachable.convolutions(**options)) <= of("conv3x3_")
    assert expected(reachable.weight_grads(**options)) <= of("conv3x3_weight_grad")
    assert expected(reachable.pixel_products(**options)) <= of("conv_transpose2x2")
    assert expected(reachable.pixel_weight_grads(**options)) <= of("pixel_weight_grad")
    assert expected(reachable.heads(**options)) <= of("conv1x1")


NAMES = ("TILE_H", "TILE_W", "BLOCK_N", "BLOCK_K", "BLOCK_P", "BLOCK_IN", "BLOCK_OUT")


def test_a_few_compile_cleanly_and_one_that_cannot_is_a_failed_row(on_hopper: list[Job]) -> None:
    found = {job.kernel: job for job in on_hopper}
    names = ("conv3x3_descriptor", "norm_sums", "max_pool2x2", "conv3x3_hopper")
    chosen = [found[f"{name}_kernel"] for name in names if f"{name}_kernel" in found]  # the last: up to Triton 3.7
    rows = list(static.run_jobs([replace(chosen[0], capability=70), *chosen], 1))
    assert "KeyError" in rows.pop(0).breaches[0]
    for row in rows:
        assert list(row.breaches) == [], static.format_row(row)
        assert row.compiled is not None
        assert row.compiled.registers > 16


def test_one_process_may_compile_a_kernel_twice(on_hopper: list[Job]) -> None:
    job = next(job for job in on_hopper if job.kernel == "max_pool2x2_kernel")
    first, again = static.run_jobs([job, job], 1)
    assert first.compiled is not None
    assert first.compiled.registers > 8
    assert again == first


ABSENT = Job("no op", "no kernel", "bfloat16", 90, 0, 0)


def end(job: Job) -> None:
    """Stands for static.compile_job in the compiler's process."""
    raise SystemExit(3)


@pytest.mark.parametrize(("timeout", "reason"), [(0.0, "no result after 0 s"), (60.0, "ended with exit code 3")])
def test_a_dead_compiler_is_one_failed_row(timeout: float, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "_TIMEOUT", timeout)
    monkeypatch.setattr(static, "compile_job", end)
    (row,) = static.run_jobs([ABSENT], 1)
    assert reason in row.breaches[0]


@pytest.mark.parametrize(("version", "spilled"), [(None, 0), ("3.9", 256)])
def test_two_programs_may_cost_a_few_spills_where_triton_reads_ahead(
    version: str | None, spilled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "unknown_triton", lambda: version)
    two = replace(launch(), max_registers=config.TWO_PROGRAMS)
    few, many = (replace(CLEAN, spill_bytes=number) for number in (spilled, spilled + 8))
    assert find_breaches(few, two, "bfloat16", 90) == []
    assert find_breaches(many, two, "bfloat16", 90) == [f"spills {spilled + 8} B"]
    assert find_breaches(replace(CLEAN, spill_bytes=8), launch(), "bfloat16", 90) == ["spills 8 B"]


@pytest.mark.parametrize(("version", "breaches"), [(None, []), (None, ["spills 8 B"]), ("3.9", [])])
def test_the_command(
    version: str | None, breaches: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fails if a rule is broken, and leaves out the halo variant of a Triton that it is not written for."""
    found: list[Job] = []
    halo = replace(ABSENT, kernel=hopper.conv3x3_hopper_kernel.__name__)
    monkeypatch.setattr(gpu, "unknown_triton", lambda: version)
    row = static.Row(ABSENT, "16x8", CLEAN, breaches)
    monkeypatch.setattr(static, "run_jobs", lambda chosen, processes: found.extend(chosen) or [row])
    monkeypatch.setattr(static, "jobs", lambda *_: [ABSENT, halo])
    assert main(["static"]) == len(breaches)
    assert found == ([ABSENT, halo] if version is None else [ABSENT])
    shown = capsys.readouterr().out
    assert ("left out: the halo variant" in shown) == (version is not None)
    assert ("FAIL: spills 8 B" in shown) == bool(breaches)


SASS = """
        /*0000*/                   LDS R2, [R1] ;
.L_x_1:
        /*0010*/                   LDS.128 R4, [R2] ;
.L_x_2:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0028*/              @!P0 BRA `(.L_x_5) ;
.L_x_4:
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;{}
        /*0040*/              @!P0 BRA `(.L_x_2) ;
        /*0050*/                   STS [R1], R24 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   LDS R2, [R1] ;
        /*0080*/               @P1 BRA `(.L_x_3) ;
.L_x_5:
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*00a0*/               @P1 BRA `(.L_x_4) ;
"""


def test_loads_between_products_are_those_of_the_innermost_loop_around_them() -> None:
    assert loads_between_products(SASS.format("")) == 0
    altered = SASS.format("\n        /*0038*/                   LDSM.16.M88.4 R8, [R2] ;")
    assert loads_between_products(altered) == 1
    with pytest.raises(ValueError, match="a loop around wgmma"):
        loads_between_products(SASS.replace("GMMA", "FMA"))
