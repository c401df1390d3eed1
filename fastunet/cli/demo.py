"""`fastunet demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastunet.files import check_folder, check_replaceable, is_our_png
from fastunet.train.config import TrainConfig

from .predict import predict
from .shared import OverwriteOption, console, option
from .train import train_with_bar


def demo(
    out: Annotated[Path, option("output", "Folder for data, run and predictions.")] = Path("fastunet-demo"),
    minutes: Annotated[float, option("training", "Limit of the training in minutes.")] = 1.5,
    steps: Annotated[int, option("training", "Optimiser steps at most.", min=1)] = 600,
    overwrite: OverwriteOption = False,
) -> None:
    """Draw micrographs of cells with exact masks, train a small net on them, and write the report."""
    from fastunet.data.synthetic import write_dataset
    from fastunet.train.checks import check_out

    config = TrainConfig(steps=steps, max_minutes=minutes, crop=128, features=(16, 32, 64, 128))
    config.check()
    data, run_folder, predictions = out / "data", out / "run", out / "predictions"
    check_folder(out)
    check_out(run_folder, resume=False, overwrite=overwrite)
    found = [path for folder in (data, predictions) for path in folder.rglob("*") if not path.name.startswith(".")]
    pictures = [path for path in found if path.is_symlink() or not path.is_dir()]
    for path in pictures:
        check_replaceable(path, overwrite, is_our_png)
    for path in pictures:
        path.unlink()
    console.print("1. making 40 micrographs with masks")
    write_dataset(data, 40)
    console.print(f"2. training for at most {minutes:g} minutes")
    train_with_bar(data, run_folder, config, overwrite=overwrite)
    console.print("3. predicting")
    predict(run_folder, [data / "images"], predictions)
    console.print(f"open {run_folder / 'report.png'}", soft_wrap=True)
    console.print(f"next: fastunet train YOUR_DATA --out RUN   (as {data}: images/ and masks/)", soft_wrap=True)
