"""Find images and masks, and read them without losing range: the same picture reads the same from any format."""

from __future__ import annotations

import glob
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fastunet.checks import DataError
from fastunet.data.decoding import decode, spread
from fastunet.data.picture import Picture, what_is_there
from fastunet.data.volumes import is_zarr

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".npy", ".nii", ".nii.gz", ".dcm", ".tif", ".tiff",
)  # fmt: skip


def suffix_of(path: Path) -> str:
    """Return the suffix of an image, as its name has it, or nothing."""
    name = path.name.lower()
    found = max((suffix for suffix in (*SUFFIXES, ".zarr") if name.endswith(suffix)), key=len, default="")
    return path.name[len(name) - len(found) :] if found else ""


def entries_of(folder: Path, *, nested: bool = False) -> list[Path]:
    """List what is in a folder, or anywhere below it, but what is hidden; sorted."""
    found = folder.rglob("*") if nested else folder.iterdir()
    return sorted(each for each in found if not any(p.startswith(".") for p in each.relative_to(folder).parts))


def by_stem(folder: Path, files: Iterable[Path], suffix_of: Callable[[Path], str]) -> dict[str, Path]:
    """Map stem to file, sorted by stem: the place below the folder without suffix.

    Stems are in Unicode's composed form (NFC): macOS decomposes the names of files, other systems leave them.

    Raises:
        DataError: two files share a stem.
    """
    found: dict[str, Path] = {}
    for file in files:
        stem = unicodedata.normalize("NFC", file.relative_to(folder).as_posix().removesuffix(suffix_of(file)))
        if stem in found:
            raise DataError(f"{file}: expected one file per stem, got {found[stem].name} and {file.name}")
        found[stem] = file
    return dict(sorted(found.items()))


def list_images(folder: Path, *, nested: bool = False) -> dict[str, Path]:
    """Map stem to file, or Zarr array, for the images of one folder, `by_stem`; other files are passed over.

    Args:
        nested: list the folders within too; stems begin with their names.

    Raises:
        DataError: the folder is missing, unreadable or holds no image, or two files share a stem.
    """
    with _named(folder):
        if not folder.is_dir():
            raise DataError(f"{folder}: expected a folder, got {what_is_there(folder)}")
        found = entries_of(folder, nested=nested)
        arrays = {each for each in found if is_zarr(each)}  # each is one image, whatever is in it
        # A link to nothing is listed, so that reading it says so; a pipe, which reading would wait for, is not.
        files = [
            each for each in found if each in arrays or each.is_file() or (each.is_symlink() and not each.exists())
        ]
    images = [file for file in files if (suffix_of(file) or file in arrays) and arrays.isdisjoint(file.parents)]
    if not images:
        raise DataError(f"{folder}: expected images ({' '.join(SUFFIXES)}), got none among {len(files)} files")
    return by_stem(folder, images, suffix_of)


def find_images(*paths: str | Path) -> list[Path]:
    """List the images to predict on: files, Zarr arrays, the files of folders or of a data root's `images/`, patterns.

    A pattern (`*`, `?`, `[...]`) is one where nothing has its name. Each file comes once.

    Raises:
        DataError: nothing there, no image in it, or an unsupported suffix.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        matches = [] if os.path.lexists(path) else [Path(name) for name in sorted(glob.glob(str(path)))]
        if not matches and {"*", "?"} & set(str(path)) and not os.path.lexists(path):
            raise DataError(f"{path}: expected files that match the pattern, got none")
        for match in matches or [path]:
            found |= dict.fromkeys(_images_at(match))
    return list(found)


def _images_at(path: Path) -> list[Path]:
    with _named(path):
        if path.is_file():
            if not suffix_of(path):
                raise DataError(f"{path}: expected an image ({' '.join(SUFFIXES)}), got suffix {path.suffix!r}")
            return [path]
        if is_zarr(path):
            return [path]
        subfolder = path / "images"
        return [*list_images(subfolder if subfolder.is_dir() else path).values()]


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what the system refuses, such as a folder without permission, into an error that names `path`."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: expected a readable file or folder, got: {error.strerror}") from error


def read_image(path: str | Path, section: int | None = None) -> np.ndarray:
    """Read one image as [H, W, C] in its file's own range: uint8, uint16 or float32.

    The format is told by the content: PNG, JPEG, BMP, TIFF, GIF, WebP, NPY, NIfTI, DICOM or Zarr. Grey gives C = 1;
    palettes, CMYK and YCbCr become RGB; 1, 2 and 4 bits are spread over 0 to 255; 0 is black, also in a TIFF that
    stores white as 0; the orientation of EXIF and TIFF is applied. Other integer and float types become float32 where
    that loses nothing. An alpha channel is dropped if it is opaque everywhere; if not, the colours behind it mean
    nothing by themselves and the file is refused. Of a TIFF, the axis of samples or channels comes last wherever it is
    stored; so does an unnamed axis of length 3 or 4. Of a file that holds several images, `section` is one's number.

    Raises:
        DataError: unreadable or truncated; a header that claims more than the file can hold, or more than the memory
            has room for; several images in one file; transparent; NaN or infinite values, or values that float32 cannot
            hold; a colour space that is not converted.
    """
    path = Path(path)
    picture = decode(path, section)
    if picture.palette is not None:
        colours = picture.palette[picture.pixels[..., 0]]
        bits, alpha = 8 * colours.itemsize, 3 if colours.shape[2] == 4 else None
        picture = Picture(colours, bits, alpha=alpha)
    pixels = np.ascontiguousarray(spread(_without_alpha(path, picture), picture.bits))
    return pixels if pixels.dtype in (np.uint8, np.uint16) else _exact_float32(path, pixels)


def read_mask(path: str | Path, section: int | None = None) -> np.ndarray:
    """Read one mask as integers [H, W], the values of the file: palette indices stay indices, 1-bit becomes 0 and 255.

    Raises:
        DataError: as `read_image`, or colour channels that differ, or fractions.
    """
    path = Path(path)
    mask, are_colours = read_codes(path, section)
    if are_colours:
        raise DataError(f"{path}: expected a mask of one channel, got 3 channels that differ")
    return mask


def read_codes(
    path: Path, section: int | None = None, *, colours: bool = False, any_numbers: bool = False
) -> tuple[np.ndarray, bool]:
    """Read the values of a mask [H, W], and tell whether they are colours, which come as 0xRRGGBB.

    Args:
        section: of a file that holds several.
        colours: whatever is there is taken as colours, also palettes.
        any_numbers: fractions are taken too, and of colours the mean of the channels.

    Raises:
        DataError: as `read_image`, or fractions, or channels that differ and are no colours of 8 bits.
    """
    picture = decode(path, section)
    if colours and picture.palette is not None:
        picture = Picture(picture.palette[picture.pixels[..., 0]][..., :3], 8)
    pixels = _without_alpha(path, picture)
    differ = any((pixels[..., channel] != pixels[..., 0]).any() for channel in range(1, pixels.shape[2]))
    if any_numbers:
        _check_finite(path, pixels)
        return pixels.mean(-1) if differ else _first_channel(picture, pixels), False
    if colours or (differ and pixels.shape[2] == 3):
        if pixels.dtype != np.uint8 or pixels.shape[2] not in (1, 3):
            raise DataError(f"{path}: expected colours of 3 x 8 bits, got {pixels.shape[2]} x {pixels.dtype}")
        red, green, blue = np.moveaxis(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).astype(np.int32), -1, 0)
        return red << 16 | green << 8 | blue, True
    if differ:
        raise DataError(f"{path}: expected a mask of one channel, got {pixels.shape[2]} channels that differ")
    return _whole_numbers(path, _first_channel(picture, pixels)), False


def _first_channel(picture: Picture, pixels: np.ndarray) -> np.ndarray:
    mask = np.ascontiguousarray(pixels[..., 0])
    return spread(mask, 1) if picture.bits == 1 and picture.palette is None else mask


def _whole_numbers(path: Path, mask: np.ndarray) -> np.ndarray:
    if mask.dtype.kind in "iu":
        return mask
    integers = _exact_float32(path, mask).astype(np.int64)
    if (integers != mask).any():
        raise DataError(
            f"{path}: expected whole numbers in a mask, got {float(mask[integers != mask][0])}: of a soft mask, "
            "--threshold 0.5 tells foreground from background"
        )
    return integers


def _without_alpha(path: Path, picture: Picture) -> np.ndarray:
    """Give the channels [H, W, C] but alpha, refusing an image that is not opaque everywhere."""
    pixels, alpha = picture.pixels, picture.alpha
    if picture.hidden is not None and (pixels == picture.hidden).all(-1).any():
        raise DataError(f"{path}: expected no transparency, got pixels of its transparent colour {picture.hidden}")
    if alpha is None:
        return pixels
    kind = pixels.dtype.kind
    opaque = 1 if kind == "f" else np.iinfo(pixels.dtype).max if kind == "i" else 2**picture.bits - 1
    lowest = pixels[..., alpha].min()
    if lowest != opaque:
        raise DataError(
            f"{path}: expected no transparency (alpha {opaque} everywhere), got alpha {lowest}: "
            "flatten the image; of data channels, save TIFF with photometric minisblack"
        )
    return np.delete(pixels, alpha, -1)


def _check_finite(path: Path, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise DataError(f"{path}: expected finite values, got NaN or infinity")


def _exact_float32(path: Path, values: np.ndarray) -> np.ndarray:
    """Convert to float32, refusing what is not finite or would change."""
    _check_finite(path, values)
    with np.errstate(over="ignore"):
        converted = values.astype(np.float32)
    changed = converted != values
    if changed.any():
        raise DataError(
            f"{path}: expected values that float32 holds exactly, got {values[changed][0]} in {values.dtype}: "
            "save it as float32 or uint16"
        )
    return converted
