"""`fastunet doctor`: versions, devices, what runs where and why, what was measured, and what to do next."""

from __future__ import annotations

import platform
import textwrap
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

from fastunet import __version__
from fastunet.checks import FastUNetError

from .shared import console

if TYPE_CHECKING:
    import torch

WIDTH = 100
PACKAGES = ("torch", "triton", "numpy", "cupy-cuda12x", "cupy-cuda13x")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
# Ops of a kind, and of each a layer as a U-Net has it: its image [N, C, H, W], and its weight.
FAMILIES: dict[str, tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...] | None]] = {
    "3x3 conv": (
        ("conv3x3_batch_norm_relu", "conv3x3_bias_relu", "conv3x3_instance_norm_relu", "conv3x3_relu_conv1x1"),
        (1, 128, 128, 128),
        (128, 128, 3, 3),
    ),
    "upsampling": (
        ("conv_transpose2x2", "conv_transpose2x2_concat_conv3x3_relu"),
        (1, 256, 64, 64),
        (256, 128, 2, 2),
    ),
    "1x1 conv": (("conv1x1",), (1, 64, 256, 256), (2, 64, 1, 1)),
    "max-pool": (("max_pool2x2",), (1, 64, 256, 256), None),
    "losses": (("segmentation_sums",), (1, 2, 256, 256), None),
}


def doctor() -> None:
    """Print versions, devices, what runs each kind of layer and why, what was measured, and what to do next."""
    import torch

    from fastunet import dispatch

    gpu = gpu_with_kernels()
    backend = dispatch.selected_backend()
    forced = [] if backend == "auto" else [("backend", f"{backend} (FASTUNET_BACKEND; auto takes what is faster)")]
    print(_lines([("versions", ", ".join(_versions())), ("cpu", _cpu()), *_gpus(), *forced]))
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    print(f"\n{_table([(device, *row) for device in devices for row in rows_of(torch.device(device), gpu)])}\n")
    print(_lines([*([] if gpu is None else _measured(gpu)), ("next", advice(gpu))]))


def _width() -> int:
    return min(WIDTH, console.width) if console.is_terminal else WIDTH


def _lines(rows: Iterable[tuple[str, str]]) -> str:
    """Return names with their texts beside them; a path that is too long is not broken."""
    return "\n".join(
        textwrap.fill(
            f"{name:<9} {text}",
            _width(),
            subsequent_indent=" " * 10,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, text in rows
    )


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    columns = ("device", Column("layers", max_width=28), "run on", "why")
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for row in rows:
        table.add_row(*row)
    page = Console(width=_width(), color_system=None, markup=False, emoji=False, highlight=False)
    with page.capture() as caught:
        page.print(table)
    return "\n".join(line.rstrip() for line in caught.get().splitlines())


def _versions() -> Iterator[str]:
    yield f"fastunet {__version__}"
    yield f"Python {platform.python_version()}"
    yield f"{platform.system()} {platform.machine()}"
    for name in PACKAGES:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            if not name.startswith("cupy"):  # which only some that have a GPU want
                yield f"no {name}"


def _cpu() -> str:
    import torch

    from fastunet.train.config import is_faster_in_bf16

    threads = torch.get_num_threads()
    bf16 = "fast in bf16" if is_faster_in_bf16(cpu=True) else "fast in fp32 only"
    return f"{torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads > 1)}, {bf16}"


def _gpus() -> Iterator[tuple[str, str]]:
    """Yield a row for each GPU, or why there is none."""
    import torch

    if not torch.cuda.is_available():
        yield "cuda", "no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        kind = f"sm_{properties.major}{properties.minor}, {properties.multi_processor_count} SMs, {memory:.0f} GiB"
        yield f"cuda:{index}", f"{properties.name}: {kind}"


def gpu_with_kernels() -> str | None:
    """Return the name of the GPU if the Triton kernels can run here."""
    import torch

    from fastunet import dispatch

    if not torch.cuda.is_available() or dispatch.triton_unsupported(torch.device("cuda"), torch.float32) is not None:
        return None
    from fastunet.kernels import gpu

    return gpu.target(torch.device("cuda")).name


def rows_of(device: torch.device, gpu: str | None) -> list[tuple[str, str, str]]:
    """Return what runs on the device in float32: layers, implementation, reason; of the same reason in one row."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for family in FAMILIES:
        chosen = {task: _choice(family, device, gpu, task == "training") for task in ("inference", "training")}
        for task, choice in chosen.items():
            where = "" if len({*chosen.values()}) == 1 else f" in {task}"
            names = found.setdefault(choice, {}).setdefault(where, [])
            names.extend([] if family in names else [family])
    return [
        ("; ".join(", ".join(names) + where for where, names in sorted(each.items())), *choice)
        for choice, each in found.items()
    ]


def _choice(family: str, device: torch.device, gpu: str | None, training: bool) -> tuple[str, str]:
    """Return what runs the layers of a family, and why."""
    import torch

    from fastunet import dispatch

    (op, *_), size, weight_size = FAMILIES[family]
    x = torch.empty(size, device=device)
    weight = None if weight_size is None else torch.empty(weight_size, device=device)
    try:
        choice = dispatch.choose(op, x, weight, training=training)
    except FastUNetError as error:
        return "nothing", str(error).removeprefix(f"{op}: ")
    if gpu is None or (choice.unmeasured is None and choice.speedup is None):
        return choice.implementation, choice.reason
    # Each layer has a choice of its own there: of this one nothing may be known, of others much.
    rows = [row for row in _known(gpu) if row["op"] in FAMILIES[family][0] and "speedup" in row]
    speedups = [row["speedup"] for row in rows if row["shape"]["training"] == training]
    faster = [speedup for speedup in speedups if speedup >= dispatch.LEAST_SPEEDUP]
    if not speedups:
        when = "is when it first runs" if dispatch.tunes_at_first_use() else "would be, but for FASTUNET_TUNE=0"
        return "aten", f"none is measured yet: each {when}"
    if not faster:
        return "aten", f"Triton is faster in none of {len(speedups)} measured"
    spread = f"{min(faster):.2f} to {max(faster):.2f} times as fast"
    return "triton, aten", f"Triton is faster in {len(faster)} of {len(speedups)} measured, {spread}"


def _known(gpu: str) -> list[dict[str, Any]]:
    """Return the rows of the table of a GPU."""
    from fastunet.kernels import autotune

    return [*autotune.table(gpu).values()]


def _measured(gpu: str) -> Iterator[tuple[str, str]]:
    """Yield what was measured on a GPU, where it is kept, and which kernels are wrong there."""
    from fastunet import dispatch
    from fastunet.kernels import autotune

    rows = _known(gpu)
    speedups = [row["speedup"] for row in rows if "speedup" in row]
    faster = sum(speedup >= dispatch.LEAST_SPEEDUP for speedup in speedups)
    checked, failed = sum("failed" in row for row in rows), [row for row in rows if row.get("failed")]
    kernels = f"kernels checked: {checked}, failed: {len(failed)}"
    yield "measured", f"{len(speedups)} layers, Triton faster in {faster}; {kernels}"
    yield "kept in", f"{autotune.cache_file(gpu)} (FASTUNET_CACHE moves it, FASTUNET_TUNE=force measures again)"
    reasons: dict[str, list[str]] = {}
    for row in failed:
        reasons.setdefault(row["failed"], []).append(f"{row['op']} in {row['dtype']}")
    for reason, names in reasons.items():
        yield "not used", f"{', '.join(names)}: {reason}"


def advice(gpu: str | None) -> str:
    """Return the one thing to do next."""
    import torch

    if not torch.cuda.is_available() and NVIDIA_DRIVER.exists():
        return "there is an NVIDIA GPU that this torch cannot use: install a CUDA build of torch (https://pytorch.org)"
    if torch.cuda.is_available() and gpu is None:
        return "pip install triton: without it the GPU runs on cuDNN alone"
    if gpu is not None and not any("speedup" in row for row in _known(gpu)):
        return "fastunet tune: measures now which layers are faster on Triton, and keeps it for later runs"
    if Path("fastunet-demo").is_dir():
        return "fastunet check DATA, of a folder with images/ and masks/; then fastunet train DATA --out RUN"
    return "fastunet demo: trains on made-up micrographs for 90 seconds, and draws a report"
