"""What a training step keeps of its activations for the backward, counted without running it.

    python -m benchmarks.saved_memory [--features 64 128 ...] [--size 512] [--dtype bfloat16] [--norm batch] [--out F]

prints, for every size of image inside the net, the bytes that an image of the batch takes until its backward: in plain
PyTorch, and in fastunet on ATen and on its Triton kernels. The nets run on tensors without data.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import fastunet
from fastunet.files import write_json
from fastunet.reference import ReferenceUNet

from .harness.environment import environment
from .roofline import DTYPES
from .tables import table

IMPLEMENTATIONS = ("eager", "aten", "triton")


@dataclass(frozen=True)
class Settings:
    """The net, UNet(3, 2, features=features, norm=norm), and its images."""

    features: tuple[int, ...] = (64, 128, 256, 512, 1024)
    size: int = 512
    dtype: str = "bfloat16"
    norm: str | None = "batch"


def kept_bytes(settings: Settings, implementation: str) -> dict[int, int]:
    """Bytes that one image takes from forward to backward, by the height of the tensors.

    What does not depend on the number of images, such as the statistics of a batch, is left out.
    """
    one, two = (_kept(settings, implementation, batch) for batch in (1, 2))
    return {height: two[height] - one[height] for height in sorted(two, reverse=True) if two[height] > one[height]}


def _kept(settings: Settings, implementation: str, batch: int) -> Counter[int]:
    dtype = DTYPES[settings.dtype]
    kind = ReferenceUNet if implementation == "eager" else fastunet.UNet
    with torch.device("meta"):
        model: nn.Module = kind(3, 2, features=settings.features, norm=settings.norm)
    model = model.to(dtype=dtype, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    x = torch.empty(batch, 3, settings.size, settings.size, dtype=dtype, device="meta")
    x = x.to(memory_format=torch.channels_last)
    held = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}  # One tensor of each storage, which stays alive so that no other takes its place.

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in held:
            found[t.untyped_storage()._cdata] = t
        return t

    with fastunet.backend("triton" if implementation == "triton" else "aten"), saved_tensors_hooks(keep, _as_is):
        y = model(x)
    assert y.requires_grad
    kept: Counter[int] = Counter()
    for t in found.values():
        kept[t.shape[2] if t.dim() == 4 else 0] += t.untyped_storage().nbytes()
    return kept


def _as_is(t: Tensor) -> Tensor:
    return t


def counted(settings: Settings) -> dict[str, Any]:
    """By implementation the bytes of each height; and in all, beside those of eager."""
    by_height = {name: kept_bytes(settings, name) for name in IMPLEMENTATIONS}
    totals = {name: sum(of.values()) for name, of in by_height.items()}
    return {
        "summary": {name: {"bytes": total, "of_eager": total / totals["eager"]} for name, total in totals.items()},
        "by_height": by_height,
    }


def report(result: dict[str, Any], settings: Settings) -> str:
    """The table, in MB of 10^6 bytes."""
    by_height, summary = result["by_height"], result["summary"]
    rows = [
        [
            f"{height}x{height}" if height else "statistics",
            *(f"{by_height[name].get(height, 0) / 1e6:.1f}" for name in IMPLEMENTATIONS),
        ]
        for height in by_height["eager"]
    ]
    rows.append(["total", *(f"{summary[name]['bytes'] / 1e6:.1f}" for name in IMPLEMENTATIONS)])
    rows.append(["of eager", *(f"{summary[name]['of_eager']:.2f}" for name in IMPLEMENTATIONS)])
    title = f"MB that an image of {settings.size}x{settings.size} keeps for its backward, {settings.dtype}"
    return title + "\n\n" + table(["images of", "eager", "fastunet, ATen", "fastunet, Triton"], rows)


def _environment() -> dict[str, Any]:
    return {name: value for name, value in environment("cpu").items() if name in ("commit", "dirty", "torch")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; with --out write it as JSON."""
    plain = Settings()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--features", type=int, nargs="+", default=plain.features)
    parser.add_argument("--size", type=int, default=plain.size, help="side of the images")
    parser.add_argument("--dtype", choices=DTYPES, default=plain.dtype)
    parser.add_argument("--norm", choices=("batch", "instance", "none"), default=plain.norm)
    parser.add_argument("--out", type=Path, help="write the counts as JSON")
    given = parser.parse_args(arguments)
    norm = None if given.norm == "none" else given.norm
    settings = Settings(tuple(given.features), given.size, given.dtype, norm)
    result = counted(settings)
    print(report(result, settings))
    if given.out is not None:
        write_json(given.out, result | {"settings": asdict(settings), "environment": _environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
