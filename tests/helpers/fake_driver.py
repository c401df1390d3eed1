"""Triton's own launcher without a GPU, on a driver that takes its launches and runs nothing (fake_driver.c)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import triton
from fastunet.kernels import gpu
from triton.backends.nvidia.driver import CudaDriver

from fastunet import dispatch
from fastunet.checks import MissingPackageError

_LIBRARY = "libcuda.so.1"


def load(folder: Path) -> ctypes.CDLL:
    """The driver, compiled into the folder: whatever names CUDA's in this process from now on gets it.

    Raises MissingPackageError without a C compiler.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise MissingPackageError("no C compiler: expected gcc or cc on PATH, or its name in CC")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library, source = folder / _LIBRARY, Path(__file__).with_suffix(".c")
    command = [compiler, "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-Wl,-soname,{_LIBRARY}"]
    subprocess.run([*command, f"-I{include}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def activate(folder: Path, capability: int) -> ctypes.CDLL:
    """Have this process launch kernels on tensors of the CPU, as on a GPU of that capability, from now on.

    The driver, which counts what reaches it, and Triton's cache lie in the folder. No kernel runs: what one would
    compute is whatever lay there.
    """
    os.environ |= {"TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    library = load(folder)
    library.configure(capability, gpu.SHARED_MEMORY_LIMITS[capability])

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda device=0: divmod(capability, 10)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

    triton.runtime.driver.set_active(Driver())
    target = gpu.known_target(capability)
    gpu.target = lambda device: target
    # So that kernels are launched on tensors of the CPU.
    dispatch.interpreting = lambda: True  # type: ignore[assignment]
    return library
