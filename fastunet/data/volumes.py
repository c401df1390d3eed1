"""Arrays of sections: NumPy's files, NIfTI, DICOM and Zarr. As of other files, no header is believed."""

from __future__ import annotations

import gzip
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fastunet.checks import DataError, MissingPackageError, required
from fastunet.data.picture import room_for, what_is_there

CHANNELS = 4  # at most, of a last axis that is taken for channels
CODEC = 2**16  # bytes of pixels that a byte of a DICOM's codec stands for, at most
GZIP = 1032  # bytes that one of gzip, or of deflated DICOM, stands for, at most


@dataclass(frozen=True)
class Volume:
    """Sections that are read one at a time."""

    shape: tuple[int, int, int, int]  # sections, height, width, channels
    dtype: np.dtype[Any]
    claimed: int  # bytes of pixels, as the header has it
    expansion: int  # bytes of pixels that a byte of the file stands for, at most
    read: Callable[[int], np.ndarray]  # a section [H, W, C]


def is_zarr(path: Path) -> bool:
    """Whether a Zarr array or group is there."""
    return any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def opener_of(path: Path, head: bytes) -> Callable[[Path], Volume] | None:
    """Return what opens a file that begins with `head`, of 352 bytes where it has so many; None for others."""
    if head.startswith(b"\x93NUMPY"):
        return _open_npy
    if head[128:132] == b"DICM":
        return _open_dicom
    if head[344:348] in (b"n+1\0", b"n+2\0") or (
        head.startswith(b"\x1f\x8b") and path.name.lower().endswith(".nii.gz")
    ):
        return _open_nifti
    return None


def import_extra(name: str, extra: str, path: Path) -> Any:
    """Import the package that reads `path`. Raises MissingPackageError with the extra that installs it."""
    return required(f"{path}: expected the package {name} to read it, got none: pip install 'fastunet[{extra}]'", name)


def _open_npy(path: Path) -> Volume:
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(file)
    if dtype.hasobject:
        raise ValueError("Python objects, which are not read")
    sections, height, width, channels = _interpret(shape)

    def read(section: int) -> np.ndarray:
        whole = np.load(path, mmap_mode="r", allow_pickle=False).reshape(sections, height, width, channels)
        return np.array(whole[section])

    claimed = math.prod(shape) * dtype.itemsize
    return Volume((sections, height, width, channels), dtype, claimed, 1, read)


def _interpret(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Give sections, height, width and channels of [H, W], [H, W, C], [N, H, W] and [N, H, W, C], with C <= 4."""
    channels = shape[-1] if len(shape) > 2 and shape[-1] <= CHANNELS < min(shape[-3:-1]) else 1
    rest = shape[:-1] if len(shape) > 2 and (channels > 1 or shape[-1] == 1) else shape
    if len(rest) not in (2, 3):
        raise ValueError(f"an array of shape {list(shape)}, and not [H, W], [H, W, C], [N, H, W] or [N, H, W, C]")
    return (rest[0] if len(rest) == 3 else 1), rest[-2], rest[-1], channels


def _open_nifti(path: Path) -> Volume:
    """Slices along the third axis, of which the second points down; a fourth axis has the channels."""
    nibabel = import_extra("nibabel", "nifti", path)
    header = _nifti(path, nibabel).header
    shape = tuple(int(size) for size in header.get_data_shape())
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (2, 3, 4):
        raise ValueError(f"a volume of shape {list(shape)}, and not of 2, 3 or 4 axes")
    dtype = header.get_data_dtype()
    width, height, sections, channels = (*shape, 1, 1)[:4]
    stat = path.stat()
    expansion = GZIP if path.name.lower().endswith(".gz") else 1

    def read(section: int) -> np.ndarray:
        if expansion == 1:
            values = _values_of(_nifti(path, nibabel), (slice(None), slice(None), section)[: len(shape)])
        else:
            with _one_volume:  # each of several threads would read it
                values = _nifti_values(path, stat.st_mtime_ns, stat.st_size)
            values = values.reshape(width, height, sections, channels)[:, :, section]
        return np.array(values.reshape(width, height, channels).swapaxes(0, 1))

    return Volume((sections, height, width, channels), dtype, math.prod(shape) * dtype.itemsize, expansion, read)


def _nifti(path: Path, nibabel: Any) -> Any:
    """Open a file by its content, whatever its name."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        kind = nibabel.Nifti2Image if file.read(4) in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nibabel.Nifti1Image
    holder = nibabel.fileholders.FileHolder(str(path))
    return kind.from_file_map({"image": holder, "header": holder})


_one_volume = threading.Lock()


@lru_cache(2)  # sections follow each other, and gzip is read from its start
def _nifti_values(path: Path, changed: int, size: int) -> np.ndarray:
    import nibabel

    return _values_of(_nifti(path, nibabel), ())


def _values_of(image: Any, index: tuple[Any, ...]) -> np.ndarray:
    """Return these of an image's values, as float32 where its header scales them."""
    values = np.asanyarray(image.dataobj[index])
    is_scaled = values.dtype != image.header.get_data_dtype().newbyteorder("=")
    return values.astype(np.float32) if is_scaled else values.astype(values.dtype.newbyteorder("="))


def _open_dicom(path: Path) -> Volume:
    import_extra("pydicom", "dicom", path)
    import pydicom.pixels

    found: Any = pydicom.dcmread(path)
    sections, channels = int(found.get("NumberOfFrames", 1) or 1), int(found.SamplesPerPixel)
    shape = (sections, int(found.Rows), int(found.Columns), channels)
    dtype = np.dtype(f"{'i' if found.PixelRepresentation else 'u'}{max(1, found.BitsAllocated // 8)}")
    photometric, syntax = found.PhotometricInterpretation, found.file_meta.TransferSyntaxUID
    if not photometric.startswith(("MONOCHROME", "RGB", "YBR_")):
        raise ValueError(f"pixels of {photometric}, and not grey or RGB")
    is_compressed = syntax.is_compressed
    claimed = math.prod(shape) * found.BitsAllocated // 8
    slope, intercept = float(found.get("RescaleSlope", 1)), float(found.get("RescaleIntercept", 0))

    def read(section: int) -> np.ndarray:
        try:
            index = section if sections > 1 else None
            pixels = pydicom.pixels.pixel_array(found, index=index).reshape(shape[1:])
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            if is_compressed:
                raise MissingPackageError(
                    f"{path}: expected a package that decodes {syntax.name}, got none: pip install 'fastunet[dicom]'"
                ) from error
            raise
        if photometric == "MONOCHROME1":  # 0 is white
            pixels = dtype.type(2**found.BitsStored - 1) - pixels if dtype.kind == "u" else -1 - pixels
        return pixels if (slope, intercept) == (1, 0) else (pixels * slope + intercept).astype(np.float32)

    return Volume(shape, dtype, claimed, CODEC if is_compressed else GZIP if syntax.is_deflated else 1, read)


def zarr_array(path: Path) -> Any:
    """Open a Zarr array, of an OME-Zarr group that of the largest resolution. Raises DataError where there is none."""
    import zarr

    try:
        found: Any = zarr.open(str(path), mode="r")
        if isinstance(found, zarr.Group):
            attributes: Any = dict(found.attrs)
            scales = attributes.get("ome", attributes).get("multiscales")
            if not scales:
                raise ValueError("a group without arrays in resolutions (OME-Zarr)")
            found = found[scales[0]["datasets"][0]["path"]]
        # A chunk is decoded as a whole, however small the array that it is of.
        with room_for(path, found.chunks, 8 * found.dtype.itemsize, 0, 1):
            pass
    except DataError:
        raise
    except Exception as error:
        got = " ".join(str(error).split()) if path.exists() else what_is_there(path)
        raise DataError(f"{path}: expected a Zarr array, got: {got or type(error).__name__}") from error
    return found


def open_zarr(path: Path) -> Volume:
    """Open a Zarr array, of the largest resolution where it is an OME-Zarr group, as [N, H, W] or [H, W, C]."""
    found = zarr_array(path)
    kept = [axis for axis, size in enumerate(found.shape) if size != 1 or axis >= found.ndim - 2]
    sections, height, width, channels = _interpret(tuple(found.shape[axis] for axis in kept))

    def read(section: int) -> np.ndarray:
        index: list[Any] = [slice(None) if axis in kept else 0 for axis in range(found.ndim)]
        if sections > 1:
            index[kept[0]] = section
        return np.asarray(found[tuple(index)]).reshape(height, width, channels)

    # What is not stored is the fill value, of any size.
    return Volume((sections, height, width, channels), found.dtype, 0, 1, read)
