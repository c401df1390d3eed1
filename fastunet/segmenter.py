"""A trained run as one object: from a file or an array to labels, whole or part by part."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastunet.checks import ConfigError, DataError
from fastunet.data import mask_from_labels, read_image
from fastunet.data.decoding import count_sections
from fastunet.data.labels import dtype_of
from fastunet.data.morphology import connected_components, split_objects
from fastunet.data.sources import Source, open_source, source_of_array
from fastunet.data.volumes import is_zarr
from fastunet.files import save_png
from fastunet.inference.outputs import (
    GRID,
    WRITERS,
    StreamedTiff,
    Wanted,
    Writer,
    overlay_of,
    palette_of,
    write_nifti,
    write_objects,
    write_rois,
)
from fastunet.inference.predict import Prediction, labels_of
from fastunet.inference.streaming import predict_labels, predict_parts
from fastunet.inference.tiling import field_of, parts_of, stitched
from fastunet.train.checkpoint import RunConfig, load_run
from fastunet.train.config import TILE, too_small
from fastunet.unet import UNet


def load(run: str | Path, device: str | torch.device = "auto") -> Segmenter:
    """Load what `fastunet train` wrote to the folder `run`, onto a device: "auto" is a GPU where there is one.

    Raises:
        DataError: missing or broken files.
        ConfigError: a GPU that is not there.
    """
    model, config = load_run(run)
    has_cuda = torch.cuda.is_available()
    target = torch.device(("cuda" if has_cuda else "cpu") if device == "auto" else device)
    if target.type == "cuda" and not has_cuda:
        raise ConfigError(f"device: expected a CUDA device for {str(device)!r}, got none")
    return Segmenter(model.to(target, memory_format=torch.channels_last), config)  # type: ignore[call-overload]


class Segmenter:
    """A trained U-Net that reads images as it was trained on them; `model` is the net and `config` its run's."""

    def __init__(self, model: UNet, config: RunConfig) -> None:
        self.model, self.config = model, config

    def predict(
        self, image: str | Path | Any, *, tile: int = TILE, tta: bool = False, probabilities: bool = False
    ) -> np.ndarray:
        """Return the mask of an image [H, W]: as the masks of training were, 0 and 255, class indices or other values.

        Args:
            image: a file, a source, or an array [H, W] or [H, W, C] of NumPy, torch or CuPy, in the range of the
                images that were trained on: it is normalised here.
            tile: edge in pixels of the tiles in which larger images go through.
            tta: average eight flips and turns, for eight times the work.
            probabilities: return these instead, float32 [K, H, W].

        Raises:
            DataError: an image that cannot be read, or is of another kind than those of training.
            ConfigError: a tile too small for the net.
        """
        source = image if isinstance(image, Source) else self.source_of(image)
        if not probabilities:
            labels = predict_labels(self.model, source, tile=tile, tta=tta)
            return mask_from_labels(labels.numpy(), self.classes, self.config.data.labels)
        parts = predict_parts(Prediction(self.model, source.size, tile=tile, tta=tta), source)
        return stitched(((part, found.cpu()) for part, found in parts), source.size).numpy()

    @property
    def classes(self) -> int:
        """1 for foreground and background, else the number of classes."""
        return self.config.data.classes

    def sections_of(self, path: Path) -> list[int | None]:
        """Number the images of a file: None of one image, whose pages may be its channels; Zarr arrays are one."""
        count, channels = 1 if is_zarr(path) else count_sections(path), self.config.data.channels
        # As many as channels may be these, unless each has them all.
        is_one = count == 1 or (count == channels and read_image(path, 0).shape[2] != channels)
        return [None] if is_one else list(range(count))

    def source_of(self, image: str | Path | Any, section: int | None = None) -> Source:
        """Open a file, or a section of one, or take an array.

        Raises DataError unless it is an image of the kind that was trained on.
        """
        if isinstance(image, str | os.PathLike):
            source = open_source(Path(image), section)
        elif isinstance(image, Tensor):
            if image.dtype == torch.bfloat16:  # which NumPy does not have
                raise DataError(f"image: expected {self.config.data.dtype}, as in training, got {image.dtype}")
            source = source_of_array(image.detach().cpu().numpy())
        else:
            on_gpu = hasattr(image, "__cuda_array_interface__")
            source = source_of_array(image.get() if on_gpu else np.asarray(image))
        return self.check(source)

    def check(self, source: Source) -> Source:
        """Return the image, a grey one as RGB where both were trained on.

        Raises DataError unless it is of the kind that was trained on, and large enough for the net.
        """
        data, name = self.config.data, source.path or "image"
        if data.mixed and source.shape[2] == 1:
            source = source.as_rgb()
        if source.shape[2] != data.channels:
            raise DataError(f"{name}: expected {data.channels} channels, as in training, got {source.shape[2]}")
        if source.dtype.name != data.dtype:
            raise DataError(f"{name}: expected {data.dtype}, as in training, got {source.dtype.name}")
        if reason := too_small(*source.size, *self._net()):
            raise DataError(f"{name}: {reason}")
        return source

    def check_tile(self, tile: int) -> bool:
        """Whether tiles of that edge give what whole images give. Raises ConfigError on one too small for the net."""
        if reason := too_small(tile, tile, *self._net()):
            raise ConfigError(f"tile: {reason}")
        field = field_of(self.model)
        if field is not None:
            parts_of(tile + 1, tile + 1, tile, field)
        return field is not None

    def write(
        self,
        image: str | Path,
        stem: Path,
        wanted: Wanted,
        *,
        section: int | None = None,
        tile: int = TILE,
        tta: bool = False,
        on_part: Callable[[int, int], None] = lambda done, parts: None,
    ) -> None:
        """Predict an image file, or a section of one, and write what is wanted beside each other: STEM.png and so on.

        Labels and probabilities of TIFF and Zarr are written while they are computed; an overlay and objects need the
        whole image and its labels in memory.
        """
        source = self.source_of(image, section)
        paths = {name: stem.with_name(stem.name + ending) for name, ending in wanted.endings.items()}
        whole = np.empty(source.size, np.uint8) if {"overlay", "objects"} & paths.keys() else None
        prediction = Prediction(self.model, source.size, tile=tile, tta=tta, grid=GRID)
        with ExitStack() as stack:
            writers = {name: stack.enter_context(writer) for name, writer in self._writers(source, paths).items()}
            for done, (part, found) in enumerate(predict_parts(prediction, source), 1):
                labels = labels_of(found).cpu().numpy()
                writers["labels"].put(mask_from_labels(labels, self.classes, self.config.data.labels))
                if "probabilities" in writers:
                    writers["probabilities"].put((found.movedim(0, -1) if self.classes > 1 else found[0]).cpu().numpy())
                if whole is not None:
                    part.of(whole)[...] = labels
                on_part(done, len(prediction.parts))
        if whole is not None:
            self._write_extras(source, whole, wanted, paths)

    def write_volume(
        self,
        image: Path,
        path: Path,
        *,
        tile: int = TILE,
        tta: bool = False,
        on_part: Callable[[int, int], None] = lambda done, parts: None,
    ) -> None:
        """Predict all slices of a NIfTI file, and write their labels as another of the same place in the body."""
        sections, masks = self.sections_of(image), []
        for done, section in enumerate(sections, 1):
            masks.append(self.predict(self.source_of(image, section), tile=tile, tta=tta))
            on_part(done, len(sections))
        write_nifti(path, np.stack(masks), image)

    def _writers(self, source: Source, paths: dict[str, Path]) -> dict[str, Writer]:
        """Return what writes labels and, if wanted, probabilities while they are computed."""
        values = self.config.data.labels
        palette = palette_of(values) if self.classes > 1 or values else None
        labels, probabilities = paths["labels"], paths.get("probabilities")
        kind = WRITERS[labels.suffix[1:]]
        found = {"labels": kind(labels, source.size, dtype_of(values), palette, source.pixel_size)}
        if probabilities is not None:
            kind = WRITERS[probabilities.suffix[1:]]
            shape = (*source.size, self.classes) if self.classes > 1 else source.size
            found["probabilities"] = kind(probabilities, shape, "float32", pixel_size=source.pixel_size)
        return found

    def _write_extras(self, source: Source, labels: np.ndarray, wanted: Wanted, paths: dict[str, Path]) -> None:
        """Write overlay, objects, their table and their outlines, of those that are wanted."""
        image = source.window(0, source.shape[0], 0, source.shape[1])
        if "overlay" in paths:
            save_png(paths["overlay"], overlay_of(image, labels))
        if "objects" in paths:
            find = split_objects if wanted.instances == "watershed" else connected_components
            on = next(self.model.parameters()).device
            objects, count = find(torch.from_numpy(labels).to(on))
            numbers = objects.cpu().numpy().astype(np.uint16 if count < 2**16 else np.uint32)
            with StreamedTiff(paths["objects"], numbers.shape, numbers.dtype, pixel_size=source.pixel_size) as writer:
                writer.put(numbers)
            write_objects(paths["table"], numbers, labels, image)
            if "rois" in paths:
                write_rois(paths["rois"], numbers)

    def _net(self) -> tuple[int, str | None]:
        return len(self.model.config["features"]), self.model.config["norm"]
