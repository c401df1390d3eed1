"""Reading image files: what is read keeps its range, and bad input names the file."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from image_files import noise, save, save_png
from PIL import Image

from fastunet.checks import DataError
from fastunet.data.images import read_image, read_mask

# --- what one image is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 5, 7), {"photometric": "rgb", "planarconfig": "separate"}),
        ((3, 5, 7), {"photometric": "minisblack"}),  # three pages of one unnamed axis
        ((2, 5, 7), {"photometric": "minisblack", "imagej": True, "metadata": {"axes": "CYX"}}),
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


def ome(sizes: str, *planes: str) -> str:
    tiff_data = "".join(planes) or "<TiffData/>"
    pixels = f'<Pixels ID="P" DimensionOrder="XYCZT" Type="uint8" SizeX="7" SizeY="5" {sizes}>{tiff_data}</Pixels>'
    return f'<OME UUID="urn:uuid:0"><Image ID="I">{pixels}</Image></OME>'


@pytest.mark.parametrize("others", ["there", "missing"])
def test_one_file_of_a_multi_file_ome_tiff_is_its_own_plane(tmp_path: Path, others: str) -> None:
    planes = [
        f'<TiffData FirstT="{t}" IFD="0" PlaneCount="1"><UUID FileName="t{t}.ome.tif">urn:uuid:{t}</UUID></TiffData>'
        for t in range(2)
    ]
    pixels = noise((2, 5, 7))
    for t in range(2 if others == "there" else 1):
        xml = ome('SizeC="1" SizeZ="1" SizeT="2"', *planes).replace("urn:uuid:0", f"urn:uuid:{t}", 1)
        save(tmp_path / f"t{t}.ome.tif", pixels[t], description=xml, metadata=None)
        np.testing.assert_array_equal(read_image(tmp_path / f"t{t}.ome.tif"), pixels[t][..., None])


@pytest.mark.parametrize(
    ("sizes", "planes", "channels"),
    [
        ('SizeC="5" SizeZ="1" SizeT="1"', "", True),
        ('SizeC="1" SizeZ="5" SizeT="1"', "", False),
        ('SizeC="5" SizeZ="1" SizeT="1"', '<TiffData FirstC="1" IFD="0"/><TiffData FirstC="0" IFD="1"/>', False),
    ],
)
def test_pages_of_an_ome_tiff_are_channels_if_it_says_so(
    tmp_path: Path, sizes: str, planes: str, channels: bool
) -> None:
    pixels = noise((5, 5, 7))
    path = save(tmp_path / "x.tif", pixels, photometric="minisblack", metadata=None, description=ome(sizes, planes))
    if channels:
        np.testing.assert_array_equal(read_image(path), np.moveaxis(pixels, 0, -1))
    else:
        with pytest.raises(DataError, match=r"x\.tif: expected one image, got a stack"):
            read_image(path)


def test_the_preview_in_a_phones_jpeg_is_passed_over(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), grey, np.uint8)) for grey in (200, 0)]
    frames[0].save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_image(tmp_path / "x.jpg"), 200)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int16", "int32", "int64", "float64"])
def test_other_number_types_become_float32_where_exact(tmp_path: Path, dtype: str) -> None:
    pixels = np.array([[-2, 0], [124, 3]], dtype)
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


@pytest.mark.parametrize(
    ("name", "dtype", "channels", "options"),
    [
        ("x.png", "uint8", 1, {}),
        ("x.png", "uint16", 3, {}),
        ("x.tif", "uint16", 1, {"extrasamples": ["unassalpha"]}),
        ("x.tif", "uint8", 3, {"extrasamples": ["assocalpha"], "compression": "lzw"}),
        ("x.tif", "uint8", 3, {"extrasamples": ["unassalpha"], "planarconfig": "separate"}),
    ],
)
def test_opaque_alpha_is_dropped_and_any_other_refused(
    tmp_path: Path, name: str, dtype: str, channels: int, options: dict
) -> None:
    top = np.iinfo(dtype).max
    pixels = np.repeat(noise((5, 7, 1), dtype), channels + 1, -1)

    def write() -> Path:
        if name == "x.png":
            return save_png(tmp_path / name, pixels, 8 * pixels.itemsize)
        stored = np.moveaxis(pixels, -1, 0) if "planarconfig" in options else pixels
        photometric, planes = "rgb" if channels == 3 else "minisblack", {"planarconfig": "contig"} | options
        return save(tmp_path / name, stored, photometric=photometric, **planes)

    pixels[..., -1] = top
    path = write()
    np.testing.assert_array_equal(read_image(path), pixels[..., :-1])
    np.testing.assert_array_equal(read_mask(path), pixels[..., 0])
    pixels[2, 3, -1] = 17
    with pytest.raises(DataError, match=rf"{name}: .*alpha {top} everywhere\), got alpha 17"):
        read_image(write())


@pytest.mark.parametrize(("bits", "channels"), [(2, 1), (8, 1), (8, 3), (16, 1), (16, 3)])
def test_a_transparent_colour_counts_as_alpha_where_it_occurs(tmp_path: Path, bits: int, channels: int) -> None:
    pixels = noise((5, 7, channels), "uint8" if bits <= 8 else "uint16") % (2**bits - 1)
    colours = pixels[2, 3], np.full(channels, 2**bits - 1)  # the second is nowhere
    present, absent = (struct.pack(f">{channels}H", *colour.tolist()) for colour in colours)
    with pytest.raises(DataError, match=r"x\.png: expected no transparency"):
        read_image(save_png(tmp_path / "x.png", pixels, bits, tRNS=present))
    image = read_image(save_png(tmp_path / "y.png", pixels, bits, tRNS=absent))
    np.testing.assert_array_equal(image, pixels * (85 if bits == 2 else 1))


def test_a_fourth_data_channel_is_not_taken_for_alpha(tmp_path: Path) -> None:
    pixels = noise((5, 7, 4))
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="minisblack", planarconfig="contig", extrasamples=[0] * 3)
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif"), pixels)


def test_a_transparent_palette_entry_counts_as_alpha(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "x.png", transparency=1)
    with pytest.raises(DataError, match=r"x\.png: expected no transparency.*got alpha 0"):
        read_image(tmp_path / "x.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "x.png"), [[0, 1]])


# --- files that cannot be read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.bmp", "x.gif", "x.webp", "x.tif", "lzw.tif", "jpeg.tif"])
def test_broken_files_are_named(tmp_path: Path, name: str) -> None:
    path, pixels = tmp_path / name, noise((64, 64))
    if path.stem in ("lzw", "jpeg"):
        save(path, pixels, compression=path.stem, rowsperstrip=16)
    else:
        save(path, pixels)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-200], whole[:20], b"not an image", b""):
        path.write_bytes(content)
        for read in (read_image, read_mask):
            with pytest.raises(DataError, match=rf"{name}: expected a readable image, got: .") as caught:
                read(path)
            assert "\n" not in str(caught.value)


def test_what_is_not_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, actual in (
        ("folder.png", "a folder"),
        ("link.png", "a link to .*gone.png, where nothing is"),
        ("pipe.png", "neither a file nor a folder"),
        ("gone.png", "nothing there"),
    ):
        with pytest.raises(DataError, match=rf"{name}: expected a file, got {actual}$"):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match=r"n: expected a readable image, got: .*name too long"):
        read_image(tmp_path / ("n" * 300))


@pytest.mark.parametrize("name", ["[red]", "n" * 251, os.fsdecode(b"\xff"), "\u00e9 %s {0}"])
def test_names_of_any_kind_are_read(tmp_path: Path, name: str) -> None:
    """By Pillow, by imagecodecs and by tifffile."""
    for bits, suffix in ((8, "png"), (16, "png"), (16, "tif")):
        pixels, made = noise((5, 7, 1), f"uint{bits}"), tmp_path / f"x.{suffix}"
        save_png(made, pixels, bits) if suffix == "png" else save(made, pixels)
        np.testing.assert_array_equal(read_image(made.rename(tmp_path / f"{name}.{suffix}")), pixels)


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
