"""`fastunet evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastunet.files import check_apart, check_folder, check_replaceable, is_our_json, write_json
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
    print_scores,
    track,
)

SCORES = ("dice", "iou", "images", "tta")  # what the file of `evaluate` holds, among other things


def evaluate(
    run: RunArgument,
    data: Annotated[Path, DATA],
    out: Annotated[Path | None, typer.Option(help="JSON file for the scores.")] = None,
    tta: TtaOption = False,
    tile: TileOption = TILE,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Score RUN on every pair of DATA: Dice and IoU per class, over all pixels."""
    from fastunet.data import SegmentationDataset, find_pairs, inspect
    from fastunet.inference.predict import evaluate as scores_of

    pairs = find_pairs(data)
    if out is not None:
        check_folder(out.parent)
        check_apart(out.parent, [file for pair in pairs for file in (pair.image, pair.mask)])
        check_replaceable(out, overwrite, lambda path: is_our_json(path, SCORES))
    segmenter = load(run, device, tile)
    model, config = segmenter.model, segmenter.config
    for pair in track(pairs, "checking"):
        segmenter.source_of(pair.image)
    dataset = SegmentationDataset(pairs, inspect(pairs, config.data.classes))
    scores, _ = scores_of(model, track(dataset, "evaluating"), config.class_names, tile=tile, tta=tta)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {**scores, "images": [pair.stem for pair in pairs], "tta": tta})
    print_scores(scores, f"{len(pairs)} images of {data}")
    seen = sorted(set(config.train) & {pair.stem for pair in pairs})
    if seen:
        console.print(f"note: {len(seen)} of them have the names of training images", soft_wrap=True)
