"""Copies of the kernels package with one mutation in them: a test suite worth its name catches each."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fastunet.kernels import gpu

# A file of the kernels package ("conv3x3.grad"), a fragment of it, and its mutation.
Fault = tuple[str, str, str]
Check = Callable[[ModuleType], None]

_MODULES = (
    *("conv1x1", "conv_transpose2x2", "conv_transpose2x2_concat_conv3x3", "max_pool2x2"),
    *("norm", "norm_grad", "pixel_weight_grad", "segmentation_loss", "autotune"),
    *("conv3x3.grad", "conv3x3.pointer", "conv3x3.split_k"),
)


def load(package: str = "fastunet.kernels") -> ModuleType:
    """Return a kernels package with its launchers' modules imported."""
    for name in _MODULES:
        importlib.import_module(f"{package}.{name}")
    return sys.modules[package]


@contextmanager
def kernels_with(fault: Fault, folder: Path) -> Iterator[str]:
    """The name of an importable copy of the kernels package with a fault injected."""
    module, fragment, mutation = fault
    package = f"kernels_with_{folder.name}"
    shutil.copytree(Path(gpu.__file__).parent, folder / package)
    for file in (folder / package).rglob("*.py"):
        text = file.read_text()
        if file == (folder / package / module.replace(".", "/")).with_suffix(".py"):
            assert fragment in text, f"{file} no longer holds {fragment!r}"
            text = text.replace(fragment, mutation)
        file.write_text(text.replace("fastunet.kernels", package))
    sys.path.insert(0, str(folder))
    try:
        yield package
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.startswith(package)]:
            del sys.modules[name]


def check_tests(faults: Mapping[Check, Sequence[Fault]]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return two tests: each check passes on the kernels as they are, and fails on a copy with each of its faults.

    What a check catches changes only with the check or the kernel: all faults but each check's first are slow tests.
    """

    @pytest.mark.parametrize("check", faults, ids=lambda check: check.__name__)
    def test_check(check: Check) -> None:
        check(load())

    cases = [
        pytest.param(check, fault, id=f"{fault[0]}: {fault[2]}", marks=[pytest.mark.slow] if i else [])
        for check, each in faults.items()
        for i, fault in enumerate(each)
    ]

    @pytest.mark.parametrize(("check", "fault"), cases)
    def test_injected_fault_is_caught(check: Check, fault: Fault, tmp_path: Path) -> None:
        with kernels_with(fault, tmp_path) as package, pytest.raises(AssertionError):
            check(load(package))

    return test_check, test_injected_fault_is_caught
