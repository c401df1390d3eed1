"""Predictions of images that are read in windows, part by part: memory does not grow with their pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor, nn

from fastunet.data.dataset import Moments, moments, normalize
from fastunet.data.sources import Source
from fastunet.inference.predict import Prediction, labels_of
from fastunet.inference.tiling import Window, stitched


def predict_parts(
    prediction: Prediction, source: Source, scale: Moments | None = None
) -> Iterator[tuple[Window, Tensor]]:
    """Give the probabilities of an image part by part, in rows: float32 [K, h, w] on the model's device.

    The next part is read while one is computed.

    Args:
        scale: of the image, its moments; None finds them out.
    """
    scale = moments(source) if scale is None else scale
    device = next(prediction.model.parameters()).device
    field = prediction.field
    if prediction.views > 1:  # The turned image's grid may lie otherwise on the part, by less than a multiple.
        field = field._replace(halo=field.halo + field.multiple)

    def read(part: Window) -> tuple[Window, Tensor]:
        window = part.widened(field, *source.size)
        return window, normalize(source.window(*window), scale)[None]

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read, prediction.parts[0])
        for index, part in enumerate(prediction.parts):
            outer, pixels = coming.result()
            if index + 1 < len(prediction.parts):
                coming = pool.submit(read, prediction.parts[index + 1])
            yield part, prediction.of(part, _reader(outer, pixels.to(device)))[0]


def predict_labels(
    model: nn.Module, source: Source, scale: Moments | None = None, *, tile: int | None = None, tta: bool = False
) -> Tensor:
    """Return the labels [H, W] of an image, on the CPU; in memory there is no more of it than a tile.

    Arguments and errors are those of `predict_parts` and `predict`.
    """
    parts = predict_parts(Prediction(model, source.size, tile=tile, tta=tta), source, scale)
    return stitched(((part, labels_of(found).cpu()) for part, found in parts), source.size)


def _reader(outer: Window, pixels: Tensor) -> Callable[[Window], Tensor]:
    """Give the function that cuts windows of the image out of the pixels of a larger one."""
    return lambda window: window.within(outer).of(pixels)
