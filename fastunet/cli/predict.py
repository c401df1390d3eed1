"""`fastunet predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastunet.checks import DataError
from fastunet.files import check_apart, check_folder, check_replaceable, is_our_png, save_png
from fastunet.train.config import TILE

from .shared import (
    DeviceOption,
    OverwriteOption,
    RunArgument,
    TileOption,
    TtaOption,
    console,
    load,
    track,
)


def predict(
    run: RunArgument,
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="An image, or a folder of images.")],
    out: Annotated[Path, typer.Option(help="Folder for the label images.")],
    tta: TtaOption = None,
    tile: TileOption = TILE,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Write OUT/<stem>.png for each image: labels, or 0 and 255 where there is one class."""
    from fastunet.data import find_images, mask_from_labels, normalize, read_image
    from fastunet.inference.predict import labels_of
    from fastunet.inference.predict import predict as probabilities_of

    files = find_images(images)
    check_folder(out)
    check_apart(out, files)
    targets = [out / f"{file.stem}.png" for file in files]
    for target in targets:
        check_replaceable(target, overwrite, is_our_png)
    model, config, use_tta = load(run, device, tile, tta, files)
    out.mkdir(parents=True, exist_ok=True)
    on = next(model.parameters()).device
    written: set[tuple[int, int]] = set()
    for file, target in track(list(zip(files, targets, strict=True)), "predicting"):
        image = normalize(read_image(file)).to(on)
        labels = labels_of(probabilities_of(model, image, tile=tile, tta=use_tta)).cpu().numpy()
        if target.exists() and (target.stat().st_dev, target.stat().st_ino) in written:
            raise DataError(f"{file}: expected stems that differ here in more than their case, got {target} once more")
        save_png(target, mask_from_labels(labels, config.data.classes))
        written.add((target.stat().st_dev, target.stat().st_ino))
    console.print(f"{len(files)} predictions in {out}", soft_wrap=True)
