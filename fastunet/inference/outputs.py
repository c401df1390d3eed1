"""What predictions leave: labels, probabilities, overlays and objects, each whole under its name or not at all."""

from __future__ import annotations

import csv
import gzip
import math
import queue
import re
import shutil
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import tifffile

from fastunet.checks import DataError
from fastunet.data.labels import codes_of
from fastunet.data.layout import Value
from fastunet.data.sources import ZARR, PixelSize
from fastunet.files import SOFTWARE, is_our_png, save_png, written_whole

# Okabe and Ito's colours, which stay apart for colour-blind readers; class 0 is black.
CLASS_COLOURS = (
    (255, 255, 255), (230, 159, 0), (204, 121, 167), (0, 114, 178), (153, 153, 153), (240, 228, 66), (86, 180, 233),
    (0, 158, 115),
)  # fmt: skip
STRETCH = (0.5, 99.5)  # percentiles of an image that are shown as black and white
GRID = 256  # edge of the tiles of a TIFF and of the chunks of a Zarr array
PROPERTIES = (
    "label", "area", "centroid", "bbox", "perimeter", "eccentricity", "orientation", "axis_major_length",
    "axis_minor_length", "solidity",
)  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What to write of a prediction, beside the labels in a file of `kind`: png, tif, zarr, or nii.gz alone."""

    kind: str = "png"
    probabilities: bool = False
    overlay: bool = False
    instances: str = "none"
    rois: bool = False

    @property
    def endings(self) -> dict[str, str]:
        """Return what follows the image's stem in the name of each file."""
        found = {"labels": f".{self.kind}"}
        if self.probabilities:
            found["probabilities"] = f"_probabilities.{'tif' if self.kind == 'png' else self.kind}"
        if self.overlay:
            found["overlay"] = "_overlay.png"
        if self.instances != "none":
            found |= {"objects": "_objects.tif", "table": "_objects.csv"}
        return found | ({"rois": "_objects.zip"} if self.rois else {})


def class_palette() -> np.ndarray:
    """Return the colours of labels 0 to 255, uint8 [256, 3]."""
    colours = np.array(CLASS_COLOURS, np.uint8)
    return np.concatenate([np.zeros((1, 3), np.uint8), colours[np.arange(255) % len(colours)]])


def palette_of(values: Sequence[Value]) -> np.ndarray | None:
    """Return the colours of a mask with these values for the classes: colours are their own; none beyond 8 bits."""
    palette = class_palette()
    if not values:
        return palette
    if isinstance(values[0], tuple):
        palette[: len(values)] = values
        return palette
    places = codes_of(values)
    if places.min() < 0 or places.max() > 255:
        return None
    palette[places] = palette[: len(values)].copy()
    return palette


def is_ours(path: Path) -> bool:
    """Whether fastunet wrote this file of predictions, as its own mark in it says."""
    try:
        if path.suffix == ".png":
            return is_our_png(path)
        if path.suffix == ".tif":
            with tifffile.TiffFile(path) as tiff:
                return tiff.pages[0].tags.valueof(305) == SOFTWARE
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                return archive.comment == SOFTWARE.encode()
        if path.suffix == ".gz":
            import nibabel

            return bytes(nibabel.Nifti1Image.from_filename(path).header["descrip"].item()) == SOFTWARE.encode()
        if path.suffix == ZARR:
            import zarr

            # It goes as a whole: what else lies in it is somebody's.
            entries = (each.relative_to(path).as_posix() for each in path.rglob("*"))
            is_all_zarr = all(re.fullmatch(r"zarr\.json|c(/\d+)*", entry) for entry in entries)
            return is_all_zarr and zarr.open(str(path), mode="r").attrs.get("software") == SOFTWARE
        from skimage.measure import regionprops_table

        names = list(regionprops_table(np.zeros((1, 1), int), properties=PROPERTIES))
        with path.open(newline="") as file:
            return next(csv.reader(file))[: len(names)] == names
    except Exception:  # of another kind, or broken: its reader raises anything
        return False


class Writer:
    """An image that is written while its rows come in: whole when a `with` block ends, not at all when it raises.

    Args:
        shape, dtype: of the whole image, [H, W] or [H, W, K].
        palette: colours uint8 [256, 3] of an image of labels.
        pixel_size: is kept, where the format has a place for it.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype: Any,
        palette: np.ndarray | None = None,
        pixel_size: PixelSize | None = None,
    ) -> None:
        self.path, self.shape, self.dtype, self.palette, self.pixel_size = path, shape, dtype, palette, pixel_size
        self._parts: list[np.ndarray] = []
        self._bands: queue.Queue[np.ndarray | None] = queue.Queue(2)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def put(self, part: np.ndarray) -> None:
        """Take the next pixels, [h, w] or [h, w, K]: whole rows, or parts of them from left to right.

        Raises what writing has raised: hours of prediction are not to go to a disk that is full.
        """
        if self._error is not None:
            raise self._error
        self._parts.append(part)
        if sum(part.shape[1] for part in self._parts) == self.shape[1]:
            self._bands.put(np.concatenate(self._parts, 1))
            self._parts.clear()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bands.put(None)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._write()
        except BaseException as error:  # raised where the block ends
            self._error = error
            while self._bands.get() is not None:
                pass

    def _write(self) -> None:
        """Write what `_rows` gives, in the thread."""
        raise NotImplementedError

    def _rows(self) -> Iterator[np.ndarray]:
        """Give bands of a multiple of 256 rows, and the rest.

        Raises DataError where the rows end too early, so that nothing is left of what was written.
        """
        done, waiting = 0, np.empty((0, *self.shape[1:]), self.dtype)
        while (band := self._bands.get()) is not None:
            done += len(band)
            waiting = np.concatenate([waiting, band])
            whole = len(waiting) // GRID * GRID
            yield waiting[:whole]
            waiting = waiting[whole:]
        self._bands.put(None)  # for `_run`, where what follows fails
        if done < self.shape[0]:
            raise DataError(f"{self.path}: expected {self.shape[0]} rows, got {done}")
        yield waiting


class StreamedTiff(Writer):
    """A tiled TIFF."""

    def _write(self) -> None:
        options: dict[str, Any] = {"photometric": "minisblack"}
        if self.palette is not None:
            options = {"photometric": "palette", "colormap": self.palette.T.astype(np.uint16) * 257}
        if len(self.shape) == 3:
            options |= {"planarconfig": "contig", "extrasamples": ["unspecified"] * (self.shape[2] - 1)}
        with written_whole(self.path) as temporary:
            tifffile.imwrite(
                temporary,
                self._tiles(),
                shape=self.shape,
                dtype=self.dtype,
                tile=(GRID, GRID),
                compression="deflate",
                software=SOFTWARE,
                bigtiff=math.prod(self.shape) * np.dtype(self.dtype).itemsize > 2**31,
                **options,
                **_resolution(self.pixel_size),
            )

    def _tiles(self) -> Iterator[np.ndarray]:
        for band in self._rows():
            for top in range(0, len(band), GRID):
                for left in range(0, self.shape[1], GRID):
                    tile = np.zeros((GRID, GRID, *self.shape[2:]), self.dtype)
                    pixels = band[top : top + GRID, left : left + GRID]
                    tile[: pixels.shape[0], : pixels.shape[1]] = pixels
                    yield tile


def _resolution(size: PixelSize | None) -> dict[str, Any]:
    """Return the tags for a size of pixels: as inch or cm where it is, else as ImageJ's unit."""
    if size is None or max(1 / size.x, 1 / size.y) >= 2**32:  # more than a TIFF can say
        return {"metadata": None}
    resolution = (1 / size.x, 1 / size.y)
    if size.unit in ("inch", "cm"):
        unit = {"inch": "INCH", "cm": "CENTIMETER"}[size.unit]
        return {"resolution": resolution, "resolutionunit": unit, "metadata": None}
    unit = "".join(each if each.isascii() else f"\\u{ord(each):04X}" for each in size.unit)
    description = f"ImageJ=1.11a\nunit={unit}\n"
    return {"resolution": resolution, "resolutionunit": "NONE", "description": description, "metadata": None}


class StreamedZarr(Writer):
    """A Zarr array."""

    def _write(self) -> None:
        import zarr

        partial = self.path.with_name(f".{self.path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            chunks = tuple(min(GRID, side) for side in self.shape[:2]) + self.shape[2:]
            array = zarr.create_array(str(partial), shape=self.shape, dtype=self.dtype, chunks=chunks)
            array.attrs["software"] = SOFTWARE
            if (size := self.pixel_size) is not None:
                array.attrs["pixel_size"] = [size.y, size.x, size.unit]
            row = 0
            for band in self._rows():
                array[row : row + len(band)] = band
                row += len(band)
            if self.path.exists():
                shutil.rmtree(self.path)
            partial.rename(self.path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


class WholePng(Writer):
    """A PNG, which is written at once when all rows have come."""

    def _write(self) -> None:
        save_png(self.path, np.concatenate(list(self._rows())), self.palette)


WRITERS: dict[str, type[Writer]] = {"png": WholePng, "tif": StreamedTiff, "zarr": StreamedZarr}


def write_nifti(path: Path, masks: np.ndarray, like: Path) -> None:
    """Write masks [N, H, W] as NIfTI with the axes, affine and units of the file they were predicted on."""
    import nibabel

    source: Any = nibabel.load(like)
    volume = masks.transpose(2, 1, 0)
    image = nibabel.Nifti1Image(volume if len(source.shape) > 2 else volume[..., 0], source.affine)
    for name in ("qform", "sform"):
        getattr(image, f"set_{name}")(source.affine, int(source.header[f"{name}_code"]))
    image.header.set_xyzt_units(*source.header.get_xyzt_units())
    image.header["descrip"] = SOFTWARE.encode()
    with written_whole(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes()))


def displayable(image: np.ndarray) -> np.ndarray:
    """Stretch an image [H, W, C] of any dtype to RGB in 0..1; of other than 3 channels the first is shown."""
    shown = image if image.shape[2] == 3 else image[..., :1]
    low, high = map(float, np.percentile(shown, STRETCH))
    scaled = np.clip((shown.astype(np.float32) - low) / max(high - low, float(np.finfo(np.float32).tiny)), 0, 1)
    return np.broadcast_to(scaled, (*image.shape[:2], 3))


def overlay_of(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return an image [H, W, C], stretched to what is visible, its labels [H, W] in colour: [H, W, 3]."""
    from skimage.color import label2rgb

    # label2rgb colours labels by their rank among those it meets. Not white, which is an image's own.
    present = np.unique(labels[labels > 0]).astype(int)
    colours = class_palette()[2:][(present - 1) % 254] / 255
    picture = label2rgb(labels, displayable(image), colors=colours.tolist(), alpha=0.4, bg_label=0, saturation=1)
    return (picture * 255).round().astype(np.uint8)


def write_objects(path: Path, objects: np.ndarray, labels: np.ndarray, image: np.ndarray) -> None:
    """Write a CSV with a row for each object: `skimage.measure.regionprops` in pixels, its class, mean intensities.

    Args:
        objects: numbers [H, W] from 1, 0 outside.
        labels: class of each pixel, [H, W].
        image: [H, W, C].
    """
    from skimage.measure import regionprops_table

    table = regionprops_table(objects, image, properties=(*PROPERTIES, "intensity_mean"))
    table["class"] = regionprops_table(objects, labels, properties=("intensity_max",))["intensity_max"].astype(int)
    with written_whole(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*(column.tolist() for column in table.values()), strict=True))


def write_rois(path: Path, objects: np.ndarray) -> None:
    """Write the outlines of objects [H, W], holes filled, as a zip of ROIs for ImageJ, named by their numbers."""
    from roifile import ImagejRoi, roiwrite
    from scipy.ndimage import binary_fill_holes
    from skimage.measure import find_contours, regionprops

    rois = []
    for region in regionprops(objects):
        filled = binary_fill_holes(np.pad(region.image, 1)).astype(float)
        (outline,) = find_contours(filled, 0.5, fully_connected="high")
        # ImageJ's coordinates are (x, y), and count from a pixel's corner.
        points = outline[:, ::-1] + np.array(region.bbox[1::-1]) - 0.5
        rois.append(ImagejRoi.frompoints(points, name=str(region.label)))
    with written_whole(path) as temporary:
        temporary.unlink()
        roiwrite(temporary, rois)
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.comment = SOFTWARE.encode()
