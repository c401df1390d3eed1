"""`fastunet train`."""

from __future__ import annotations

import json
import os
import tomllib
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fastunet.checks import ConfigError
from fastunet.train.config import TrainConfig

from .check import print_survey
from .shared import (
    DATA,
    OverwriteOption,
    bar,
    console,
    is_typed,
    option,
    parse_features,
    pop_reading,
    print_scores,
    with_fields,
    with_reading,
)

QUIET = 1.0  # minutes without a line, at the most, where there is no terminal


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the options that a TOML file, or the config.json of a run, gives, where the command line gives none."""
    if path is None:
        return None
    names = {each.name for each in context.command.params} - {"config"}
    try:
        text = path.read_text()
        found: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        if "training" in found:
            found = {**found["training"], **found.get("reading", {}), "data": found.get("source")}
        unknown = sorted(found.keys() - names)
    # Of decoding, JSON and TOML alike; of what is no object; of brackets within brackets.
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: expected settings in TOML, or the config.json of a run, got: {error}") from None
    if unknown:
        raise ConfigError(f"{path}: expected names of options, got {', '.join(unknown)}")
    context.default_map = {
        name: ",".join(map(str, value)) if isinstance(value, list) else value
        for name, value in found.items()
        if value is not None
    }
    return path


CONFIG = option(
    "output",
    "TOML file of these options (max_minutes = 10), or the config.json of a run; typed options override it.",
    callback=_read_config,
    is_eager=True,
)


@with_reading
@partial(with_fields, TrainConfig, features=str | None)
def train(
    context: typer.Context,
    out: Annotated[Path, option("output", "Folder for the run: weights, settings, metrics, report.")],
    data: Annotated[Path | None, DATA] = None,
    config: Annotated[Path | None, CONFIG] = None,
    folds: Annotated[
        int | None,
        option(
            "validation",
            "Cross-validate over so many parts, in OUT/fold-1 and so on; the same command continues it [one run].",
        ),
    ] = None,
    resume: Annotated[bool, option("output", "Continue the run in OUT, with its settings.", "--resume")] = False,
    overwrite: OverwriteOption = False,
    **settings: Any,
) -> None:
    """Train a U-Net on DATA; write model, settings, metrics, history and report to OUT."""
    if settings["features"] is not None:
        settings["features"] = parse_features(settings["features"])
    if folds is not None and (resume or settings["fold"]):
        raise ConfigError("folds: expected neither --resume (the same command goes on) nor --fold beside it")
    if resume:
        # What is not said is as the run was begun.
        from fastunet.train.checks import resumed_config, run_to_resume

        reading = pop_reading(context, settings, run_to_resume(out).reading)
        chosen = resumed_config(out, {name: settings[name] for name in settings if is_typed(context, name)})
    else:
        reading = pop_reading(context, settings)
        chosen = TrainConfig(**settings)
    if folds is None:
        train_with_bar(data, out, chosen, reading=reading, resume=resume, overwrite=overwrite)
        return
    from fastunet.train.folds import SUMMARY, train_folds

    def train_one(folder: Path, config: TrainConfig, begun: bool) -> dict[str, Any]:
        console.print(f"fold {config.fold}")
        return train_with_bar(data, folder, config, reading=reading, resume=begun, overwrite=overwrite)

    dice = train_folds(folds, out, chosen, overwrite, train_one)["mean_dice"]
    console.print(f"Dice over {folds} folds: {dice['mean']:.4f} +- {dice['std']:.4f}; {out / SUMMARY}", soft_wrap=True)


def train_with_bar(data: Path | None, out: Path, config: TrainConfig, **how: Any) -> dict[str, Any]:
    """Train as `fastunet.train.loop.train` does, of several processes only the first one speaking."""
    from fastunet.train.loop import Progress
    from fastunet.train.loop import train as train_run

    if int(os.environ.get("RANK", 0)):
        return train_run(data, out, config, **how)
    with bar("reading") if console.is_terminal else nullcontext() as draw:
        printed = 0.0  # minutes

        def show(standing: Progress) -> None:
            nonlocal printed
            last = standing.history[-1] if standing.history else {}
            dice = f"  validation Dice {last['val_dice']:.3f}" if "val_dice" in last else ""
            text = f"step {standing.step}  loss {standing.loss:.3f}{dice}"
            minutes = standing.seconds / 60
            if draw is not None:
                draw(standing.fraction, text=text)
            elif last.get("step") == standing.step or minutes - printed >= QUIET:
                printed = minutes
                console.print(f"{standing.fraction:.0%}  {minutes:.1f} minutes  {text}", soft_wrap=True)

        metrics = train_run(
            data,
            out,
            config,
            **how,
            on_step=show,
            on_data=lambda found: print_survey(found, "data"),
            on_plan=lambda text: console.print(text, soft_wrap=True),
        )
    print_scores(metrics, f"{len(metrics['images'])} images kept out of training")
    console.print(f"weights: {metrics['weights']}", soft_wrap=True)
    console.print(f"report: {out / 'report.html'} and report.png", soft_wrap=True)
    return metrics
