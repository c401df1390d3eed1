"""The floors of the package: who may import whom, and what importing fastunet must not need."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each module or package may import from floors below its own.
FLOORS = {
    "reference": 0,
    "kernels": 0,
    "torch_private": 0,
    "checks": 1,
    "files": 2,
    "dispatch": 2,
    "cpu": 3,
    "measuring": 3,
    "ops": 4,
    "testing": 5,
    "pretrained": 5,
    "losses": 5,
    "metrics": 5,
    "modules": 5,
    "unet": 6,
    "compiler": 6,
    "data": 6,
    "inference": 7,
    "explanation": 8,
    "tuning": 9,
    "train": 10,
    "augmentation": 11,
    "training": 11,
    "segmenter": 11,
    "cli": 12,
    "__main__": 13,
}


def sources() -> list[Path]:
    return sorted(p for folder in ("fastunet", "kernels", "benchmarks", "tests") for p in (ROOT / folder).rglob("*.py"))


@cache
def imported_modules(path: Path) -> set[str]:
    """Absolute names of all modules a file imports, wherever in the file."""
    package = list(path.relative_to(ROOT).parent.parts)
    if package[0] in ("kernels", "benchmarks"):
        package = ["fastunet", *package]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def unit_of(module: str) -> str | None:
    """The part of fastunet a module name belongs to: "ops" of "fastunet.ops.conv1x1"."""
    parts = module.split(".")
    return parts[1] if parts[0] == "fastunet" and len(parts) > 1 and parts[1] in FLOORS else None


def test_every_file_has_a_floor() -> None:
    units = {p.relative_to(ROOT / "fastunet").parts[0].removesuffix(".py") for p in (ROOT / "fastunet").rglob("*.py")}
    assert units - {"__init__"} == set(FLOORS) - {"kernels"}


def test_no_import_goes_up() -> None:
    wrong = [f"{path.relative_to(ROOT)}: {reason}" for path in sources() for reason in violations(path)]
    assert not wrong, "\n".join(wrong)


def violations(path: Path) -> list[str]:
    names = imported_modules(path)
    packages = {name.partition(".")[0] for name in names}
    folder, *rest = path.relative_to(ROOT).parts
    found = ["imports kernels, not fastunet.kernels"] if "kernels" in packages else []
    if folder in ("tests", "benchmarks"):
        return found
    if folder == "fastunet" and "triton" in packages:
        found.append("imports triton, which only kernels may")
    unit = "kernels" if folder == "kernels" else rest[0].removesuffix(".py")
    if unit == "__init__":  # re-exports, lazily
        return found
    used = {u for u in map(unit_of, names) if u is not None and u != unit}
    above = sorted(u for u in used if FLOORS[u] >= FLOORS[unit])
    return [*found, f"{unit} (floor {FLOORS[unit]}) imports {above}"] if above else found


def test_product_code_does_not_import_the_benchmarks_but_for_the_command_bench() -> None:
    users = {
        path.relative_to(ROOT).parts[1].removesuffix(".py")
        for path in sources()
        if path.relative_to(ROOT).parts[0] in ("fastunet", "kernels")
        and any(name.startswith("fastunet.benchmarks") for name in imported_modules(path))
    }
    assert users == {"cli"}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


BLOCK_TRITON = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("triton is blocked", name=name)
sys.meta_path.insert(0, Block())
"""


def test_what_an_import_needs() -> None:
    """No CUDA, no triton but for kernels; torch, safetensors, kornia, MONAI and benchmarks where they are used."""
    pytest.importorskip("kornia", reason="needs the extra train")
    result = run_python(
        BLOCK_TRITON
        + """
import importlib
def check(names):
    loaded = {name.partition(".")[0] for name in sys.modules} | {n for n in sys.modules if n.startswith("fastunet.b")}
    assert not loaded & set(names.split()), loaded & set(names.split())
import fastunet
check("torch")
import torch
def forbidden(*args, **kwargs):
    raise AssertionError("CUDA was initialised")
torch.cuda._lazy_init = forbidden
fastunet.UNet
check("safetensors kornia monai")
for name in ("train.checkpoint", "train.report", "data", "inference.predict", "metrics", "losses", "cli"):
    importlib.import_module("fastunet." + name)
check("kornia monai fastunet.benchmarks")
for name in fastunet.__all__:
    getattr(fastunet, name)
from fastunet.explanation import Explanation
assert callable(fastunet.explain) and callable(fastunet.predict) and set(fastunet.__all__) <= set(dir(fastunet))
try:
    fastunet.nothing
except AttributeError as error:
    assert "no attribute 'nothing'" in str(error)
for name in ("training", "data.synthetic", "testing", "ops", "kernels.conv3x3.config"):
    importlib.import_module("fastunet." + name)
fastunet.UNet(1, 1, features=(2, 4))(torch.zeros(2, 1, 4, 4)).square().mean().backward()
assert not torch.cuda.is_initialized()
check("triton")
print("fine")
"""
    )
    assert result.stdout.strip().endswith("fine"), result.stderr


def test_without_triton_a_gpu_runs_on_aten() -> None:
    """As on Windows, and in builds of torch for CUDA without it; nothing is checked or measured there."""
    result = run_python(
        BLOCK_TRITON
        + """
import torch, fastunet
from fastunet import dispatch
from torch._subclasses.fake_tensor import FakeTensorMode
torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 0
with FakeTensorMode():  # Tensors of a GPU that is not here.
    image, x, weight = (torch.empty(*size, device="cuda") for size in ((2, 3, 32, 32), (2, 64, 8, 8), (64, 64, 3, 3)))
choices = [dispatch.choose(op, x, weight, training=each) for op in dispatch.TRITON_OPS for each in (False, True)]
assert {(choice.implementation, choice.reason) for choice in choices} == {("aten", "triton is not installed")}, choices
model = fastunet.UNet(3, 2, features=(4, 8))
for told in (fastunet.explain(model, image), fastunet.tune(model, image)):
    assert {row.implementation for row in told.rows} == {"aten"}, told
in_8_bits = fastunet.quantize(fastunet.UNet(3, 2, features=(32, 64)).eval(), torch.rand(1, 3, 32, 32))
told = fastunet.explain(in_8_bits.bfloat16(), image.bfloat16())
assert {row.implementation for row in told.rows} == {"aten"}, told
try:
    with fastunet.backend("triton"):
        dispatch.choose("conv1x1", x, weight)
except fastunet.FastUNetError as error:
    print(error)
"""
    )
    assert result.stdout == "conv1x1: backend 'triton' was asked for, but triton is not installed\n", result.stderr


def test_help_and_wrong_arguments_do_not_wait_for_torch() -> None:
    pytest.importorskip("typer", reason="needs the extra train")
    result = run_python(
        """
import contextlib, io, sys
from fastunet.__main__ import main
commands = ("check", "train", "predict", "evaluate", "tune", "bench", "doctor", "demo")
good = [["--version"], ["--help"], *([command, "--help"] for command in commands)]
wrong = [["nothing"], ["train"], ["predict", "--tile", "0"], ["tune", "--size", "0"], ["bench", "--quick", "--all"]]
wrong += [["train", "--out", "x", *option] for option in (["--steps", "many"], ["--features", "4;8"])]
for code, arguments in [*((0, each) for each in good), *((2, each) for each in wrong)]:
    sys.argv = ["fastunet", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as end:
            assert end.code == code, (arguments, end.code)
    assert (out if code == 0 else err).getvalue(), arguments
    slow = {"torch", "numpy", "matplotlib", "triton", "accelerate", "kornia", "monai", "scipy", "skimage", "PIL"}
    loaded = slow & set(sys.modules)
    assert not loaded, (arguments, loaded)
print("fine")
"""
    )
    assert result.stdout == "fine\n", result.stderr
