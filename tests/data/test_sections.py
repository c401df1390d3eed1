"""Sections of stacks and volumes: which there are, and what each holds."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from image_files import noise, save, save_png
from stack_files import write_dicom, write_nifti

from fastunet.checks import DataError, MissingPackageError
from fastunet.data import find_pairs, inspect, read_image, read_mask, volumes
from fastunet.data.decoding import count_sections

SIZE = (40, 48)


def test_three_pages_are_sections_and_no_colours(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        sections = noise((3, *SIZE)) // (1 if kind == "images" else 128)
        save(tmp_path / kind / "s.tif", sections, photometric="minisblack")
    pairs = find_pairs(tmp_path)
    assert [(pair.stem, pair.section) for pair in pairs] == [("s_000", 0), ("s_001", 1), ("s_002", 2)]
    assert inspect(pairs).channels == 1
    np.testing.assert_array_equal(pairs[2].read_image()[..., 0], noise((3, *SIZE))[2])


@pytest.mark.parametrize("axes", ["ZCYX", "CZYX", "TZCYX"])
@pytest.mark.parametrize("kind", ["imagej", "ome"])
def test_sections_have_the_channels_that_are_named(tmp_path: Path, axes: str, kind: str) -> None:
    sizes = {"T": 2, "Z": 3, "C": 2, "Y": SIZE[0], "X": SIZE[1]}
    if kind == "imagej":
        axes = "".join(axis for axis in "TZCYX" if axis in axes)
    pixels = noise(tuple(sizes[axis] for axis in axes))
    path = tmp_path / "s.tif"
    tifffile.imwrite(path, pixels, photometric="minisblack", metadata={"axes": axes}, **{kind: True})
    sections = np.moveaxis(pixels, axes.index("C"), -1).reshape(-1, *SIZE, 2)
    assert count_sections(path) == len(sections)
    for index, section in enumerate(sections):
        np.testing.assert_array_equal(read_image(path, index), section)


@pytest.mark.parametrize(
    ("shape", "sections"), [((5, 6, 3), 1), ((5, 6), 1), ((3, 5, 6), 3), ((7, 5, 6, 2), 7), ((7, 5, 6, 1), 7)]
)
def test_arrays_have_sections_first_and_channels_last(tmp_path: Path, shape: tuple[int, ...], sections: int) -> None:
    pixels = noise(shape)
    np.save(tmp_path / "s.npy", pixels)
    zarr.create_array(str(tmp_path / "s.zarr"), data=pixels)
    for path in (tmp_path / "s.npy", tmp_path / "s.zarr"):
        assert count_sections(path) == sections
        found = np.stack([read_image(path, index) for index in range(sections)])
        np.testing.assert_array_equal(found.reshape(shape), pixels)


@pytest.mark.parametrize("shape", [(4, 1, 1, 5, 6), (1, 1, 4, 5, 6), (4, 1, 5, 6), (1, 5, 6)])
def test_axes_of_length_1_may_be_anywhere(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = noise(shape)
    zarr.create_array(str(tmp_path / "s.zarr"), data=pixels)
    sections = pixels.reshape(-1, 5, 6)
    assert count_sections(tmp_path / "s.zarr") == len(sections)
    for index, section in enumerate(sections):
        np.testing.assert_array_equal(read_image(tmp_path / "s.zarr", index)[..., 0], section)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_of_a_volume_no_more_is_read_than_there_is_room_for(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A section, or, from its beginning on, all that is compressed: once, however many threads ask."""
    sections, read, values_of = noise((6, *SIZE)), [], volumes._values_of
    write_nifti(tmp_path / f"s{suffix}", sections)

    def count(image: object, index: tuple) -> np.ndarray:
        found = values_of(image, index)
        read.append(found.size)
        return found

    monkeypatch.setattr(volumes, "_values_of", count)
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda index: read_image(tmp_path / f"s{suffix}", index)[..., 0], range(6)))
    np.testing.assert_array_equal(found, sections)
    assert read == ([sections[0].size] * 6 if suffix == ".nii" else [sections.size])


@pytest.mark.parametrize(
    ("write", "name", "package", "extra"),
    [(write_nifti, "s.nii", "nibabel", "nifti"), (write_dicom, "s.dcm", "pydicom", "dicom")],
)
def test_a_missing_package_is_named_with_its_extra(
    write: Callable, name: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / name, noise((2, *SIZE)))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"{name}: expected the package {package} .*'fastunet\[{extra}\]'"):
        count_sections(tmp_path / name)


def test_values_of_nifti_and_dicom_are_scaled(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel", reason="needs the extra nifti")
    image = nibabel.Nifti1Image(noise((4, 5, 1)).astype(np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, -1)
    nibabel.save(image, tmp_path / "s.nii")
    stored = np.asarray(nibabel.load(tmp_path / "s.nii").dataobj)[..., 0].T
    found = read_image(tmp_path / "s.nii")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[..., 0], stored)
    write_dicom(tmp_path / "s.dcm", noise((1, *SIZE)))
    pydicom = pytest.importorskip("pydicom", reason="needs the extra dicom")
    dataset = pydicom.dcmread(tmp_path / "s.dcm")
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.PhotometricInterpretation = "2", "-1024", "MONOCHROME1"
    dataset.save_as(tmp_path / "s.dcm")
    np.testing.assert_array_equal(read_image(tmp_path / "s.dcm")[..., 0], (255.0 - noise(SIZE)) * 2 - 1024)


def test_dicom_of_colours_that_are_not_converted_is_refused(tmp_path: Path) -> None:
    write_dicom(tmp_path / "s.dcm", noise((1, *SIZE)), PhotometricInterpretation="PALETTE COLOR")
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match=r"s.dcm: .* got: pixels of PALETTE COLOR, and not grey or RGB"):
            read(tmp_path / "s.dcm")


def test_deflated_dicom_holds_more_than_its_bytes(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom", reason="needs the extra dicom")
    write_dicom(tmp_path / "s.dcm", np.zeros((1, 256, 256), np.uint8))
    dataset = pydicom.dcmread(tmp_path / "s.dcm")
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(tmp_path / "s.dcm")
    assert (tmp_path / "s.dcm").stat().st_size < 2000
    assert read_image(tmp_path / "s.dcm").shape == (256, 256, 1)


def test_frames_of_16_bits_are_not_taken_for_the_first(tmp_path: Path) -> None:
    pixels = noise((5, 7, 1), "uint16")
    control = struct.pack(">IIIIIHHBB", 0, 7, 5, 0, 0, 1, 10, 0, 0)
    save_png(tmp_path / "s.png", pixels, 16, acTL=struct.pack(">II", 2, 0), fcTL=control)
    assert count_sections(tmp_path / "s.png") == 2
    for section in range(2):
        with pytest.raises(DataError, match=r"s.png: .* got: 2 frames of 16 bits, of which only the first is decoded"):
            read_image(tmp_path / "s.png", section)
