"""`fastunet evaluate`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastunet.checks import ConfigError
from fastunet.files import check_folder, check_replaceable, is_our_json, write_json
from fastunet.train.config import TILE

from .shared import (
    DATA,
    DeviceOption,
    OverwriteOption,
    RunArgument,
    TileOption,
    TtaOption,
    console,
    load,
    option,
    pop_reading,
    print_scores,
    track,
    with_reading,
)

SCORES = ("dice", "iou", "images", "tta")  # what the file of `evaluate` holds, among other things


@with_reading
def evaluate(
    context: typer.Context,
    run: RunArgument,
    data: Annotated[Path, DATA],
    out: Annotated[Path | None, option("output", "JSON file for the scores, of each image too.")] = None,
    tolerance: Annotated[float, option("scores", "Tolerance of the surface Dice, in pixels.", min=0)] = 2.0,
    parts: Annotated[
        Literal["none", "foreground", "background"],
        option("scores", "Also score how well connected parts are separated: adapted Rand error and V-Rand."),
    ] = "none",
    tta: TtaOption = False,
    tile: TileOption = TILE,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    **options: Any,
) -> None:
    """Score RUN on DATA: Dice and IoU over all pixels; Dice, HD95 and surface Dice over images, with intervals."""
    from fastunet.data import IGNORED, SegmentationDataset, find_pairs, inspect
    from fastunet.data.pairing import check_outside
    from fastunet.inference.evaluation import evaluate as scores_of
    from fastunet.inference.evaluation import summary_of
    from fastunet.train.checkpoint import load_config

    if not math.isfinite(tolerance):
        raise ConfigError(f"tolerance: expected a finite number, got {tolerance}")
    config = load_config(run)
    reading = pop_reading(context, options, config.reading)
    pairs = find_pairs(data, reading, config.data.names)
    if out is not None:
        check_folder(out.parent)
        check_outside(out.parent, data, reading, pairs)
        check_replaceable(out, overwrite, lambda path: is_our_json(path, SCORES))
    segmenter = load(run, device, tile)
    names = segmenter.config.class_names
    for pair in track(pairs, "checking"):
        segmenter.check(pair.open_image())
    trained = segmenter.config.data
    found = replace(inspect(pairs, segmenter.classes, reading), channels=trained.channels, mixed=trained.mixed)
    dataset = SegmentationDataset(pairs, found, memory_limit=0)  # each is read once
    samples = (dataset.whole(index) for index in track(range(len(pairs)), "scoring"))
    settings: dict[str, Any] = {"tta": tta, "tolerance": tolerance, "parts": parts}
    ignored = IGNORED if found.ignored else None
    scores, rows = scores_of(segmenter.model, samples, names, tile=tile, ignored=ignored, **settings)
    summary = summary_of(rows)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        stems = [pair.stem for pair in pairs]
        per_image = [{"image": stem, **_without_nan(row)} for stem, row in zip(stems, rows, strict=True)]
        spread = {name: _without_nan(values) for name, values in summary.items()}
        write_json(out, {**scores, "images": stems, **settings, "over_images": spread, "per_image": per_image})
    shown = {"Dice of images": ("dice", 3), "HD95 in px": ("hd95", 1), "surface Dice": ("surface_dice", 3)}
    columns = {
        title: {name: _with_interval(summary.get(f"{key} {name}"), digits) for name in names}
        for title, (key, digits) in shown.items()
    }
    print_scores(scores, f"{len(pairs)} images of {data}", columns)
    for key, text in (("adapted_rand_error", "adapted Rand error"), ("v_rand", "V-Rand")):
        if key in summary:
            console.print(f"{text}: {_with_interval(summary[key], 4)}")
    seen = sorted(set(segmenter.config.train) & {pair.stem for pair in pairs})
    if seen:
        console.print(f"note: {len(seen)} of them are named like training images", soft_wrap=True)


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in row.items()}


def _with_interval(each: dict[str, Any] | None, digits: int) -> str:
    """Show the mean of a score over images, and its 95 % interval."""
    if each is None or math.isnan(each["mean"]):
        return "-"
    interval = "" if math.isnan(each["low"]) else f" ({each['low']:.{digits}f} to {each['high']:.{digits}f})"
    return f"{each['mean']:.{digits}f}{interval}"
