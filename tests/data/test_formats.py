"""The same picture reads the same from every format, or is refused by name."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_files import noise, save, save_png
from PIL import Image, ImageOps
from stack_files import write_dicom

from fastunet.checks import DataError
from fastunet.data.images import read_image, read_mask

TILES = {"tile": (16, 16), "compression": "zlib", "predictor": True}


@pytest.mark.parametrize(
    ("name", "dtype", "channels", "options"),
    [
        ("x.png", "uint16", 3, {}),
        ("x.bmp", "uint8", 1, {}),
        ("x.bmp", "uint8", 3, {}),
        ("x.webp", "uint8", 3, {"lossless": True}),
        ("x.tif", "uint8", 3, {}),
        ("x.tif", "uint16", 1, {"byteorder": ">", "bigtiff": True}),
        ("x.tif", "uint16", 3, {"rowsperstrip": 2, "compression": "lzw"}),
        ("x.tif", "uint8", 1, TILES),
        ("x.tif", "uint16", 3, TILES),
    ],
)
def test_files_are_read_as_they_are(tmp_path: Path, name: str, dtype: str, channels: int, options: dict) -> None:
    pixels = noise((21, 37, channels), dtype)
    path = tmp_path / name
    if path.suffix == ".png":
        save_png(path, pixels, 8 * pixels.itemsize)
    else:
        save(path, pixels.squeeze(), **options)
    image = read_image(path)
    assert image.dtype == dtype
    assert image.dtype.isnative
    np.testing.assert_array_equal(image, pixels)


def test_a_file_is_read_by_its_content_and_not_by_its_name(tmp_path: Path) -> None:
    pixels = noise((5, 7), "uint16").astype(np.uint32) + 70_000  # of which Pillow gives the lower 16 bits
    save(tmp_path / "x.tif", pixels).rename(tmp_path / "x.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "x.png"), pixels)
    Image.fromarray(noise((5, 7))).save(tmp_path / "y.tif", "PNG")
    np.testing.assert_array_equal(read_image(tmp_path / "y.tif")[..., 0], noise((5, 7)))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def turned_tiff(path: Path, pixels: np.ndarray, orientation: int) -> None:
    save(path, pixels.squeeze(), extratags=[(274, "H", 1, orientation, True)], compression="zlib")


def turned_png(path: Path, pixels: np.ndarray, orientation: int) -> None:
    save_png(path, pixels, 8 * pixels.itemsize, eXIf=exif(orientation).tobytes()[6:])


def turned_pillow(path: Path, pixels: np.ndarray, orientation: int) -> None:
    options = {"lossless": True} if path.suffix == ".webp" else {"quality": 100, "subsampling": 0}
    Image.fromarray(pixels.squeeze()).save(path, exif=exif(orientation), **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("name", "write", "dtype", "channels"),
    [
        ("x.png", turned_png, "uint8", 3),
        ("x.png", turned_png, "uint16", 1),
        ("x.tif", turned_tiff, "uint8", 1),
        ("x.tif", turned_tiff, "uint16", 3),
        ("x.jpg", turned_pillow, "uint8", 3),
        ("x.webp", turned_pillow, "uint8", 3),
    ],
)
def test_orientation_is_applied_to_images_and_masks(
    tmp_path: Path, name: str, write: Callable[..., None], dtype: str, channels: int, orientation: int
) -> None:
    pixels = np.repeat(noise((5, 7, 1), dtype), channels, -1)
    write(tmp_path / name, pixels, orientation)
    stored = Image.fromarray(np.arange(35, dtype=np.int32).reshape(5, 7))
    stored.info["exif"] = exif(orientation).tobytes()
    upright = pixels.reshape(35, channels)[np.asarray(ImageOps.exif_transpose(stored))]
    tolerance = 3 if name == "x.jpg" else 0  # quality 100: coefficients and colours are rounded
    np.testing.assert_allclose(read_image(tmp_path / name).astype(int), upright.astype(int), atol=tolerance)
    if not tolerance:
        np.testing.assert_array_equal(read_mask(tmp_path / name), upright[..., 0])


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        *(("png", bits) for bits in (1, 2, 4, 8, 16)),
        *((kind, bits) for kind in ("minisblack", "miniswhite") for bits in (1, 4, 8, 12, 16)),
        *(("npy", bits) for bits in (1, 8, 16)),
        *((kind, bits) for kind in ("MONOCHROME1", "MONOCHROME2") for bits in (8, 12, 16)),
    ],
)
def test_grey_of_any_bits_has_0_as_black(tmp_path: Path, kind: str, bits: int) -> None:
    """Below 8 bits an image spans 0 to 255, and a mask keeps its indices; a mask of 1 bit is 0 and 255."""
    top = 2**bits - 1
    values = (noise((5, 7, 1), "uint16") & top).astype(np.uint8 if bits <= 8 else np.uint16)
    path = tmp_path / "x.tif"  # which is read by its content
    stored = (top - values if kind in ("miniswhite", "MONOCHROME1") else values)[..., 0]
    if kind == "png":
        save_png(path, values, bits)
    elif kind == "npy":
        with path.open("wb") as file:
            np.save(file, stored.astype(bool) if bits == 1 else stored)
    elif kind.startswith("MONOCHROME"):
        write_dicom(path, stored[None], bits, PhotometricInterpretation=kind)
    else:
        save(path, stored.astype(bool) if bits == 1 else stored, photometric=kind, bitspersample=bits)
    image, mask = read_image(path), read_mask(path)
    assert image.dtype == mask.dtype == values.dtype
    np.testing.assert_array_equal(image, values * (255 // top) if bits < 8 else values)
    np.testing.assert_array_equal(mask, (values * (255 if bits == 1 else 1))[..., 0])


def test_imagejs_masks_keep_their_values_though_shown_inverted(tmp_path: Path) -> None:
    mask = np.array([[0, 255]], np.uint8)
    save(tmp_path / "x.tif", mask, imagej=True, photometric="miniswhite")
    np.testing.assert_array_equal(read_mask(tmp_path / "x.tif"), mask)


PALETTE = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)


def palette_pillow(path: Path, indices: np.ndarray, bits: int) -> None:
    image = Image.fromarray(indices)
    image.putpalette(PALETTE.tobytes())
    image.save(path, **({"bits": bits} if path.suffix == ".png" else {}))


def palette_tiff(path: Path, indices: np.ndarray, bits: int, scale: int = 257) -> None:
    colours = np.zeros((2**bits, 3), np.uint16)
    colours[:2] = PALETTE.astype(np.uint16) * scale
    pixels = indices.astype(bool) if bits == 1 else indices.astype(np.uint16 if bits == 16 else np.uint8)
    # Written for 8 and 16 bits by tifffile's palette; of fewer, as grey with the tags of a palette.
    tags = [(262, "H", 1, 3, True), (320, "H", colours.size, tuple(colours.T.ravel().tolist()), True)]
    if bits in (8, 16):
        save(path, pixels, photometric="palette", colormap=colours.T)
    else:
        save(path, pixels, bitspersample=bits, photometric="minisblack", extratags=tags[1:])
        content = path.read_bytes()
        grey = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
        assert content.count(grey) == 1
        path.write_bytes(content.replace(grey, struct.pack("<HHIHH", 262, 3, 1, 3, 0)))


@pytest.mark.parametrize(
    ("name", "write", "bits"),
    [
        *(("x.png", palette_pillow, bits) for bits in (1, 2, 4, 8)),
        ("x.gif", palette_pillow, 8),
        ("x.bmp", palette_pillow, 8),
        *(("x.tif", palette_tiff, bits) for bits in (1, 4, 8, 16)),
        ("x.tif", lambda *args: palette_tiff(*args, scale=256), 8),
        ("x.tif", lambda *args: palette_tiff(*args, scale=1), 8),  # maps of 8 bits, as old programs write them
    ],
)
def test_palettes_give_colours_to_images_and_indices_to_masks(
    tmp_path: Path, name: str, write: Callable[..., None], bits: int
) -> None:
    indices = np.array([[0, 1, 1], [1, 1, 0]], np.uint8)
    write(tmp_path / name, indices, bits)
    image = read_image(tmp_path / name)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, PALETTE[indices])
    np.testing.assert_array_equal(read_mask(tmp_path / name), indices)


def test_colours_of_16_bits_in_a_palette_are_not_cut(tmp_path: Path) -> None:
    colours, indices = noise((3, 256), "uint16"), noise((5, 7))
    save(tmp_path / "x.tif", indices, photometric="palette", colormap=colours)
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif"), np.moveaxis(colours[:, indices], 0, -1))


@pytest.mark.parametrize("options", [{}, {"compression": "jpeg", "compressionargs": {"level": 100}}])
@pytest.mark.parametrize(("mode", "photometric"), [("CMYK", "separated"), ("YCbCr", "ycbcr")])
def test_cmyk_and_ycbcr_become_rgb(tmp_path: Path, mode: str, photometric: str, options: dict) -> None:
    rgb = Image.fromarray(np.full((16, 16, 3), (200, 90, 30), np.uint8))
    pixels = np.asarray(rgb.convert(mode))
    save(tmp_path / "x.tif", pixels, photometric=photometric, subsampling=(1, 1), **options)
    rgb.convert(mode).save(tmp_path / "x.jpg", quality=100, subsampling=0)
    for name in ("x.tif", "x.jpg"):
        np.testing.assert_allclose(read_image(tmp_path / name).astype(int), np.asarray(rgb, int), atol=3)


@pytest.mark.parametrize(
    ("photometric", "dtype", "channels"),
    [("separated", "uint16", 4), ("separated", "uint8", 5), ("cielab", "uint8", 3), ("cfa", "uint16", 1)],
)
def test_colour_spaces_that_are_not_converted_are_refused(
    tmp_path: Path, photometric: str, dtype: str, channels: int
) -> None:
    save(tmp_path / "x.tif", noise((5, 7, channels), dtype).squeeze(), photometric=photometric)
    expected = rf"x\.tif: expected grey, RGB, or .*got {photometric.upper()} of {channels} channels in {dtype}"
    with pytest.raises(DataError, match=expected):
        read_image(tmp_path / "x.tif")
