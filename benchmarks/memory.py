"""Bytes, counted without a GPU: what a training step keeps of its activations, and what inference moves.

`kept` prints, for every size of image inside the net, the bytes that an image of the batch takes until its backward: in
plain PyTorch, and in fastunet on ATen and on its Triton kernels. The nets run on tensors without data.

`moved` prints for every layer the bytes to and from memory of an eager net, in which every op is a pass of its own, and
of the kernels: each layer as one pass, and layers joined as on sm_90 and above (see cases.py). A launch moves each byte
of its tensors once, as long as L2 keeps a tile's halo while its neighbours run, and the weights throughout.

`volumes` prints the same of nnU-Net's 3d_fullres net, for which there are no kernels: eager; with statistics in each
convolution's epilogue, norm and activation as one pass, and nothing concatenated; and with norm and activation where
the next layer loads.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import fastunet
from fastunet.files import write_json
from fastunet.reference import ReferenceUNet

from .cases import (
    Layer,
    Pass,
    Settings,
    add_settings,
    eager_passes,
    fused_pass,
    joined_layers,
    nnunet_layers,
    settings_of,
    statistics_passes,
)
from .results import markdown
from .tables import report_of

IMPLEMENTATIONS = ("eager", "aten", "triton")
# nnU-Net's, of 3d_fullres.
VOLUMES = Settings(
    device="cpu",
    size=128,
    batch=1,
    features=(32, 64, 128, 256, 320, 320),
    in_channels=1,
    out_channels=2,
    norm="instance",
)


def moved(settings: Settings) -> dict[str, Any]:
    """Count the bytes of a batch in inference: "by_layer" of each net, and the "summary" of each net."""
    layers = settings.net_layers()
    joined = joined_layers(layers)
    return _moved(settings, eager=(layers, eager_passes), fused=(layers, _fused), joined=(joined, _fused))


def moved_in_volumes(settings: Settings) -> dict[str, Any]:
    """Count the bytes of a batch of patches in a forward pass, as `moved`; and "flops", of each layer."""
    channels = settings.in_channels, settings.out_channels, settings.features
    layers = nnunet_layers(*channels, settings.batch, settings.size)
    nets = {"eager": (layers, eager_passes), "statistics": (layers, statistics_passes), "on load": (layers, _fused)}
    return _moved(settings, **nets) | {"flops": {each.name: each.flops for each in layers}}


def _fused(layer: Layer, itemsize: int) -> list[Pass]:
    return [fused_pass(layer, itemsize)]


def _moved(settings: Settings, **nets: tuple[list[Layer], Callable[[Layer, int], list[Pass]]]) -> dict[str, Any]:
    itemsize = settings.torch_dtype.itemsize
    by_layer = {
        name: {each.name: sum(work.bytes for work in passes(each, itemsize)) for each in layers}
        for name, (layers, passes) in nets.items()
    }
    return _summarised("by_layer", by_layer)


def kept(settings: Settings) -> dict[str, Any]:
    """Count the bytes that one image takes from forward to backward: "by_height" of each implementation, and "summary".

    What does not depend on the number of images, such as the statistics of a batch, is left out.
    """
    by_height = {}
    for name in IMPLEMENTATIONS:
        one, two = (_kept(settings, name, batch) for batch in (1, 2))
        by_height[name] = {height: two[height] - one[height] for height in sorted(two, reverse=True)}
    return _summarised("by_height", by_height)


def _summarised(part: str, columns: dict[str, Any]) -> dict[str, Any]:
    totals = {name: sum(column.values()) for name, column in columns.items()}
    summary = {name: {"bytes": total, "of_eager": total / totals["eager"]} for name, total in totals.items()}
    return {"summary": summary, part: columns}


def _kept(settings: Settings, implementation: str, batch: int) -> Counter[int]:
    dtype = settings.torch_dtype
    kind = ReferenceUNet if implementation == "eager" else fastunet.UNet
    with torch.device("meta"):
        model: Any = kind(settings.in_channels, settings.out_channels, features=settings.features, norm=settings.norm)
        x = torch.empty(batch, settings.in_channels, settings.size, settings.size, dtype=dtype)
    model = model.to(dtype=dtype, memory_format=torch.channels_last).train()
    x = x.to(memory_format=torch.channels_last)
    held = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}  # One tensor of each storage, which stays alive so that no other takes its place.

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in held:
            found[t.untyped_storage()._cdata] = t
        return t

    with fastunet.backend("triton" if implementation == "triton" else "aten"), saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    assert y.requires_grad
    kept: Counter[int] = Counter()
    for t in found.values():
        kept[t.shape[2] if t.dim() == 4 else 0] += t.untyped_storage().nbytes()
    return kept


def table(found: dict[str, Any], part: str, unit: float) -> str:
    """Write a line for each key of the part "by_...", and the totals, in units of so many bytes."""
    columns = found[part]
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    lines = [[str(key), *(f"{of[key] / unit:.1f}" if key in of else "" for of in columns.values())] for key in keys]
    lines.append(["total", *(f"{found['summary'][name]['bytes'] / unit:.1f}" for name in columns)])
    lines.append(["of eager", *(f"{found['summary'][name]['of_eager']:.3f}" for name in columns)])
    return markdown([part.removeprefix("by_"), *columns], lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("kept", "moved", "volumes"))
    add_settings(parser, None, "features", "size", "dtype", "batch")
    parser.add_argument("--norm", choices=("batch", "instance", "none"), default="batch", help="of what is kept")
    parser.add_argument("--out", type=Path, metavar="JSON")


def run(options: argparse.Namespace) -> int:
    options.usual = VOLUMES if options.what == "volumes" else Settings("cpu")
    norm = "instance" if options.what == "volumes" else None if options.norm == "none" else options.norm
    settings = settings_of(options, norm=norm)
    found = {"kept": kept, "moved": moved, "volumes": moved_in_volumes}[options.what](settings)
    sides = "x".join([str(settings.size)] * (3 if options.what == "volumes" else 2))
    images = f"images of {sides}, {settings.dtype}"
    if options.what == "kept":
        print(f"MB that one of the {images}, keeps for its backward\n")
        print(table(found, "by_height", 1e6))
    else:
        print(f"MB that inference moves for one of {settings.batch} {images}\n")
        print(table(found, "by_layer", 1e6 * settings.batch))
    if options.out is not None:
        write_json(options.out, report_of(settings, []) | found)
    return 0
