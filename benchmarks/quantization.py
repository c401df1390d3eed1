"""What 8 bits cost a trained model in accuracy: its scores and those of its quantised copy, on the same images.

    python -m benchmarks.quantization RUN DATA [--out FILE.json] [--calibration 4]

RUN is what `fastunet train` leaves, DATA holds images/ and masks/. The model is calibrated on images of DATA that it
was trained on, if there are any, and scored on those it was not. No GPU is needed: without one the values of 8 bits
are multiplied in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import fastunet
from fastunet.checkpoint import load_run
from fastunet.data import SegmentationDataset, find_pairs, inspect
from fastunet.files import write_json
from fastunet.inference import evaluate

from .harness.environment import environment


def compare(run: Path, data: Path, calibration: int) -> dict[str, Any]:
    """Scores of "float" and "e4m3", the "loss" of mean Dice, and the images by stem."""
    model, config = load_run(run)
    model.eval()
    pairs = find_pairs(data)
    summary = inspect(pairs, config.data.classes)
    seen = [pair for pair in pairs if pair.stem in config.train]
    judged = [pair for pair in pairs if pair.stem not in config.train]
    if not judged:
        raise typer.BadParameter(f"DATA: expected images that {run} was not trained on, got none")
    known = SegmentationDataset((seen or judged)[:calibration], summary)
    quantised = fastunet.quantize(model, (known[i][0][None] for i in range(len(known))))
    images = SegmentationDataset(judged, summary)
    scores = {
        name: evaluate(net, images, config.class_names)[0] for name, net in (("float", model), ("e4m3", quantised))
    }
    loss = scores["float"]["mean_dice"] - scores["e4m3"]["mean_dice"]
    stems = {"calibration": [pair.stem for pair in (seen or judged)[:calibration]], "judged": [p.stem for p in judged]}
    return {**scores, "loss": loss, "images": stems}


def main(
    run: Annotated[Path, typer.Argument(help="A trained model.")],
    data: Annotated[Path, typer.Argument(help="Images and masks.")],
    out: Annotated[Path | None, typer.Option(help="The scores, as JSON.")] = None,
    calibration: Annotated[int, typer.Option(min=1, help="Images that tell the ranges.")] = 4,
) -> None:
    """Score a model and its quantised copy."""
    found = compare(run, data, calibration)
    for name in ("float", "e4m3"):
        print(f"{name}: mean Dice {found[name]['mean_dice']:.4f}")
    print(f"loss: {found['loss']:.4f}")
    if out is not None:
        write_json(out, {"environment": environment("cpu"), **found})


if __name__ == "__main__":
    typer.run(main)
