"""Decode image files of any format, and sections of stacks, to one kind of picture, and believe no header."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from fastunet.checks import DataError, MissingPackageError
from fastunet.data.picture import DEFLATE, JPEG, LZW, RUNS, Picture, room_for, upright, what_is_there
from fastunet.data.tiff import TIFF, count_planes, decode_tiff
from fastunet.data.volumes import Volume, is_zarr, open_zarr, opener_of

# By content, since a name may say another format than the file has. Opened by their classes and not by Image.open,
# whose limit in pixels refuses real images: what is refused here is what the file cannot hold.
FORMATS: dict[bytes, Callable[..., Any]] = {
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"\xff\xd8\xff": JpegImageFile,  # of a phone, too, whose previews behind the image stay unread
    b"BM": BmpImageFile,
    b"GIF8": GifImageFile,
    b"RIFF": WebPImageFile,
}
HEAD = 352  # bytes that tell the format

PILLOW_EXPANSION = {"PNG": DEFLATE, "GIF": LZW, "JPEG": JPEG}
WEBP_SIDE = 16383  # the format's largest: a lossless WebP of one colour takes 34 bytes at any size
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type


def decode(path: Path, section: int | None = None) -> Picture:
    """Decode one PNG, JPEG, BMP, GIF, WebP, TIFF, NPY, NIfTI or DICOM file, or Zarr array, or one section of it.

    Args:
        section: of a file that holds several; None wants one that holds one image.

    Raises:
        DataError: not a file, unreadable, truncated or of another format; several images; pixels of a kind that is not
            converted; or more pixels than the file can hold, or the memory: found before any is allocated.
        MissingPackageError: the package that reads the format is not installed.
    """
    try:
        picture = _reader_of(path)[1](section)
    except (DataError, MissingPackageError):
        raise
    except MemoryError as error:
        raise DataError(f"{path}: expected an image that fits into memory, got one that does not") from error
    except Exception as error:  # broken files make the decoders raise anything from OSError to struct.error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: expected a readable image, got: {reason}") from error
    if picture.pixels.dtype.kind not in "iuf":
        raise DataError(f"{path}: expected integers or floats, got {picture.pixels.dtype}")
    return picture


def count_sections(path: Path) -> int:
    """Return how many sections a file holds, by its header; 1 of a file that cannot be read, which decoding refuses."""
    try:
        return _reader_of(path)[0]()
    except MissingPackageError:
        raise
    except Exception:
        return 1


def _reader_of(path: Path) -> tuple[Callable[[], int], Callable[[int | None], Picture]]:
    """Return what counts the sections of a file, and what decodes one of them."""
    if path.is_dir() and is_zarr(path):
        return lambda: open_zarr(path).shape[0], lambda section: _decode_volume(path, open_zarr(path), section)
    if not path.is_file():
        raise DataError(f"{path}: expected a file, got {what_is_there(path)}")
    with path.open("rb") as file:
        head = file.read(HEAD)
    if head.startswith(TIFF):
        return lambda: _count_tiff(path), lambda section: decode_tiff(path, section)
    if (opener := next((opener for magic, opener in FORMATS.items() if head.startswith(magic)), None)) is not None:
        return lambda: _count_pillow(path, opener), lambda section: _decode_pillow(path, opener, head, section)
    if (volume := opener_of(path, head)) is not None:
        return lambda: volume(path).shape[0], lambda section: _decode_volume(path, volume(path), section)
    known = "PNG, JPEG, BMP, GIF, WebP, TIFF, NPY, NIfTI or DICOM"
    raise ValueError(f"a file that is not {known}" if head else "an empty file")


def _count_tiff(path: Path) -> int:
    with tifffile.TiffFile(path, is_ome=False, is_mmstack=False, is_ndtiff=False) as tiff:
        count = count_planes(tiff) if len(tiff.series) == 1 else 1
        return count if count <= path.stat().st_size else 1


def _count_pillow(path: Path, opener: Callable[..., Any]) -> int:
    with opener(path) as image:
        return getattr(image, "n_frames", 1)


def _decode_volume(path: Path, volume: Volume, section: int | None) -> Picture:
    sections, *shape = volume.shape
    if sections > 1 and section is None:
        raise DataError(f"{path}: expected one image, got a stack of {sections} sections of {shape[0]} x {shape[1]}")
    bits = 8 * volume.dtype.itemsize
    # All of it where it may be compressed as a whole.
    with room_for(path, volume.shape if volume.expansion > 1 else tuple(shape), bits, volume.claimed, volume.expansion):
        pixels = volume.read(section or 0)
    if pixels.dtype == np.bool_:  # as in files of 1 bit
        pixels, bits = pixels.astype(np.uint8), 1
    return Picture(pixels.astype(pixels.dtype.newbyteorder("="), copy=False), bits)


def _decode_pillow(path: Path, opener: Callable[..., Any], head: bytes, section: int | None) -> Picture:
    with opener(path) as image:
        width, height = image.size
        bits, channels = 8, len(image.getbands())
        if image.format == "PNG":
            bits, channels = head[24], PNG_CHANNELS.get(head[25], 4)
        elif image.mode == "1":
            bits = 1
        rows = height * -(-width * channels * bits // 8)
        expansion = PILLOW_EXPANSION.get(image.format, 1)
        if image.format == "PNG":
            rows += height  # a byte in each says how it is filtered
        elif image.format == "BMP" and image.tile[0][0] == "raw":
            rows = height * image.tile[0][3][1]
        elif image.format == "BMP":
            expansion = RUNS
        elif image.format == "WEBP" and max(image.size) <= WEBP_SIDE:
            expansion = rows
        with room_for(path, (height, width, channels), bits, rows, expansion):
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and section is None:
                raise DataError(f"{path}: expected one image, got {frames} frames")
            if frames > 1 and bits == 16:
                raise ValueError(f"{frames} frames of 16 bits, of which only the first is decoded")
            if frames > 1:
                image.seek(section)
            if bits == 16:  # of which Pillow keeps only the upper 8 if they have colour
                pixels = np.atleast_3d(imagecodecs.png_decode(path.read_bytes()))
                picture = Picture(pixels, 16, alpha=pixels.shape[2] - 1 if pixels.shape[2] in (2, 4) else None)
            else:
                picture = _loaded(image, bits)
            return replace(picture, pixels=upright(picture.pixels, image.getexif().get(274)))


def _loaded(image: Image.Image, bits: int) -> Picture:
    """Take the pixels out of an image that Pillow has opened, with `bits` to each value in the file."""
    image.load()
    if image.mode == "P":
        image.apply_transparency()
        colours = np.array(image.getpalette("RGBA"), np.uint8).reshape(-1, 4)
        palette = np.concatenate([colours, np.full((256 - len(colours), 4), (0, 0, 0, 255), np.uint8)])
        return Picture(np.asarray(image)[..., None], bits, palette if (colours[:, 3] < 255).any() else palette[:, :3])
    if image.mode in ("CMYK", "YCbCr"):
        image = image.convert("RGB")
    pixels = np.atleast_3d(np.asarray(image))
    if bits == 1:
        pixels = pixels.astype(np.uint8)
    elif bits < 8:
        pixels = pixels // _scale(bits)  # Pillow spreads 2 and 4 bits over 0 to 255
    bands = image.getbands()
    return Picture(pixels, bits, None, bands.index("A") if "A" in bands else None, image.info.get("transparency"))


def _scale(bits: int) -> np.uint8:
    """Give the factor from values of 1, 2 or 4 bits to 0..255."""
    return np.uint8(255 // (2**bits - 1))


def spread(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Spread values of 1, 2 or 4 bits over 0 to 255; others stay."""
    return pixels * _scale(bits) if bits in (1, 2, 4) else pixels
