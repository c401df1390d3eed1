"""Decode TIFF: whichever axes its pages are, and whatever its values stand for."""

from __future__ import annotations

import logging
import math
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image
from tifffile import COMPRESSION, PHOTOMETRIC

from fastunet.checks import DataError
from fastunet.data.picture import BLANK, DEFLATE, JPEG, LZW, PACKBITS, Picture, room_for, upright

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TIFF_EXPANSION = {
    COMPRESSION.NONE: 1,
    COMPRESSION.PACKBITS: PACKBITS,
    COMPRESSION.LZW: LZW,
    COMPRESSION.DEFLATE: DEFLATE,
    COMPRESSION.ADOBE_DEFLATE: DEFLATE,
    COMPRESSION.JPEG: JPEG,
}
GREY_OR_RGB = (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB, PHOTOMETRIC.MASK)
CONVERTED = {PHOTOMETRIC.SEPARATED: ("CMYK", 4), PHOTOMETRIC.YCBCR: ("YCbCr", 3)}  # by Pillow: its mode and channels
JPEGS = (COMPRESSION.JPEG, COMPRESSION.OJPEG)
ALPHA_SAMPLES = (1, 2)  # TIFF's ExtraSamples: associated and unassociated alpha

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what matters of its log is raised here


def decode_tiff(path: Path, section: int | None) -> Picture:
    """Decode the one image of a TIFF, or one of its sections; see `fastunet.data.decoding.decode`."""
    # Without the readers of formats that span files: one of several files is to read as what it holds itself.
    with tifffile.TiffFile(path, is_ome=False, is_mmstack=False, is_ndtiff=False) as tiff:
        if len(tiff.series) != 1:
            raise DataError(f"{path}: expected one image, got {len(tiff.series)} images of different shapes")
        series = tiff.series[0]
        page = series.keyframe
        if page.dtype is None or any(each is None for each in series.pages):
            raise ValueError(f"values of {page.bitspersample} bits" if page.dtype is None else "missing pages")
        bits = page.bitspersample if isinstance(page.bitspersample, int) else 8 * series.dtype.itemsize
        tile = page.tilewidth * page.tilelength * page.tiledepth * page.samplesperpixel if page.is_tiled else 0
        claimed = -(-max(series.size, page.size, tile) * bits // 8)
        kept = [(axis, size) for axis, size in zip(series.axes, series.shape, strict=True) if size != 1 or axis in "YX"]
        axes = "".join(axis for axis, _ in kept)
        shape = tuple(size for _, size in kept)
        needed = shape if section is None or len(series.pages) == 1 else page.shape
        with room_for(path, needed, bits, claimed, TIFF_EXPANSION.get(page.compression, BLANK)):
            other = axes.replace("Y", "").replace("X", "")
            # Q is tifffile's name for an axis without meaning: as one image, of length 3 or 4, it is rather colour.
            is_channel = other in ("", "S", "C") or (other == "Q" and series.shape[series.axes.index("Q")] in (3, 4))
            is_channel = is_channel or (other == "I" and [axis for axis, size in _lead_axes(tiff) if size > 1] == ["C"])
            if section is None and not is_channel:
                count = count_planes(tiff)
                raise DataError(
                    f"{path}: expected one image, got a stack of shape {series.shape} (axes {series.axes}), which is "
                    f"{count} sections: save each slice as a file of its own"
                )
            if section is None:
                for each in series.pages:
                    check_segments(tiff, each)
                pixels = series.asarray().reshape(shape)
                pixels = np.moveaxis(pixels, axes.index(other), -1) if other else pixels[..., None]
            else:
                pixels, other = _section_of(tiff, section), "S" if "S" in axes else ""
        picture = _interpret_tiff(path, page, pixels, bits, separate=other == "S", keeps_values=tiff.is_imagej)
        return replace(picture, pixels=upright(picture.pixels, page.tags.valueof(274)))


def count_planes(tiff: tifffile.TiffFile) -> int:
    """Return how many sections the one series of a TIFF has."""
    return math.prod(size for axis, size in _lead_axes(tiff) if axis != "C")


def _lead_axes(tiff: tifffile.TiffFile) -> list[tuple[str, int]]:
    """Give the axes of planes and their sizes, the slowest first.

    C, of OME's too, are channels; all else, such as an unnamed one, are sections.
    """
    series = tiff.series[0]
    lead = [(axis, size) for axis, size in zip(series.axes, series.shape, strict=True) if axis not in "YXS"]
    is_ome = series.keyframe.is_ome and [axis for axis, _ in lead] == ["I"]
    return _ome_axes(series.keyframe, lead[0][1]) if is_ome else lead


def _ome_axes(page: tifffile.TiffPage, count: int) -> list[tuple[str, int]]:
    """Give the axes of the pages as OME's XML names them, the slowest first; one of sections where it does not fit."""
    found = dict(re.findall(r'\b(DimensionOrder|SizeC|SizeZ|SizeT)="(\w+)"', page.description))
    order = found.get("DimensionOrder", "XYCZT")[:1:-1]
    axes = [(axis, int(found.get(f"Size{axis}", "1"))) for axis in order]
    # Where all are channels, their numbers are in order too.
    places = ("IFD", "FirstC") if ("C", count) in axes else ("IFD",)
    listed = [[*map(int, re.findall(rf'\b{place}="(\d+)"', page.description))] for place in places]
    if math.prod(size for _, size in axes) != count or any(each != sorted(each) for each in listed):
        return [("I", count)]
    return axes


def _section_of(tiff: tifffile.TiffFile, section: int) -> np.ndarray:
    """Read [H, W, C] of one section, and no other where each plane is a page."""
    series, lead = tiff.series[0], _lead_axes(tiff)
    planes = np.arange(math.prod(size for _, size in lead)).reshape([size for _, size in lead])
    channel = [place for place, (axis, _) in enumerate(lead) if axis == "C"]
    planes = np.moveaxis(planes, channel[0], -1) if channel else planes[..., None]
    planes = planes.reshape(-1, planes.shape[-1])
    axes = [axis for axis in series.axes if axis in "YXS"]
    size = [series.shape[series.axes.index(axis)] for axis in axes]
    if len(series.pages) == planes.size:
        for plane in planes[section]:
            check_segments(tiff, series.pages[int(plane)])
        pages = [series.pages[int(plane)].asarray().reshape(size) for plane in planes[section]]
    else:  # in one piece
        for page in series.pages:
            check_segments(tiff, page)
        whole = series.asarray().reshape(-1, *size)
        pages = [whole[plane] for plane in planes[section]]
    pages = [page[..., None] if "S" not in axes else np.moveaxis(page, axes.index("S"), -1) for page in pages]
    return np.concatenate(pages, -1)


def check_segments(tiff: tifffile.TiffFile, page: Any) -> None:
    """Refuse strips and tiles that are missing or cut off, or that are JPEGs larger than their place."""
    key = page.keyframe
    expected = math.prod(key.chunked)
    if len(page.dataoffsets) < expected and not key.is_contiguous:
        raise ValueError(f"{len(page.dataoffsets)} strips or tiles, of {expected}")
    if key.compression == COMPRESSION.NONE:  # whose sizes some programs write wrong; reading finds what is missing
        return
    size = tiff.filehandle.size
    place = (key.tilelength, key.tilewidth) if key.is_tiled else (key.rowsperstrip, key.imagewidth)
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        if offset + count > size:
            raise ValueError(f"a file that ends at byte {size}, before the end of its pixels at {offset + count}")
        if key.compression in JPEGS:
            tiff.filehandle.seek(offset)
            height, width = _jpeg_size(tiff.filehandle.read(count))
            if height > place[0] + 15 or width > place[1] + 15:  # blocks may reach beyond
                raise ValueError(f"a JPEG of {height} x {width} as a part of {place[0]} x {place[1]}")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Give height and width of the frame header, zeros where there is none."""
    position = 2
    while position + 9 <= len(data):
        marker, length = struct.unpack_from(">HH", data, position)
        if 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):
            return struct.unpack_from(">HH", data, position + 5)
        position += 1 if marker == 0xFFFF else 2 + length
    return 0, 0


def _interpret_tiff(
    path: Path, page: tifffile.TiffPage, pixels: np.ndarray, bits: int, *, separate: bool, keeps_values: bool
) -> Picture:
    """Give pixels [H, W, C] the meaning that PhotometricInterpretation and ExtraSamples give them.

    Args:
        separate: C are the samples of a pixel, rather than pages.
        keeps_values: ImageJ's files, which turn only the display of a mask by MinIsWhite, and not its values.
    """
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8)
    photometric = page.photometric if 262 in page.tags else PHOTOMETRIC.MINISBLACK
    if photometric == PHOTOMETRIC.YCBCR and page.compression in JPEGS:
        photometric = PHOTOMETRIC.RGB  # converted with the JPEG
    extra = list(page.extrasamples) if separate else []
    channels = pixels.shape[2] - len(extra)
    alpha = next((channels + index for index, kind in enumerate(extra) if kind in ALPHA_SAMPLES), None)
    if photometric == PHOTOMETRIC.PALETTE and pixels.shape[2] == 1 and pixels.dtype.kind == "u":
        return Picture(pixels, bits, _colours(page.colormap.T))
    if pixels.shape[2] == CONVERTED.get(photometric, ("", 0))[1] and pixels.dtype == np.uint8:
        image = Image.fromarray(np.ascontiguousarray(pixels), CONVERTED[photometric][0])
        return Picture(np.asarray(image.convert("RGB")), bits)
    if photometric in GREY_OR_RGB:
        if photometric == PHOTOMETRIC.MINISWHITE and pixels.dtype.kind == "u" and not keeps_values:
            colour = pixels[..., :channels]
            np.subtract(pixels.dtype.type(2**bits - 1), colour, out=colour)
        return Picture(pixels, bits, alpha=alpha)
    raise DataError(
        f"{path}: expected grey, RGB, or a palette, CMYK or YCbCr of 8 bits, got "
        f"{getattr(photometric, 'name', photometric)} of {pixels.shape[2]} channels in {pixels.dtype}: save it as RGB"
    )


def _colours(table: np.ndarray) -> np.ndarray:
    """Turn a TIFF's colour map [N, 3] of 16 bits into uint8 where 8 bits were meant, as most programs write them."""
    if table.max() < 256:
        return table.astype(np.uint8)  # written as 8 bits
    upper = table >> 8
    is_8_bit = not (table & 255).any() or (table == upper * 257).all()
    return upper.astype(np.uint8) if is_8_bit else table
