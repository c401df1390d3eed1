"""Decode image files of any format to one kind of picture, and believe no header: tifffile for TIFF, else Pillow."""

from __future__ import annotations

import logging
import math
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import psutil
import tifffile
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from tifffile import COMPRESSION, PHOTOMETRIC

from fastunet.checks import DataError

# By content, since a name may say another format than the file has. Opened by their classes and not by Image.open,
# whose limit in pixels refuses real images: what is refused here is what the file cannot hold.
FORMATS: dict[bytes, Callable[..., Any]] = {
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"\xff\xd8\xff": JpegImageFile,  # of a phone, too, whose previews behind the image stay unread
    b"BM": BmpImageFile,
    b"GIF8": GifImageFile,
    b"RIFF": WebPImageFile,
}
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Bytes of pixels that a byte of the file can stand for, at most: DEFLATE's longest match is 258 bytes in 2 bits; an LZW
# code of 12 bits stands for less than 4096; PackBits repeats 128 in 2; a baseline JPEG has a bit for each 8x8 block or
# more, and at most 18 blocks for 32x32 pixels of 3 channels; BMP's runs are of 255 in 2.
DEFLATE, LZW, PACKBITS, JPEG, RUNS = 1032, 2731, 64, 1366, 128
# Codecs that write a blank tile, or row, in a few bits. What they claim beyond is refused for the machine's memory.
BLANK = 2**16
PILLOW_EXPANSION = {"PNG": DEFLATE, "GIF": LZW, "JPEG": JPEG}
WEBP_SIDE = 16383  # the format's largest: a lossless WebP of one colour takes 34 bytes at any size
TIFF_EXPANSION = {
    COMPRESSION.NONE: 1,
    COMPRESSION.PACKBITS: PACKBITS,
    COMPRESSION.LZW: LZW,
    COMPRESSION.DEFLATE: DEFLATE,
    COMPRESSION.ADOBE_DEFLATE: DEFLATE,
    COMPRESSION.JPEG: JPEG,
}
GREY_OR_RGB = (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB, PHOTOMETRIC.MASK)
CONVERTED = {
    PHOTOMETRIC.SEPARATED: ("CMYK", 4),
    PHOTOMETRIC.YCBCR: ("YCbCr", 3),
}  # by Pillow, with its mode and channels
JPEGS = (COMPRESSION.JPEG, COMPRESSION.OJPEG)
ALPHA_SAMPLES = (1, 2)  # TIFF's ExtraSamples: associated and unassociated alpha
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
COPIES = 4  # of an image that decoding holds at its peak, at most
LARGE = 2**28  # bytes: above, one image is decoded at a time, since each thread alone would find the memory free
_one_large = threading.Lock()

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what matters of its log is raised here


@dataclass(frozen=True)
class Picture:
    """One decoded image."""

    pixels: np.ndarray  # [H, W, C], upright, the file's values with 0 as black; of a palette, the indices [H, W, 1]
    bits: int  # of each value
    palette: np.ndarray | None = None  # colours [N, 3], or [N, 4] with alpha
    alpha: int | None = None  # which of the C channels is alpha
    hidden: Any = None  # the colour [C] that stands for full transparency


def decode(path: Path) -> Picture:
    """Decode one PNG, JPEG, BMP, GIF, WebP or TIFF file.

    Raises:
        DataError: not a file, unreadable, truncated or of another format; several images; pixels of a kind that is not
            converted; or more pixels than the file can hold, or the memory: found before any is allocated.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path}: expected a file, got {what_is_there(path)}")
        with path.open("rb") as file:
            head = file.read(26)
        if head.startswith(TIFF):
            picture = _decode_tiff(path)
        else:
            opener = next((opener for magic, opener in FORMATS.items() if head.startswith(magic)), None)
            if opener is None:
                raise ValueError("a file that is not PNG, JPEG, BMP, GIF, WebP or TIFF" if head else "an empty file")
            picture = _decode_pillow(path, opener, head)
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{path}: expected an image that fits into memory, got one that does not") from error
    except Exception as error:  # broken files make the decoders raise anything from OSError to struct.error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: expected a readable image, got: {reason}") from error
    if picture.pixels.dtype.kind not in "iuf":
        raise DataError(f"{path}: expected integers or floats, got {picture.pixels.dtype}")
    return picture


def what_is_there(path: Path) -> str:
    """Say what a path is that should be something else."""
    if path.is_symlink() and not path.exists():
        return f"a link to {os.readlink(path)}, where nothing is"
    if not path.exists():
        return "nothing there"
    return "a folder" if path.is_dir() else "a file" if path.is_file() else "neither a file nor a folder"


@contextmanager
def _room_for(path: Path, shape: tuple[int, ...], bits: int, claimed: int, expansion: int) -> Iterator[None]:
    """Run a block that decodes, unless the pixels are more than the file can hold or the memory has room for."""
    size = path.stat().st_size
    described = f"{' x '.join(map(str, shape))} values of {bits} bits"
    if 0 in shape:
        raise ValueError(f"no pixels, but {described}")
    if claimed > size * expansion:
        raise ValueError(
            f"a header that claims {described} ({claimed} bytes) in a file of {size} bytes, "
            f"which hold at most {size * expansion}"
        )
    needed = math.prod(shape) * -(-bits // 8) * COPIES
    with _one_large if needed > LARGE else nullcontext():
        # Of the machine, or of its container.
        bounds = [psutil.virtual_memory().available]
        for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # no such file, or "max"
                bounds.append(int(Path(limit).read_text()) - psutil.Process().memory_info().rss)
        free = min(bounds)
        if needed > free:
            raise DataError(
                f"{path}: expected an image that takes at most {free / 2**30:.1f} GiB of memory to decode, "
                f"got {described} ({needed / 2**30:.1f} GiB): cut it into parts"
            )
        yield


def _upright(pixels: np.ndarray, orientation: int | None) -> np.ndarray:
    """Turn [H, W, C] as TIFF's and EXIF's tag 274 says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def _decode_pillow(path: Path, opener: Callable[..., Any], head: bytes) -> Picture:
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
        with _room_for(path, (height, width, channels), bits, rows, expansion):
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                raise DataError(f"{path}: expected one image, got {frames} frames")
            if bits == 16:  # of which Pillow keeps only the upper 8 if they have colour
                pixels = np.atleast_3d(imagecodecs.png_decode(path.read_bytes()))
                picture = Picture(pixels, 16, alpha=pixels.shape[2] - 1 if pixels.shape[2] in (2, 4) else None)
            else:
                picture = _loaded(image, bits)
            return replace(picture, pixels=_upright(picture.pixels, image.getexif().get(274)))


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


def _decode_tiff(path: Path) -> Picture:
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
        with _room_for(path, shape, bits, claimed, TIFF_EXPANSION.get(page.compression, BLANK)):
            other = axes.replace("Y", "").replace("X", "")
            # Q is tifffile's name for an axis without meaning: of length 3 or 4 it is colour far more often than depth.
            is_channel = other in ("", "S", "C") or (other == "Q" and series.shape[series.axes.index("Q")] in (3, 4))
            if not is_channel and not (other == "I" and _pages_are_channels(page, shape[axes.index("I")])):
                raise DataError(
                    f"{path}: expected one image, got a stack of shape {series.shape} (axes {series.axes}): "
                    "save each slice as a file of its own"
                )
            for each in series.pages:
                check_segments(tiff, each)
            pixels = series.asarray().reshape(shape)
        pixels = np.moveaxis(pixels, axes.index(other), -1) if other else pixels[..., None]
        picture = _interpret_tiff(path, page, pixels, bits, separate=other == "S", keeps_values=tiff.is_imagej)
        return replace(picture, pixels=_upright(picture.pixels, page.tags.valueof(274)))


def _pages_are_channels(page: tifffile.TiffPage, count: int) -> bool:
    """Tell from OME's XML that the pages are the channels of one plane, in their order."""
    xml = page.description if page.is_ome else ""

    def numbers(name: str) -> list[int]:
        return [int(number) for number in re.findall(rf'\b{name}="(\d+)"', xml)]

    one_plane = numbers("SizeC") == [count] and numbers("SizeZ") == numbers("SizeT") == [1]
    return one_plane and all(numbers(name) == sorted(numbers(name)) for name in ("FirstC", "IFD"))


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
