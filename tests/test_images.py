"""Reading image files: what is read keeps its range, whatever the format, and bad input names the file."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

pytest.importorskip("kornia", reason="needs the extra train")

import numpy as np
import tifffile
from image_files import noise, save
from PIL import Image

from fastunet.checks import DataError
from fastunet.images import read_image, read_mask


def save_png16(path: Path, pixels: np.ndarray) -> Path:
    """Write uint16 [H, W, C] as PNG, which Pillow cannot for colour."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, channels = pixels.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


# --- reading images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif"])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_8_bit_files_are_read_as_they_are(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    pixels = noise(shape)
    image = read_image(save(tmp_path / name, pixels))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, pixels.reshape(5, 7, -1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_files_keep_their_range(tmp_path: Path, suffix: str, channels: int) -> None:
    pixels = noise((5, 7, channels), "uint16")
    path = tmp_path / f"x.{suffix}"
    save_png16(path, pixels) if suffix == "png" else tifffile.imwrite(path, pixels)
    image = read_image(path)
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, pixels)


def test_big_endian_tiff_comes_in_native_order(tmp_path: Path) -> None:
    pixels = noise((5, 7), "uint16")
    tifffile.imwrite(tmp_path / "x.tif", pixels, byteorder=">")
    image = read_image(tmp_path / "x.tif")
    assert image.dtype.isnative
    np.testing.assert_array_equal(image[..., 0], pixels)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 5, 7), {"photometric": "rgb", "planarconfig": "separate"}),
        ((3, 5, 7), {"photometric": "minisblack"}),  # three pages of one unnamed axis
        ((2, 5, 7), {"photometric": "minisblack", "imagej": True, "metadata": {"axes": "CYX"}}),
        ((4, 5, 7), {"photometric": "minisblack", "planarconfig": "separate"}),
        ((1, 5, 7), {"photometric": "minisblack"}),
    ],
)
def test_channels_first_tiffs_come_channels_last(tmp_path: Path, shape: tuple[int, ...], options: dict) -> None:
    pixels = noise(shape, "uint16")
    tifffile.imwrite(tmp_path / "x.tif", pixels, **options)
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif"), np.moveaxis(pixels, 0, -1))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((6, 5, 7), {"photometric": "minisblack"}),
        ((3, 5, 7), {"photometric": "minisblack", "imagej": True, "metadata": {"axes": "ZYX"}}),
        ((2, 3, 5, 7), {"photometric": "minisblack", "imagej": True, "metadata": {"axes": "ZCYX"}}),
    ],
)
def test_stacks_are_refused(tmp_path: Path, shape: tuple[int, ...], options: dict) -> None:
    tifffile.imwrite(tmp_path / "x.tif", noise(shape), **options)
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match=r"x\.tif: expected one image, got a stack of shape \(.*5, 7\)"):
            read(tmp_path / "x.tif")


def test_files_of_several_images_are_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "x.tif") as tiff:
        tiff.write(noise((5, 7)))
        tiff.write(noise((3, 4)))
    with pytest.raises(DataError, match=r"x\.tif: expected one image, got 2 images"):
        read_image(tmp_path / "x.tif")
    frames = [Image.fromarray(noise((5, 7), seed=seed)) for seed in range(2)]
    frames[0].save(tmp_path / "x.png", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=r"x\.png: expected one image, got 2 frames"):
        read_image(tmp_path / "x.png")


def test_the_preview_in_a_phones_jpeg_is_passed_over(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), grey, np.uint8)) for grey in (200, 0)]
    frames[0].save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_image(tmp_path / "x.jpg"), 200)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int16", "int32", "float64"])
def test_other_number_types_become_float32_where_exact(tmp_path: Path, dtype: str) -> None:
    pixels = np.array([[-2, 0], [1024, 3]], dtype)
    image = read_image(save(tmp_path / "x.tif", pixels))
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image[..., 0], pixels)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.array([[0, 2**24 + 1]], np.int32), "got 16777217 in int32"),
        (np.array([[0, 1e300]]), r"got 1e\+300 in float64"),
        (np.array([[0, 0.1]]), r"got 0\.1 in float64"),
        (np.array([[0, np.nan]], np.float32), "expected finite values"),
        (np.array([[0, -np.inf]]), "expected finite values"),
        (np.array([[0, 1j]], np.complex64), "expected integers or floats, got complex64"),
    ],
)
def test_values_that_float32_cannot_hold_are_refused(tmp_path: Path, pixels: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=rf"x\.tif: .*{message}"):
        read_image(save(tmp_path / "x.tif", pixels))


def test_opaque_alpha_is_dropped_and_any_other_refused(tmp_path: Path) -> None:
    for name, top in (("x.png", 255), ("x.tif", 255), ("y.tif", 65535)):
        pixels = noise((5, 7, 4), "uint8" if top == 255 else "uint16")
        pixels[..., 3] = top
        np.testing.assert_array_equal(read_image(save(tmp_path / name, pixels)), pixels[..., :3])
        pixels[2, 3, 3] = 17
        with pytest.raises(DataError, match=rf"{name}: .*alpha {top} everywhere\), got alpha 17"):
            read_image(save(tmp_path / name, pixels))
    grey = noise((5, 7, 2))
    grey[..., 1] = 255
    np.testing.assert_array_equal(read_image(save(tmp_path / "grey.png", grey)), grey[..., :1])
    colour = noise((5, 7, 4), "uint16")
    colour[..., 3] = 65535
    np.testing.assert_array_equal(read_image(save_png16(tmp_path / "z.png", colour)), colour[..., :3])


def test_a_fourth_data_channel_is_not_taken_for_alpha(tmp_path: Path) -> None:
    pixels = noise((5, 7, 4))
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="minisblack", planarconfig="contig", extrasamples=[0] * 3)
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif"), pixels)


def palette_image(indices: np.ndarray) -> Image.Image:
    image = Image.fromarray(indices, mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    return image


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_palettes_give_colours_to_images_and_indices_to_masks(tmp_path: Path, suffix: str) -> None:
    indices = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    path = tmp_path / f"x.{suffix}"
    palette_image(indices).save(path)
    colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]], np.uint8)
    np.testing.assert_array_equal(read_image(path), colours[indices])
    np.testing.assert_array_equal(read_mask(path), indices)


def test_a_transparent_palette_entry_counts_as_alpha(tmp_path: Path) -> None:
    palette_image(np.array([[0, 1, 2]], np.uint8)).save(tmp_path / "x.png", transparency=1)
    with pytest.raises(DataError, match=r"x\.png: expected no transparency.*got alpha 0"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_1_bit_becomes_0_and_255(tmp_path: Path, suffix: str) -> None:
    bits = np.array([[True, False, True], [False, False, True]])
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(bits).save(path)
    np.testing.assert_array_equal(read_image(path)[..., 0], bits * 255)
    np.testing.assert_array_equal(read_mask(path), bits * 255)
    assert read_image(path).dtype == np.uint8


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "x.jpg")
    image = read_image(tmp_path / "x.jpg")
    assert image.shape == (8, 8, 3)
    assert image.min() > 250


def test_exif_orientation_is_applied_to_images_and_masks(tmp_path: Path) -> None:
    pixels = noise((5, 7))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to show
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    upright = np.rot90(pixels, 3)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png")[..., 0], upright)
    np.testing.assert_array_equal(read_mask(tmp_path / "x.png"), upright)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.bmp", "x.tif"])
def test_broken_files_are_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, noise((64, 64)))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"not an image", b""):
        path.write_bytes(content)
        for read in (read_image, read_mask):
            with pytest.raises(DataError, match=rf"{name}: expected a readable image, got: .") as caught:
                read(path)
            assert "\n" not in str(caught.value)


# --- reading masks ---------------------------------------------------------------------------------------------------


def test_masks_keep_their_values(tmp_path: Path) -> None:
    for dtype in ("uint8", "uint16", "int32"):
        mask = np.array([[0, 1], [7, 200]], dtype)
        read = read_mask(save(tmp_path / "x.tif", mask))
        assert read.dtype == mask.dtype
        np.testing.assert_array_equal(read, mask)
    whole = read_mask(save(tmp_path / "x.tif", np.array([[0, 3.0]], np.float32)))
    assert whole.dtype.kind == "i"
    np.testing.assert_array_equal(whole, [[0, 3]])


def test_a_mask_saved_as_colour_is_one_channel_if_all_agree(tmp_path: Path) -> None:
    mask = noise((5, 7))
    path = save(tmp_path / "x.png", np.stack([mask] * 3, -1))
    np.testing.assert_array_equal(read_mask(path), mask)
    with pytest.raises(DataError, match=r"y\.png: expected a mask of one channel, got 3 channels that differ"):
        read_mask(save(tmp_path / "y.png", noise((5, 7, 3))))


def test_fractions_in_a_mask_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.tif: expected whole numbers in a mask, got 0\.5"):
        read_mask(save(tmp_path / "x.tif", np.array([[0, 0.5]], np.float32)))
