"""`fastunet bench`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastunet.checks import check_choice
from fastunet.files import check_folder, check_replaceable, is_our_json, is_our_png, write_json
from fastunet.train.config import is_faster_in_bf16

from .errors import FAILED, fail
from .shared import DeviceOption, OverwriteOption, chosen_device, console, option, parse_features

if TYPE_CHECKING:
    import torch


def bench(
    out: Annotated[Path, option("output", "Folder for bench.json and bench.png.")] = Path("fastunet-bench"),
    device: DeviceOption = "auto",
    quick: Annotated[bool, option("duration", "Half a minute: smaller, without torch.compile.", "--quick")] = False,
    everything: Annotated[bool, option("duration", "Also what takes minutes or more to compile.", "--all")] = False,
    dtype: Annotated[
        str, option("model", "auto (bfloat16 where that is faster), float32, bfloat16 or float16.")
    ] = "auto",
    size: Annotated[
        int | None, option("model", "Side of the images in pixels [256; 512 on a GPU; 128 --quick].")
    ] = None,
    batch: Annotated[int | None, option("model", "Images at once [1; 16 on a GPU].")] = None,
    features: Annotated[
        str | None, option("model", "Channels of each level, as 32,64,128 [from 32; 64 on a GPU].")
    ] = None,
    rounds: Annotated[
        int | None,
        option("duration", "Samples to take of each, however long [as many as half a minute allows].", min=1),
    ] = None,
    layers: Annotated[
        bool, option("duration", "The net's layers too, or the net alone.", "--layers/--no-layers")
    ] = True,
    overwrite: OverwriteOption = False,
) -> None:
    """Compare the net and its layers with PyTorch's: eager, folded, compiled. Each is checked before it is timed."""
    if quick and everything:
        raise typer.BadParameter("expected --quick or --all, got both")
    from fastunet.benchmarks.charts import draw
    from fastunet.benchmarks.tables import report_of
    from fastunet.benchmarks.unet import check_settings, compare, default_settings, tables

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
            write_json(out / "bench.json", report_of(settings, rows))
    result = report_of(settings, rows)
    draw(result, out / "bench.png")
    for table in tables(result):
        console.print(table)
    console.print(f"every sample: {out / 'bench.json'}   picture: {out / 'bench.png'}", soft_wrap=True)
    if wrong := [row["name"] for row in rows if row["status"] != "ok"]:
        fail(f"fastunet itself failed in {', '.join(wrong)}: see 'not measured' above", FAILED)


def _bench_dtype(name: str, device: str) -> torch.dtype:
    import torch

    if check_choice("dtype", name, ("auto", "float32", "bfloat16", "float16")) == "auto":
        return torch.bfloat16 if is_faster_in_bf16(cpu=device == "cpu") else torch.float32
    return getattr(torch, name)
