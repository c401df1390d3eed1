"""`fastunet check`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fastunet.checks import ConfigError, DataError, some_of
from fastunet.files import check_folder, check_replaceable, is_our_png
from fastunet.train.config import TrainConfig

from .shared import DATA, OverwriteOption, bar, console, option, pop_reading, with_reading

if TYPE_CHECKING:
    from fastunet.data.survey import Survey

SHOWN = 8  # images in the picture


@with_reading
def check(
    context: typer.Context,
    data: Annotated[Path, DATA],
    out: Annotated[Path | None, option("output", "PNG file for a picture of some images with their masks.")] = None,
    classes: Annotated[int | None, option("data", "Number of classes [inferred from the masks].")] = None,
    val_fraction: Annotated[
        float, option("data", "Share of the images kept out of training.")
    ] = TrainConfig().val_fraction,
    overwrite: OverwriteOption = False,
    **options: Any,
) -> None:
    """Read every file of DATA; print what it holds, what is unusual, and what training would refuse and why."""
    from fastunet.data.pairing import check_outside
    from fastunet.data.survey import survey

    if out is not None and out.suffix.lower() != ".png":
        raise ConfigError(f"out: expected the name of a PNG file, got {str(out)!r}")
    reading = pop_reading(context, options)
    if out is not None:
        check_folder(out.parent)
        check_replaceable(out, overwrite, is_our_png)
    with bar("reading") as show:
        found = survey(data, reading, classes, val_fraction=val_fraction, on_pair=show)
    if out is not None and found.facts:
        check_outside(out.parent, data, reading, [fact.pair for fact in found.facts])
    print_survey(found, str(data))
    if out is not None and found.summary is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        draw(out, found)
        console.print(f"picture: {out}", soft_wrap=True)
    if found.problems:
        for problem in found.problems[1:]:
            console.print(f"problem: {problem}", soft_wrap=True)
        raise DataError(found.problems[0])


def print_survey(found: Survey, title: str) -> None:
    """Print what a data set holds as a table, and what is odd about it below."""
    if found.facts:
        console.print(title, soft_wrap=True)
        table = Table(show_header=False)
        for row in _rows(found):
            table.add_row(*row)
        console.print(table)
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True)


def _rows(found: Survey) -> list[tuple[str, str]]:
    from fastunet.data.labels import code_of
    from fastunet.data.layout import text_of

    facts = found.facts
    sizes = sorted({fact.shape[:2] for fact in facts})
    count = f"{len(facts)}: {len(found.train)} to train on, {len(found.val)} kept out"
    if unread := len(found.train) + len(found.val) - len(facts):
        count = f"{len(facts)}, and {unread} that cannot be read"
    text = f"{sizes[0][0]} x {sizes[0][1]}"
    if len(sizes) > 1:
        text = f"{len(sizes)} sizes, from {text} to {sizes[-1][0]} x {sizes[-1][1]}"
    rows = [("images", count), ("height x width", text)]
    for name, values in (
        ("channels", [str(fact.shape[2]) for fact in facts]),
        ("type", [fact.dtype for fact in facts]),
    ):
        kinds = sorted(set(values))
        rows.append((name, kinds[0] if len(kinds) == 1 else ", ".join(f"{k} ({values.count(k)})" for k in kinds)))
    if found.summary is None:  # of masks that fit, the classes say it
        in_masks: set[Any] = set().union(*(fact.values for fact in facts))
        rows.append(("mask values", some_of(map(text_of, sorted(in_masks, key=code_of)))))
    shares = ((each.name, f"{100 * each.share:.1f} % of the pixels, in {each.images} images") for each in found.shares)
    return [*rows, *shares]


def draw(path: Path, found: Survey) -> None:
    """Write a PNG: the share of each class, and some images with their masks in colour, evenly from first to last."""
    import numpy as np
    from matplotlib.figure import Figure

    from fastunet.data.labels import IGNORED
    from fastunet.files import SOFTWARE, written_whole
    from fastunet.inference.outputs import class_palette, overlay_of

    assert found.summary is not None
    count = min(SHOWN, len(found.facts))
    places = np.linspace(0, len(found.facts) - 1, count).round().astype(int)
    lines = math.ceil(count / 4)
    figure = Figure(figsize=(12, 1.4 + 3.2 * lines), dpi=110, layout="constrained")
    (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.4, 3.2 * lines])
    axes = top.subplots()
    left = 0.0
    for label, each in enumerate(found.shares):
        colour = class_palette()[label + 1] / 255 if label else "#444444"  # as of the overlays
        axes.barh(0, each.share, left=left, color=colour, label=f"{each.name}: {100 * each.share:.1f} %")
        left += each.share
    axes.set(xlim=(0, 1), yticks=[], xlabel="share of the pixels")
    legend = axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)
    for text in legend.get_texts():  # names of classes and files may hold dollar signs
        text.set_parse_math(False)
    grid = bottom.subplots(lines, 4, squeeze=False)
    for place in grid.flat:
        place.axis("off")
    for place, index in zip(grid.flat, places, strict=False):
        pair = found.facts[index].pair
        labels = found.summary.labels_of(pair)
        place.imshow(overlay_of(pair.read_image(), labels * (labels != IGNORED)))
        place.set_title(pair.stem[-36:].encode(errors="replace").decode(), fontsize=9, parse_math=False)
    with written_whole(path) as temporary:
        figure.savefig(temporary, metadata={"Software": SOFTWARE})
