"""`fastunet bench`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastunet.checks import check_choice
from fastunet.files import check_folder, check_replaceable, is_our_json, is_our_png, write_json
from fastunet.train.config import multiplies_bf16

from .errors import FAILED, fail
from .shared import DeviceOption, OverwriteOption, chosen_device, console, parse_features

if TYPE_CHECKING:
    import torch


def bench(
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("fastunet-bench"),
    device: DeviceOption = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Half a minute: smaller, without torch.compile.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Also what takes minutes or more to compile.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    size: Annotated[int | None, typer.Option(help="Side of the images [256; 512 on a GPU; 128 --quick].")] = None,
    batch: Annotated[int | None, typer.Option(help="Images at once [1; 16 on a GPU].")] = None,
    features: Annotated[str | None, typer.Option(help="Channels of each level [from 32; 64 on a GPU].")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Take so many samples of each, however long.")] = None,
    layers: Annotated[
        bool, typer.Option("--layers/--no-layers", help="The net's layers too, or the net alone.")
    ] = True,
    overwrite: OverwriteOption = False,
) -> None:
    """Compare the net and its layers with PyTorch's: eager, folded, compiled. Each is checked before it is timed."""
    if quick and everything:
        raise typer.BadParameter("expected --quick or --all, got both")
    from fastunet.benchmarks.charts import draw
    from fastunet.benchmarks.unet import check_settings, compare, default_settings, report, tables

    target = chosen_device(device)
    given: dict[str, Any] = {"size": size, "batch": batch}
    given["features"] = None if features is None else parse_features(features)
    given = {name: value for name, value in given.items() if value is not None}
    # A CPU's allocator takes a while to settle.
    given |= {} if rounds is None else {"rounds": rounds, "seconds": math.inf, "warmup": max(8, rounds // 3)}
    given |= {} if layers else {"layers": ()}
    settings = default_settings(target, _bench_dtype(dtype, target), quick=quick, thorough=everything, **given)
    check_settings(settings)
    check_folder(out)
    check_replaceable(out / "bench.json", overwrite, lambda path: is_our_json(path, ("settings", "rows")))
    check_replaceable(out / "bench.png", overwrite, is_our_png)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with console.status("starting") as status:
        for row in compare(settings, lambda doing: status.update(f"comparing {doing}")):
            rows.append(row)
            write_json(out / "bench.json", report(settings, rows))
    result = report(settings, rows)
    draw(result, out / "bench.png")
    for table in tables(result):
        console.print(table)
    console.print(f"every sample: {out / 'bench.json'}   picture: {out / 'bench.png'}", soft_wrap=True)
    if wrong := [row["name"] for row in rows if row["status"] != "ok"]:
        fail(f"fastunet itself failed in {', '.join(wrong)}: see 'not measured' above", FAILED)


def _bench_dtype(name: str, device: str) -> torch.dtype:
    import torch

    if check_choice("dtype", name, ("auto", "float32", "bfloat16", "float16")) == "auto":
        return torch.bfloat16 if multiplies_bf16(cpu=device == "cpu") else torch.float32
    return getattr(torch, name)
