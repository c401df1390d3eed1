"""Cross-validation: a training for each part of the images, which is kept out of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastunet.checks import ConfigError
from fastunet.files import check_replaceable, is_our_json, write_json
from fastunet.pretrained import CONFIG
from fastunet.train.distributed import is_first_rank

SUMMARY = "folds.json"


def train_folds(
    folds: int, out: Path, overwrite: bool, train_one: Callable[[str, Path, bool], dict[str, Any]]
) -> dict[str, Any]:
    """Train in OUT/fold-1 and on, going on with what was begun; return and write the mean scores as OUT/folds.json.

    Args:
        train_one: trains the setting `fold`, in a folder, as a resumption or not, and returns the metrics.

    Raises:
        ConfigError: fewer than two folds.
        DataError: a file that fastunet did not write is at OUT/folds.json.
    """
    if folds < 2:
        raise ConfigError(f"folds: expected at least 2, got {folds}")
    summary = out / SUMMARY
    check_replaceable(summary, True, lambda path: is_our_json(path, ("folds", "mean_dice")))
    rows = []
    for fold, folder in _folders(folds, out):
        metrics = train_one(fold, folder, not overwrite and (folder / CONFIG).exists())
        rows.append({name: metrics[name] for name in ("mean_dice", "mean_iou", "dice", "iou", "images", "weights")})
    found: dict[str, Any] = {"folds": rows}
    for name in ("mean_dice", "mean_iou"):
        values = [row[name] for row in rows]
        found[name] = {"mean": statistics.mean(values), "std": statistics.stdev(values)}
    if is_first_rank():
        write_json(summary, found)
    return found


def _folders(folds: int, out: Path) -> Iterator[tuple[str, Path]]:
    return ((f"{number}/{folds}", out / f"fold-{number}") for number in range(1, folds + 1))
