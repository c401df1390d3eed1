"""One picture of a training run: learning curves, and for some images truth, prediction and errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fastunet.files import SOFTWARE, written_whole
from fastunet.inference.evaluation import scores_of_pixels
from fastunet.inference.outputs import class_palette, displayable

WIDTH = 12.0  # inches
CURVES_HEIGHT = 3.3
LEGEND_HEIGHT = 0.6
DPI = 110
MOST_SHOWN = 1024  # pixels along an edge; a picture of the figure has some 330
NAME_LENGTH = 36  # characters that fit above a picture
# The last of those of classes.
ERROR_COLOURS = {
    "found (true positive)": ("#009E73", 0.45),
    "too much (false positive)": ("#D55E00", 0.9),
    "missed (false negative)": ("#56B4E9", 0.9),
    "wrong class": ("#F0E442", 0.9),
}


@dataclass(frozen=True)
class Sample:
    """One image [H, W, C] as read from its file, and integer labels [H, W], true and predicted; 0 is background.

    A true label beyond the classes marks a pixel that does not count.
    """

    name: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray


def write_report(
    path: str | Path,
    history: Sequence[Mapping[str, Any]],
    samples: Sequence[Sample],
    class_names: Sequence[str] = ("background", "foreground"),
) -> None:
    """Write the report as PNG, whole or not at all: the file appears under its name only when it is complete.

    Args:
        history: rows with `step`, `minutes`, `train_loss` and `val_dice`; a row in which one of the last two is absent,
            None or not finite is left out of that curve.
        samples: one row of pictures each; may be empty.
        class_names: of labels 0, 1, ...
    """
    # Height / width of each, within what still makes a readable page.
    ratios = [np.clip(sample.truth.shape[0] / sample.truth.shape[1], 0.25, 2.0) for sample in samples]
    pictures_height = (WIDTH / 4 * float(np.mean(ratios)) + 0.3) * len(samples) + LEGEND_HEIGHT if samples else 0.0
    figure = Figure(figsize=(WIDTH, CURVES_HEIGHT + pictures_height), dpi=DPI, layout="constrained")
    top: Figure | SubFigure = figure
    if samples:
        heights = [CURVES_HEIGHT, pictures_height]
        (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
        _draw_samples(bottom, samples, class_names)
    left, right = top.subplots(1, 2)
    draw_loss(left, history)
    draw_dice(right, history)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": SOFTWARE})


def draw_loss(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    """Draw the training loss against steps."""
    losses = _draw_curve(axes, history, "train_loss", "training loss", "#0072B2")
    if losses:
        low, high = min(0.0, *losses), max(losses)
        axes.set_ylim(low, high + 0.05 * (high - low or 1.0))


def draw_dice(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    """Draw the validation Dice against steps."""
    dice = _draw_curve(axes, history, "val_dice", "validation Dice", "#009E73")
    if dice:
        axes.axhline(max(dice), color="0.6", linewidth=0.8, linestyle="--", zorder=0)
        axes.set_title(f"validation Dice: best {max(dice):.3f}, last {dice[-1]:.3f}", fontsize=11)
        axes.set_ylim(max(0.0, min(dice) - 0.05), 1.0)


def _draw_curve(axes: Axes, history: Sequence[Mapping[str, Any]], key: str, title: str, colour: str) -> list[float]:
    """Draw one column of the history and give its values."""
    recorded = [(row["step"], float(row[key])) for row in history if row.get(key) is not None]
    points = [(step, value) for step, value in recorded if np.isfinite(value)]
    axes.set_title(title, fontsize=11)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("steps")
    if history:
        axes.set_xlim(0, 1.02 * max(history[-1]["step"], 1))
        axes.set_xlabel(f"steps ({history[-1]['minutes']:.1f} minutes in all)")
    if not points:
        axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", va="center", color="0.5")
        return []
    steps, values = zip(*points, strict=True)
    # A dot for each row while they can be told apart; a single row would be invisible as a line.
    axes.plot(
        steps,
        values,
        color=colour,
        linewidth=1.6,
        marker="o" if len(points) <= 40 else None,
        markersize=4,
        clip_on=False,  # a score of 0 or 1 lies on the edge
    )
    return list(values)


def _draw_samples(figure: SubFigure, samples: Sequence[Sample], class_names: Sequence[str]) -> None:
    """A row of four pictures per sample, and the legends below."""
    rows = figure.subplots(len(samples), 4, squeeze=False)
    for row, sample in zip(rows, samples, strict=True):
        counted = sample.truth < len(class_names)
        prediction, truth = (torch.from_numpy(labels[counted]) for labels in (sample.prediction, sample.truth))
        dice = scores_of_pixels(prediction, truth, class_names)["mean_dice"]
        title = "prediction" if math.isnan(dice) else f"prediction: Dice {dice:.3f}"
        sample = thinned(sample)
        grey = displayable(sample.image)
        pictures = {
            sample.name[:NAME_LENGTH].encode(errors="replace").decode(): grey,
            "truth": colour_labels(sample.truth),
            title: colour_labels(sample.prediction),
            "errors": _overlay_errors(grey, sample, sample.truth < len(class_names)),
        }
        for axes, (name, picture) in zip(row, pictures.items(), strict=True):
            axes.imshow(picture)
            axes.set_title(name, fontsize=10, parse_math=False)  # a file name may hold dollar signs
            axes.set_xticks([])
            axes.set_yticks([])
    binary = len(class_names) == 2
    errors = list(ERROR_COLOURS.items())[: 3 if binary else 4]
    patches = [Patch(facecolor=colour, label=label) for label, (colour, _) in errors]
    if binary:
        figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
    else:
        figure.legend(handles=patches, loc="outside lower right", ncols=2, frameon=False, title="errors")
        labels = enumerate(class_names)
        patches = [Patch(facecolor=class_palette()[label] / 255, edgecolor="0.5", label=name) for label, name in labels]
        legend = figure.legend(handles=patches, loc="outside lower left", ncols=4, frameon=False, title="classes")
        for text in legend.get_texts():
            text.set_parse_math(False)


def thinned(sample: Sample) -> Sample:
    """Leave out rows and columns that would not be seen."""
    step = -(-max(sample.truth.shape) // MOST_SHOWN)
    image, truth, prediction = (each[::step, ::step] for each in (sample.image, sample.truth, sample.prediction))
    return Sample(sample.name, image, truth, prediction)


def colour_labels(labels: np.ndarray) -> np.ndarray:
    """Give each label its colour, RGB in 0..1."""
    return class_palette()[labels] / 255


def _overlay_errors(image: np.ndarray, sample: Sample, counted: np.ndarray) -> np.ndarray:
    """Tint the image [H, W, 3] by what the prediction did at each pixel that counts."""
    true, predicted = sample.truth > 0, sample.prediction > 0
    same = sample.truth == sample.prediction
    areas = (true & same, ~true & predicted, true & ~predicted, true & predicted & ~same)
    picture = 0.75 * image
    for area, (colour, opacity) in zip(areas, ERROR_COLOURS.values(), strict=True):
        picture[area & counted] = (1 - opacity) * picture[area & counted] + opacity * np.array(to_rgb(colour))
    return picture
