"""What `fastunet doctor` shows: versions, devices, and which implementation each op gets, and why."""

from __future__ import annotations

import platform
from importlib import metadata

import torch
from rich.table import Table

from . import dispatch, ops
from .checks import FastUNetError
from .train_config import multiplies_bf16

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "accelerate",
    "kornia",
    "safetensors",
    "monai",
    "cupy-cuda12x",
    "cupy-cuda13x",
)


def package_table() -> Table:
    """The versions of what training and kernels run on."""
    table = Table("package", "version", title="packages", title_justify="left")
    for name in PACKAGES:
        table.add_row(name, _version(name))
    return table


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def device_table() -> Table:
    """The CPU and each GPU, or why there is none."""
    table = Table("device", "what", title="devices", title_justify="left")
    capability = torch.backends.cpu.get_cpu_capability()
    bf16 = "multiplies bf16" if multiplies_bf16(cpu=True) else "no native bf16"
    table.add_row("cpu", f"{platform.machine()} {capability}, {torch.get_num_threads()} threads, {bf16}")
    if not torch.cuda.is_available():
        table.add_row("cuda", "no CUDA device" if torch.version.cuda else "this torch is built without CUDA")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        kind = f"sm_{properties.major}{properties.minor}, {properties.multi_processor_count} SMs, {memory:.0f} GiB"
        table.add_row(f"cuda:{index}", f"{properties.name}: {kind}")
    return table


def op_table(device: str) -> Table:
    """By op: the implementation that a float32 tensor on the device gets, and why."""
    table = Table("op", "runs on", "why", title=f"ops on {device}, float32", title_justify="left")
    for op in ops.__all__:
        # Pool and concat forms share the plain form's kernels and its choice.
        base = op.removeprefix("concat_").removesuffix("_pool")
        try:
            choice = dispatch.choose(base, torch.empty(0, device=device))
            table.add_row(op, choice.implementation, choice.reason)
        except FastUNetError as error:
            table.add_row(op, "error", str(error))
    return table
