"""Headers are not believed: what a file or the memory cannot hold is refused before anything is allocated."""

from __future__ import annotations

import io
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import psutil
import pytest
import tifffile
import zarr
from image_files import png, tiff
from PIL import Image
from stack_files import write_dicom

from fastunet.checks import DataError
from fastunet.data import decoding, picture
from fastunet.data import tiff as tiff_decoding
from fastunet.data.decoding import count_sections
from fastunet.data.images import read_image, read_mask
from fastunet.data.outlines import draw
from fastunet.data.sources import open_source

HUGE = {256: 45000, 257: 45000}
TILED = {273: -1, 278: -1, 279: -1, 322: 16, 323: 16, 324: 16, 325: 16}


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def patched(data: bytes, at: int, form: str, *values: int) -> bytes:
    return data[:at] + struct.pack(form, *values) + data[at + struct.calcsize(form) :]


def jpeg(height: int, width: int, data: bytes = b"") -> bytes:
    data = data or encoded("JPEG")
    return patched(data, data.index(b"\xff\xc0") + 5, ">HH", height, width)


def described(text: str) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((4, 4), np.uint8), description=text, metadata=None)
    return file.getvalue()


def peak_memory() -> int:
    """In KiB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header.encode() + bytes(16)


def nifti(*size: int) -> bytes:
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, len(size), *size, *[1] * (7 - len(size)))
    struct.pack_into("<hh", header, 70, 2, 8)
    struct.pack_into("<f", header, 108, 352)
    header[344:348] = b"n+1\0"
    return bytes(header) + bytes(16)


def write(path: Path, content: bytes | dict[str, int]) -> Path:
    """Write a file's bytes, or DICOM with elements that lie."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_dicom(path, np.zeros((1, 1, 8), np.uint16), **content)
    return path


SEGMENT = jpeg(60000, 60000, imagecodecs.jpeg_encode(np.zeros((16, 16), np.uint8)))
LIES = {
    "tiff": tiff({256: 2**62, 257: 2**62}),
    **{f"tiff-compression-{kind}": tiff({**HUGE, 259: kind}) for kind in (5, 7, 8, 32773, 34887, 50000, 50001, 50002)},
    "tiff-fax": tiff({**HUGE, 258: 1, 259: 4}),
    "tiff-samples": tiff({277: 65535}),
    "tiff-planes": tiff({277: 65535, 284: 2}),
    "tiff-depth": tiff({32997: 10**9}),
    "tiff-float64": tiff({**HUGE, 258: 64, 277: 4, 339: 3}),
    "tiff-strips-without-bytes": tiff({**HUGE, 279: 0}),
    "tiff-tiles-without-bytes": tiff({**HUGE, **TILED, 324: 0, 325: 0}),
    "tiff-one-huge-tile": tiff({**TILED, 259: 8, 322: 10**6, 323: 10**6}),
    "tiff-strip-past-the-end": tiff({273: 10**6, 279: 256}),
    "tiff-compressed-strip-past-the-end": tiff({259: 5, 279: 2**62}),
    "tiff-too-few-strips": tiff({259: 5, 278: 1}),
    "tiff-no-strips": tiff({273: -1, 279: -1}),
    "tiff-no-pixels": tiff({256: 0}),
    "tiff-rows-of-0": tiff({278: 0}),
    "tiff-bits": tiff({258: 65535}),
    "tiff-jpeg-strip": tiff({259: 7}, SEGMENT),
    "tiff-tags": b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 2**60) + b"\0" * 40,
    "tiff-description": described('{"shape": [1000000000000, 4, 4]}'),
    **{
        f"png-{bits}-{kind}": png((45000, 45000, bits, kind, 0, 0, 0), b"\0")
        for bits, kind in [(1, 0), (8, 2), (16, 6)]
    },
    "png-interlaced": png((2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 1), b"\0"),
    "png-palette": png((45000, 45000, 8, 3, 0, 0, 0), b"\0", PLTE=b"abc"),
    "jpeg": jpeg(65500, 65500),
    "bmp": patched(encoded("BMP"), 18, "<ii", 45000, -45000),
    "bmp-runs": patched(patched(encoded("BMP"), 18, "<ii", 45000, 45000), 28, "<HI", 8, 1),
    "gif": patched(encoded("GIF"), 6, "<HH", 65535, 65535),
    "npy": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000)}"),
    "npy-objects": npy("{'descr': '|O', 'fortran_order': False, 'shape': (4, 4)}"),
    "nifti": nifti(32000, 32000),
    "dicom": {"Rows": 65535, "Columns": 65535},
    "webp": patched(encoded("WEBP"), 26, "<HH", 16383, 16383),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory as Linux gives it")
@pytest.mark.parametrize("name", LIES)
def test_a_header_that_claims_more_than_the_file_holds_is_refused_before_allocating(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "[red]x.tif", LIES[name])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_memory()
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match=r"\[red\]x\.tif: expected a readable image, got: .") as caught:
            read(path)
        assert "\n" not in str(caught.value)
    assert peak_memory() - before < 64 * 2**10


STACKS = {
    "npy": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 45000, 45000)}"),
    "nifti": nifti(32000, 32000, 32000),
    "dicom": {"Rows": 65535, "Columns": 65534, "NumberOfFrames": 10**6},
    "tiff": described('{"shape": [1000000000000, 4, 4]}'),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_section_of_more_than_the_file_holds_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "x.tif", STACKS[name])
    count_sections(path)
    for section in (0, 7):
        with pytest.raises(DataError, match=r"x\.tif: expected a readable image, got: .*a header that claims"):
            read_image(path, section)


CLAIMS = {"imagej": "ImageJ=1.11a\nimages=1000000000\nslices=1000000000\n", "ome": "PlaneCount='1000000000'"}
LOOPS = {"itself": tiff({}, bytes(256), following=16 + 256), "sub-ifd": tiff({330: 16 + 256}, bytes(256))}
HARMLESS = {name: described(f"<OME {text}></OME>" if name == "ome" else text) for name, text in CLAIMS.items()} | LOOPS


@pytest.mark.parametrize("name", HARMLESS)
def test_what_the_pixels_do_not_depend_on_may_claim_anything(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.tif").write_bytes(HARMLESS[name])
    assert not read_image(tmp_path / "x.tif").any()


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif"])
def test_a_real_image_is_not_refused_for_its_size(tmp_path: Path, name: str) -> None:
    """Blank, so that it is as small as the format makes it; above 178,956,970 pixels, the limit of Pillow."""
    path = tmp_path / name
    blank = Image.new("1" if name != "x.jpg" else "L", (13500, 13500))
    blank.save(path, **({"compression": "group4"} if name == "x.tif" else {}))
    image = read_image(path)
    assert image.shape[:2] == (13500, 13500)
    assert not image[::100].any()


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_what_the_memory_has_no_room_for_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    Image.new("L", (100, 100)).save(path)
    memory = psutil.virtual_memory()
    monkeypatch.setattr(picture.psutil, "virtual_memory", lambda: memory._replace(available=20_000))
    with pytest.raises(DataError, match=rf"{name}: expected an image that takes at most 0\.0 GiB .*got 100 x 100"):
        read_image(path)
    monkeypatch.setattr(picture.psutil, "virtual_memory", lambda: memory._replace(available=50_000))
    assert read_image(path).shape == (100, 100, 1)

    def fails(*_: object) -> None:
        raise MemoryError

    for module in (decoding, tiff_decoding):
        monkeypatch.setattr(module, "upright", fails)
    with pytest.raises(DataError, match=rf"{name}: expected an image that fits into memory"):
        read_image(path)


@pytest.mark.parametrize("read", [read_image, open_source])
def test_a_chunk_that_the_memory_has_no_room_for_is_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    zarr.create_array(str(tmp_path / "x.zarr"), shape=(64, 64), chunks=(2**21, 2**21), dtype="uint8")
    with pytest.raises(DataError, match=r"x\.zarr: expected an image that takes at most .* got 2097152 x 2097152"):
        read(tmp_path / "x.zarr")


def test_rois_that_the_memory_has_no_room_for_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("roifile", reason="needs the extra imagej")
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.roi", b"Iout" + bytes(2**20))
    memory = psutil.virtual_memory()
    monkeypatch.setattr(picture.psutil, "virtual_memory", lambda: memory._replace(available=2**20))
    with pytest.raises(DataError, match=r"x\.zip: expected an image that takes at most 0\.0 GiB .* got 1048580 values"):
        draw(tmp_path / "x.zip", "x", ("foreground",), (64, 64))
