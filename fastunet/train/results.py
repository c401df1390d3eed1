"""The scores of a model, shared out among ranks, and what a training leaves: weights, metrics, history and reports."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastunet.data import Pair, SegmentationDataset
from fastunet.data.labels import IGNORED
from fastunet.files import write_json, written_whole
from fastunet.inference.evaluation import counted_of, scores_of_pixels
from fastunet.inference.streaming import predict_labels
from fastunet.inference.tiling import field_of
from fastunet.metrics import SegmentationMetrics
from fastunet.pretrained import CONFIG, WEIGHTS, write_weights
from fastunet.train.checkpoint import RunConfig, remove_checkpoints
from fastunet.train.checks import HISTORY, HTML, METRICS, REPORT
from fastunet.train.config import TILE
from fastunet.train.distributed import sum_of_ranks
from fastunet.train.html import write_html
from fastunet.train.report import Sample, write_report
from fastunet.unet import UNet

if TYPE_CHECKING:
    from fastunet.train.loop import _Loop

REPORTED = 4  # images in the report
EXTREMES = 3  # the best and the worst images in report.html, so many of each


def tile_of(model: nn.Module) -> int:
    """Return the edge of the tiles that a model is scored in: of deep nets large enough for what they depend on."""
    field = field_of(model)
    return TILE if field is None else max(TILE, 3 * field.halo + field.multiple)


def validate(
    model: nn.Module, samples: SegmentationDataset, class_names: list[str], *, tta: bool = False, part: slice
) -> tuple[SegmentationMetrics, list[float]]:
    """Score a model on all samples, whole or in exact tiles; give the mean Dice of the foreground in each image too,
    NaN where none of its pixels counts.

    Of several ranks each predicts its `part` of the samples; the metrics are still those of this rank.
    """
    metrics = SegmentationMetrics(class_names)
    dice = torch.zeros(len(samples), dtype=torch.float64)
    device, tile = next(model.parameters()).device, tile_of(model)
    for index in range(len(samples))[part]:
        image, truth, scale = samples.whole(index)
        prediction = predict_labels(model, image, scale, tile=tile, tta=tta)
        pixels = counted_of(prediction, torch.from_numpy(truth), IGNORED if samples.summary.ignored else None)
        metrics.update(*pixels)
        dice[index] = scores_of_pixels(*pixels, class_names)["mean_dice"]
    return metrics, sum_of_ranks(dice, device).tolist()


def finish(loop: _Loop, shown: list[Pair]) -> dict[str, Any]:
    """Write weights, metrics, history and report. Killed within it, a run is finished by resuming it."""
    config, run, out, progress, model = loop.config, loop.run_config, loop.out, loop.progress, loop.net
    kept, why = progress.step, "the last, as no images were kept out to choose by"
    if loop.average is not None:
        model.load_state_dict(loop.average.module.state_dict())
    if (best := progress.best) is not None and loop.best_weights is not None:
        kept, why = int(best["step"]), f"best validation Dice of the foreground, {best['val_dice']:.4f}"
        model.load_state_dict(loop.best_weights)
    dataset = SegmentationDataset(shown, run.data)
    scored, dice = validate(model, dataset, run.class_names, tta=config.tta, part=loop.part)
    metrics: dict[str, Any] = dict(scored.compute()) if run.val else {}
    metrics |= {
        "images": run.val,
        "tta": config.tta,
        "weights": f"step {kept} of {progress.step}: {why}",
        "steps": progress.step,
        "seconds": progress.seconds,
        "device": str(loop.accelerator.device),
        "processes": progress.processes,
        "precision": loop.accelerator.mixed_precision.replace("no", "fp32"),
        "torch": torch.__version__,
    }
    if not loop.accelerator.is_main_process:
        return metrics
    write_weights(out / WEIGHTS, model.state_dict())
    write_json(out / CONFIG, asdict(replace(run, weights=metrics["weights"])))
    write_json(out / METRICS, metrics)
    write_history(out, progress.history)
    samples = [_sample(loop, model, dataset, index) for index in range(len(shown[:REPORTED]))]
    write_report(out / REPORT, progress.history, samples, run.class_names)
    order = sorted((index for index, value in enumerate(dice) if not math.isnan(value)), key=lambda index: -dice[index])
    ends = sorted({*order[:EXTREMES], *order[-EXTREMES:]}, key=order.index)
    extremes = [(_sample(loop, model, dataset, index), dice[index]) for index in ends]
    ranking = [(shown[index].stem, dice[index]) for index in order]
    ranking += [(pair.stem, value) for pair, value in zip(shown, dice, strict=True) if math.isnan(value)]
    write_html(out / HTML, progress.history, extremes, metrics, ranking, _described(run, metrics), run.class_names)
    remove_checkpoints(out, keep=1)
    return metrics


def _sample(loop: _Loop, model: UNet, dataset: SegmentationDataset, index: int) -> Sample:
    """Predict one image again: all predictions at once would not fit into memory."""
    (image, labels, scale), pair = dataset.whole(index), dataset.pairs[index]
    prediction = predict_labels(model, image, scale, tile=tile_of(model), tta=loop.config.tta)
    return Sample(pair.stem, pair.read_image(), labels, prediction.numpy())


def _described(run: RunConfig, metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Tell what was trained on what: values by name, in tables by their headings."""
    smallest, largest = ("{} x {}".format(*size) for size in (run.data.size_min, run.data.size_max))
    run_of = {name: metrics[name] for name in ("device", "processes", "precision", "torch")}
    return {
        "data and run": {
            "data": run.source,
            "training images": f"{len(run.train)}: {', '.join(run.train)}",
            "images kept out": f"{len(run.val)}: {', '.join(run.val)}" if run.val else "none",
            "height x width": smallest if smallest == largest else f"{smallest} to {largest}",
            "channels": run.data.channels,
            "values": run.data.dtype,
            "classes": run.class_names,
            "steps": metrics["steps"],
            "minutes": f"{metrics['seconds'] / 60:.1f}",
            **run_of,
            "fastunet": run.fastunet,
        },
        "model": run.model,
        "settings of the training": run.training,
    }


def write_history(out: Path, history: list[dict[str, float]]) -> None:
    """Write a row per validation as RUN/history.csv."""
    with written_whole(out / HISTORY) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(history)
