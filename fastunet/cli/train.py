"""`fastunet train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fastunet.train.config import TrainConfig

from .shared import DATA, DeviceOption, OverwriteOption, console, parse_features, print_scores


def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the run: weights, settings, metrics, report.")],
    data: Annotated[Path | None, DATA] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 3000,
    max_minutes: Annotated[float | None, typer.Option(help="Limit in minutes; the schedule ends by it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT, as it was begun.")] = False,
    overwrite: OverwriteOption = False,
    batch_size: Annotated[int, typer.Option(help="Crops per step.")] = 4,
    crop: Annotated[int, typer.Option(help="Edge of the crops in pixels.")] = 256,
    features: Annotated[str, typer.Option(help="Channels of each level.")] = "16,32,64,128,256",
    norm: Annotated[str, typer.Option(help="batch, instance or none.")] = "batch",
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 5e-2,
    val_fraction: Annotated[float, typer.Option(help="Share of the images kept out for the metrics.")] = 0.15,
    split: Annotated[str, typer.Option(help="Which: the last by name, or random.")] = "last",
    classes: Annotated[int | None, typer.Option(help="Number of classes [inferred from the masks].")] = None,
    tta: Annotated[bool, typer.Option("--tta/--no-tta", help="Average eight flips and turns when predicting.")] = True,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    device: DeviceOption = "auto",
    workers: Annotated[int | None, typer.Option(help="Processes that read images [4 beside a GPU, else 0].")] = None,
    seed: Annotated[int, typer.Option(help="Of split, weights, crops and augmentation.")] = 0,
) -> None:
    """Train a U-Net on DATA; leave model, settings, metrics, history and report.png in OUT."""
    given = {name: value for name, value in context.params.items() if name in TrainConfig.__dataclass_fields__}
    given["features"] = parse_features(features)
    if resume:
        # What is not said is as the run was begun.
        from fastunet.train.checks import resumed_config

        typed = {name for name in given if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}
        config = resumed_config(out, {name: given[name] for name in typed})
    else:
        config = TrainConfig(**given)
    train_with_bar(data, out, config, resume=resume, overwrite=overwrite)


def train_with_bar(
    data: Path | None, out: Path, config: Any, *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    from fastunet.train.loop import Progress as Standing
    from fastunet.train.loop import train as train_run

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task("reading", total=1.0)

        def show(standing: Standing) -> None:
            last = standing.history[-1] if standing.history else {}
            dice = f"  validation Dice {last['val_dice']:.3f}" if "val_dice" in last else ""
            text = f"step {standing.step}  loss {standing.loss:.3f}{dice}"
            bars.update(bar, completed=standing.fraction, description=text)

        metrics = train_run(data, out, config, resume=resume, overwrite=overwrite, on_step=show)
    print_scores(metrics, f"{len(metrics['images'])} images kept out of training")
    console.print(f"weights: {metrics['weights']}", soft_wrap=True)
    console.print(f"report: {out / 'report.png'}", soft_wrap=True)
    return metrics
