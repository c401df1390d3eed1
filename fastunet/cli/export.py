"""`fastunet export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from fastunet.files import check_folder

from .shared import RunArgument, console, option

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "bioimageio": ".bioimageio.zip"}


def export(
    run: RunArgument,
    to: Annotated[
        Literal["onnx", "torch-export", "bioimageio"],
        option("output", "ONNX, a program of torch.export, or a package for bioimage.io."),
    ],
    out: Annotated[Path | None, option("output", "File to write [RUN/model with the format's suffix].")] = None,
    name: Annotated[str | None, option("output", "Name of the package for bioimage.io [that of RUN].")] = None,
) -> None:
    """Write RUN as one file that turns the pixels of an image of any size into its mask, normalisation included."""
    from fastunet.checks import DataError
    from fastunet.inference import export as exports
    from fastunet.segmenter import load

    target = out or run / f"model{SUFFIXES[to]}"
    check_folder(target.parent)
    if target.exists() or target.is_symlink():
        raise DataError(f"{target}: expected nothing there, got a file")
    title = name or run.absolute().name
    if to == "bioimageio":
        exports.check_title(title)
    segmenter = load(run, "cpu")
    model, data = segmenter.model, segmenter.config.data
    target.parent.mkdir(parents=True, exist_ok=True)
    with console.status(f"exporting to {to}"):
        if to == "onnx":
            exports.export_onnx(model, data, target)
        elif to == "torch-export":
            exports.export_torch(model, data, target)
        else:
            count = len(segmenter.config.train)
            text = f"A U-Net for {data.channels} channels of {data.dtype}, trained by fastunet on {count} images."
            exports.export_bioimageio(model, data, target, title, text)
    console.print(f"{target}", soft_wrap=True)
