"""Files of several sections for tests, as other programs write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image


def write_gif(path: Path, sections: np.ndarray) -> None:
    frames = [Image.fromarray(section) for section in sections]
    frames[0].save(path, save_all=True, append_images=frames[1:], optimize=False)


def write_nifti(path: Path, sections: np.ndarray) -> None:
    nibabel = pytest.importorskip("nibabel", reason="needs the extra nifti")
    nibabel.save(nibabel.Nifti1Image(sections.transpose(2, 1, 0), np.diag([2.0, 3.0, 4.0, 1.0])), path)


def write_zarr(path: Path, sections: np.ndarray) -> None:
    zarr.create_array(str(path), data=sections)


def write_dicom(path: Path, sections: np.ndarray, stored: int = 0, **more: object) -> None:
    """Write unsigned sections [N, H, W], of which so many bits count; `more` elements by their names."""
    pytest.importorskip("pydicom", reason="needs the extra dicom")
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = "1.2.3"
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = sections.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    bits = 8 * sections.itemsize
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, stored or bits, (stored or bits) - 1
    dataset.PixelRepresentation, dataset.PixelData = 0, sections.tobytes()
    for name, value in more.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)


def write_pages(path: Path, sections: np.ndarray) -> None:
    tifffile.imwrite(path, sections, photometric="minisblack", compression="zlib", metadata=None)


def write_ome(path: Path, sections: np.ndarray) -> None:
    tifffile.imwrite(path, sections, ome=True, photometric="minisblack", metadata={"axes": "ZYX"})
