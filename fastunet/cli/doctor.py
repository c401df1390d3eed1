"""`fastunet doctor`: versions, devices, and which implementation each op gets, and why."""

from __future__ import annotations

import platform
from importlib import metadata

from rich.table import Table

from fastunet import __version__
from fastunet.checks import FastUNetError

from .shared import console

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


def doctor() -> None:
    """Print versions and devices, and which implementation each op gets on each device, and why."""
    import torch

    from fastunet import dispatch

    console.print(f"fastunet {__version__}, Python {platform.python_version()}, {platform.platform()}", soft_wrap=True)
    console.print(_package_table())
    console.print(_device_table())
    console.print(f"volumes, UNet(dims=3): {dispatch.VOLUMES}", soft_wrap=True)
    backend = dispatch.selected_backend()
    console.print(f"backend: {backend} (FASTUNET_BACKEND or fastunet.backend changes it)", soft_wrap=True)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        console.print(_op_table(device))
    if torch.cuda.is_available() and dispatch.triton_unsupported(torch.device("cuda"), torch.float32) is None:
        _print_known()


def _print_known() -> None:
    """Print what is known of our kernels on the GPU: which were measured, and which failed their check."""
    import torch

    from fastunet import dispatch
    from fastunet.kernels import autotune, gpu

    name = gpu.target(torch.device("cuda")).name
    rows = [*autotune.table(name).values()]
    speedups = [row["speedup"] for row in rows if "speedup" in row]
    faster = sum(speedup >= dispatch.LEAST_SPEEDUP for speedup in speedups)
    checked = sum("failed" in row and not row["shape"] for row in rows)
    console.print(f"kernels on {name}: {checked} families checked, {len(speedups)} layers measured, {faster} faster")
    for row in rows:
        if row.get("failed"):
            console.print(f"  {row['op']} {row['dtype']} is not used: {row['failed']}", soft_wrap=True)
    console.print(f"kept in {autotune.cache_file(name)} (FASTUNET_CACHE; FASTUNET_TUNE=force anew)", soft_wrap=True)


def _package_table() -> Table:
    """Return the versions of what training and kernels run on."""
    table = Table("package", "version", title="packages", title_justify="left")
    for name in PACKAGES:
        try:
            table.add_row(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            table.add_row(name, "not installed")
    return table


def _device_table() -> Table:
    """Return a row for the CPU and each GPU, or why there is none."""
    import torch

    from fastunet.train.config import multiplies_bf16

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


def _op_table(device: str) -> Table:
    """Return, by op, the implementation that a float32 tensor on the device gets, and why."""
    import torch

    from fastunet import dispatch, ops

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
