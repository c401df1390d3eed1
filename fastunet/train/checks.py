"""What can be known before a training begins: where it may write, with what settings, and on which images."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fastunet.checks import ConfigError, DataError, check_types, some_of
from fastunet.data import DataSummary
from fastunet.data.summary import Facts
from fastunet.pretrained import WEIGHTS
from fastunet.train.checkpoint import CONFIG, RunConfig, checkpoints, load_config, read_progress
from fastunet.train.config import PLANNED, RESUMABLE, TrainConfig, too_small
from fastunet.train.events import EVENTS

HISTORY, METRICS, REPORT, HTML = "history.csv", "metrics.json", "report.png", "report.html"
RESULTS = (WEIGHTS, METRICS, REPORT, HTML)


def run_files(out: Path) -> list[Path]:
    """List what is in `out` under the names of a run's files and checkpoints."""
    named = [out / name for name in (CONFIG, HISTORY, *RESULTS)]
    return [path for path in named if os.path.lexists(path)] + checkpoints(out) + sorted(out.glob(f"{EVENTS}*"))


def check_out(out: Path, resume: bool, overwrite: bool) -> RunConfig | None:
    """Give the config of the run to resume; None for a new one.

    A run that was killed before its first checkpoint has nothing to lose: it may be begun anew. Raises DataError where
    `out` holds a run, or files of a run's names that are not a run's, or, with `resume`, no run.
    """
    if resume:
        return run_to_resume(out)
    found = run_files(out)
    if not found:
        return None
    try:
        load_config(out)
    except DataError:
        raise DataError(f"{out}: expected a folder without files of a run's names, got {found[0].name}") from None
    if not overwrite and any(path.name not in (CONFIG, HISTORY) and EVENTS not in path.name for path in found):
        raise DataError(
            f"{out}: expected a folder without a run, got one that holds {CONFIG} (--resume continues it, "
            "--overwrite begins anew)"
        )
    return None


def run_to_resume(out: Path) -> RunConfig:
    """Read the config of the run in `out`. Raises DataError where there is none."""
    if not (out / CONFIG).exists():
        raise DataError(f"{out}: expected a run to resume, got no {CONFIG}")
    return load_config(out)


def clear_run(out: Path) -> None:
    """Remove a run's files and checkpoints, after `check_out`; whatever else is in its folder stays."""
    for path in run_files(out):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def resumed_config(out: Path, changes: Mapping[str, Any]) -> TrainConfig:
    """The settings with which the run in `out` goes on: its own, and changes of those that may differ.

    What is planned where it is not given stays as planned. A limit of time that is used up goes, where another number
    of steps is asked for.

    Raises:
        DataError: no run there.
        ConfigError: other settings differ, or a limit lies behind what is done.
    """
    saved = run_to_resume(out)
    try:
        before = TrainConfig(**{**saved.training, "features": tuple(saved.training["features"])})
        check_types(before)
    except (KeyError, TypeError) as error:
        raise DataError(f"{out / CONFIG}: expected the settings of a training, got {error!r}") from error
    changes = {name: value for name, value in changes.items() if value is not None or name not in PLANNED}
    config = replace(before, **changes)
    check_kept(out, before, config, but=RESUMABLE)
    done = _done(out)
    minutes = done["seconds"] / 60
    if config.steps < done["step"]:
        raise ConfigError(f"steps: expected at least the {done['step']} that are done, got {config.steps}")
    if config.max_minutes is not None and config.max_minutes <= minutes:
        if config.max_minutes != before.max_minutes:
            raise ConfigError(f"max_minutes: expected more than the {minutes:.2f} done, got {config.max_minutes}")
        if config.steps != before.steps:
            return replace(config, max_minutes=None)
    return config


def check_kept(out: Path, before: Any, now: Any, but: Sequence[str] = ()) -> None:
    """Raise ConfigError on the first setting, but for some, that is another than the run in `out` was begun with."""
    for field in fields(before):
        kept, given = getattr(before, field.name), getattr(now, field.name)
        if field.name not in but and given != kept:
            raise ConfigError(f"{field.name}: expected {kept!r}, with which {out} was begun, got {given!r}")


def _done(out: Path) -> dict[str, Any]:
    """The progress of the newest checkpoint that can be read: whether it is whole is seen when it is loaded."""
    for folder in reversed(checkpoints(out)):
        try:
            progress = read_progress(folder)
            return {"step": int(progress["step"]), "seconds": float(progress["seconds"])}
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return {"step": 0, "seconds": 0.0}


def check_sizes(facts: Sequence[Facts], levels: int, norm: str) -> None:
    """Raise DataError on the first image that does not go through a net of so many levels."""
    for fact in facts:
        height, width, _ = fact.shape
        if reason := too_small(height, width, levels, norm):
            raise DataError(f"{fact.pair.image}: {reason}")


def check_same_images(out: Path, before: RunConfig, now: RunConfig) -> None:
    """Raise DataError where a run is to go on with images, or kinds of images, that it was not begun with."""
    for side in ("train", "val"):
        old, new = getattr(before, side), getattr(now, side)
        if new != old:
            name = "training" if side == "train" else "validation"
            raise DataError(
                f"{out}: expected the {len(old)} {name} images the run was begun with, got {len(new)}, "
                f"differing in {some_of(sorted(set(new) ^ set(old)))}"
            )
    for field in fields(DataSummary):
        old, new = getattr(before.data, field.name), getattr(now.data, field.name)
        if new != old:
            raise DataError(f"{out}: expected {field.name} {old} of the images the run was begun with, got {new}")
