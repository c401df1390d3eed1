"""Cross-validation: a training for each part of the images, which is kept out of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastunet.checks import ConfigError
from fastunet.files import check_replaceable, is_our_json, write_json
from fastunet.pretrained import CONFIG
from fastunet.train.checkpoint import load_config
from fastunet.train.config import PLANNED, TrainConfig
from fastunet.train.distributed import is_first_rank

SUMMARY = "folds.json"


def train_folds(
    folds: int, out: Path, config: TrainConfig, overwrite: bool, train_one: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """Train in OUT/fold-1 and on, going on with what was begun; return and write the mean scores as OUT/folds.json.

    What was planned for the first fold, the others take: their scores are to be of one net.

    Args:
        train_one: trains in a folder by a config, as a resumption or not, and returns the metrics.

    Raises:
        ConfigError: fewer than two folds.
        DataError: a file that fastunet did not write is at OUT/folds.json.
    """
    if folds < 2:
        raise ConfigError(f"folds: expected at least 2, got {folds}")
    summary = out / SUMMARY
    check_replaceable(summary, True, lambda path: is_our_json(path, ("folds", "mean_dice")))
    rows = []
    for number in range(1, folds + 1):
        folder, config = out / f"fold-{number}", replace(config, fold=f"{number}/{folds}")
        metrics = train_one(folder, config, not overwrite and (folder / CONFIG).exists())
        rows.append({name: metrics[name] for name in ("mean_dice", "mean_iou", "dice", "iou", "images", "weights")})
        training = load_config(folder).training
        planned = {name: training[name] for name in PLANNED} | {"features": tuple(training["features"])}
        config = replace(config, **planned)
    found: dict[str, Any] = {"folds": rows}
    for name in ("mean_dice", "mean_iou"):
        values = [row[name] for row in rows]
        found[name] = {"mean": statistics.mean(values), "std": statistics.stdev(values)}
    if is_first_rank():
        write_json(summary, found)
    return found
