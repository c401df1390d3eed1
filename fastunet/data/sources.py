"""Images that are read in windows: large TIFFs and Zarr arrays from the disk, all others from memory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from tifffile import COMPRESSION, PHOTOMETRIC

from fastunet.checks import DataError
from fastunet.data.images import read_image
from fastunet.data.picture import BLANK
from fastunet.data.tiff import ALPHA_SAMPLES, TIFF, TIFF_EXPANSION, check_segments
from fastunet.data.volumes import is_zarr, zarr_array

ZARR = ".zarr"
LARGE = 2**26  # bytes of pixels from which a TIFF is read in windows
DTYPES = ("uint8", "uint16", "float32")


@dataclass(frozen=True)
class PixelSize:
    """The edges of a pixel, as a file says them: width and height, in a unit such as "µm" or "inch"."""

    x: float
    y: float
    unit: str


@dataclass(frozen=True)
class Source:
    """An image [H, W, C] of uint8, uint16 or float32 that is read in windows, as slices of rows and columns ask."""

    path: Path | None
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    read: Callable[[slice, slice], np.ndarray]
    rows: int = 1  # that are stored together: whoever reads bands takes as many, or a multiple
    pixel_size: PixelSize | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.shape[:2]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.window(rows.start, rows.stop, 0, self.shape[1])

    def as_rgb(self) -> Source:
        """Return a grey image as RGB, of equal channels."""
        return replace(self, shape=(*self.size, 3), read=lambda *window: np.repeat(self.read(*window), 3, -1))

    def window(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Read [bottom - top, right - left, C]. Raises DataError on values that are not finite, or cannot be read."""
        try:
            pixels = self.read(slice(top, bottom), slice(left, right))
        except Exception as error:  # of broken files decoders raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{self.path}: expected readable pixels, got: {reason}") from error
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise DataError(f"{self.path}: expected finite values, got NaN or infinity")
        return pixels


def source_of_array(pixels: np.ndarray, path: Path | None = None, pixel_size: PixelSize | None = None) -> Source:
    """Give an image in memory, [H, W] or [H, W, C], as a source.

    Raises:
        DataError: other dimensions, no pixels, or other dtypes than uint8, uint16 and float32.
    """
    if pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise DataError(f"image: expected [H, W] or [H, W, C] with pixels, got shape {list(pixels.shape)}")
    if pixels.dtype.name not in DTYPES:
        raise DataError(f"image: expected {', '.join(DTYPES)}, got {pixels.dtype}")
    image = pixels if pixels.ndim == 3 else pixels[..., None]
    return Source(path, image.shape, image.dtype, lambda rows, columns: image[rows, columns], 1, pixel_size)


def open_source(path: str | Path, section: int | None = None) -> Source:
    """Open an image: a Zarr array, or any file that `read_image` reads, or a section of one.

    TIFFs above 64 MiB of plain pixels (grey or RGB of 8 or 16 bits, or float32; upright, without alpha) are read in
    windows, others at once. Of an OME-Zarr group the largest resolution is taken.

    Raises:
        DataError: as `read_image`; a Zarr array that is not [Y, X], [C, Y, X] or [Y, X, C] of these dtypes.
    """
    path = Path(path)
    if section is None:
        if path.suffix.lower() == ZARR or is_zarr(path):
            return _open_zarr(path)
        if path.is_file() and (source := _open_large_tiff(path)) is not None:
            return source
    return source_of_array(read_image(path, section), path, pixel_size_of(path))


def _open_zarr(path: Path) -> Source:
    found = zarr_array(path)
    kept = [axis for axis, length in enumerate(found.shape) if length != 1 or axis >= found.ndim - 2]
    if len(kept) not in (2, 3) or 0 in found.shape or found.dtype.name not in DTYPES:
        raise DataError(
            f"{path}: expected [Y, X], [C, Y, X] or [Y, X, C] of {', '.join(DTYPES)}, got shape {found.shape} of "
            f"{found.dtype}"
        )
    # There are fewer channels than columns, wherever their axis is.
    channel = None if len(kept) == 2 else kept[0] if found.shape[kept[0]] <= found.shape[kept[2]] else kept[2]
    y, x = (axis for axis in kept if axis != channel)

    def read(rows: slice, columns: slice) -> np.ndarray:
        index: list[Any] = [0] * found.ndim
        index[y], index[x] = rows, columns
        if channel is not None:
            index[channel] = slice(None)
        pixels = np.asarray(found[tuple(index)])
        if channel is None:
            return pixels[..., None]
        return pixels if channel > x else np.moveaxis(pixels, 0, -1)

    channels = 1 if channel is None else found.shape[channel]
    return Source(path, (found.shape[y], found.shape[x], channels), found.dtype, read, found.chunks[y])


def _open_large_tiff(path: Path) -> Source | None:
    """Open a large TIFF of plain pixels; None for any other file, which is then decoded at once."""
    with path.open("rb") as file:
        if not file.read(4).startswith(TIFF):
            return None
    try:
        with tifffile.TiffFile(path, is_ome=False, is_mmstack=False, is_ndtiff=False) as tiff:
            if len(tiff.series) != 1 or len(tiff.series[0].pages) != 1:
                return None
            series: Any = tiff.series[0]
            page = series.keyframe
            size = math.prod(series.shape) * series.dtype.itemsize
            if size < LARGE or not _is_plain(page, series.axes, str(series.dtype)):
                return None
            if size > path.stat().st_size * TIFF_EXPANSION.get(page.compression, BLANK):
                return None  # refused where it is decoded
            check_segments(tiff, page)
            rows = page.tilelength if page.is_tiled else page.rowsperstrip
        import zarr

        pixels: Any = zarr.open(_as_zarr(path), mode="r")
    except Exception:  # what is wrong with it is said where it is decoded
        return None
    planar = series.axes == "SYX"
    shape = (*series.shape[1:], series.shape[0]) if planar else (*series.shape, 1)[:3]

    def read(rows: slice, columns: slice) -> np.ndarray:
        window = np.asarray(pixels[(slice(None), rows, columns) if planar else (rows, columns)])
        return np.moveaxis(window, 0, -1) if planar else window if window.ndim == 3 else window[..., None]

    return Source(path, shape, np.dtype(series.dtype.name), read, min(rows, shape[0]), pixel_size_of(path))


def _as_zarr(path: Path) -> Any:
    """Open the pixels of a TIFF, of a pyramid those of the largest level."""
    return tifffile.imread(path, aszarr=True, level=0, is_ome=False, is_mmstack=False, is_ndtiff=False)


def _is_plain(page: Any, axes: str, dtype: str) -> bool:
    """Whether the stored values are the image's, in a codec that decodes windows."""
    return (
        axes in ("YX", "YXS", "SYX")
        and dtype in DTYPES
        and page.photometric in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB)
        and page.tags.valueof(274, default=1) == 1
        and page.compression not in (COMPRESSION.JPEG, COMPRESSION.OJPEG)
        and not any(kind in ALPHA_SAMPLES for kind in page.extrasamples)
    )


def pixel_size_of(path: Path) -> PixelSize | None:
    """Return the size of a TIFF's pixels as OME, ImageJ or its resolution tags say it; None where nothing does."""
    try:
        with tifffile.TiffFile(path) as tiff:
            page: Any = tiff.pages[0]
            if tiff.is_ome:
                pixels: Any = tifffile.xml2dict(tiff.ome_metadata or "")["OME"]["Image"]
                pixels = (pixels[0] if isinstance(pixels, list) else pixels)["Pixels"]
                if "PhysicalSizeX" in pixels:
                    x, y = (float(pixels[f"PhysicalSize{axis}"]) for axis in "XY")
                    return _size_of(x, y, pixels.get("PhysicalSizeXUnit", "µm"))
            (a, b), (c, d) = page.tags["XResolution"].value, page.tags["YResolution"].value
            unit = {2: "inch", 3: "cm"}.get(page.tags.valueof("ResolutionUnit"), "")
            if tiff.is_imagej:
                unit = str((tiff.imagej_metadata or {}).get("unit", unit))
                unit = re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), unit)
                unit = {"micron": "µm"}.get(unit, unit)
            return _size_of(b / a, d / c, unit) if a and c else None
    except Exception:  # nothing else depends on it
        return None


def _size_of(x: float, y: float, unit: str) -> PixelSize | None:
    return PixelSize(x, y, unit) if unit and 0 < x < math.inf and 0 < y < math.inf else None
