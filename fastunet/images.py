"""Read microscopy and camera files without losing range: TIFF through tifffile, everything else through Pillow."""

from __future__ import annotations

from pathlib import Path

import kornia.io
import numpy as np
import tifffile
from PIL import Image, ImageOps

from .checks import DataError

TIFF_SUFFIXES = (".tif", ".tiff")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", *TIFF_SUFFIXES)
ALPHA_SAMPLES = (1, 2)  # TIFF's ExtraSamples: associated and unassociated alpha


def list_images(folder: Path) -> dict[str, Path]:
    """Map stem to file for the images of one folder, sorted by stem; hidden and other files are passed over.

    Raises:
        DataError: the folder is missing or holds no image, or two files share a stem.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder, got {'a file' if folder.exists() else 'nothing there'}")
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    images: dict[str, Path] = {}
    for file in (file for file in files if file.suffix.lower() in SUFFIXES):
        if file.stem in images:
            raise DataError(f"{file}: expected one file per stem, got {images[file.stem].name} and {file.name}")
        images[file.stem] = file
    if not images:
        raise DataError(f"{folder}: expected images ({' '.join(SUFFIXES)}), got none among {len(files)} files")
    return dict(sorted(images.items()))


def find_images(path: str | Path) -> list[Path]:
    """List the images to predict on: one file, the files of a folder, or those of a data root's `images/`.

    Raises:
        DataError: nothing there, no image in it, or an unsupported suffix.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path}: expected an image ({' '.join(SUFFIXES)}), got suffix {path.suffix!r}")
        return [path]
    subfolder = path / "images"
    return list(list_images(subfolder if subfolder.is_dir() else path).values())


def read_image(path: str | Path) -> np.ndarray:
    """Read one image as [H, W, C] in its file's own range: uint8, uint16 or float32.

    Grey gives C = 1; palettes become RGB; 1-bit becomes 0 and 255; EXIF orientation is applied. Other integer and
    float types become float32 where that loses nothing. An alpha channel is dropped if it is opaque everywhere; if
    not, the colours behind it mean nothing by themselves and the file is refused. Of a TIFF, the axis of samples or
    channels comes last wherever it is stored; so does an unnamed axis of length 3 or 4.

    Raises:
        DataError: unreadable or truncated, several images in one file, transparent, NaN or infinite values, or values
            that float32 cannot hold.
    """
    path = Path(path)
    pixels = _decode(path, colours=True)
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels
    return _exact_float32(path, pixels)


def read_mask(path: str | Path) -> np.ndarray:
    """Read one mask as integers [H, W], the values of the file: palette indices stay indices, 1-bit becomes 0 and 255.

    Raises:
        DataError: as `read_image`, or colour channels that differ, or fractions.
    """
    path = Path(path)
    pixels = _decode(path, colours=False)
    mask = pixels[..., 0]
    if (pixels != mask[..., None]).any():
        raise DataError(f"{path}: expected a mask of one channel, got {pixels.shape[2]} channels that differ")
    if mask.dtype.kind in "iu":
        return mask
    integers = _exact_float32(path, mask).astype(np.int64)
    if (integers != mask).any():
        raise DataError(f"{path}: expected whole numbers in a mask, got {float(mask[integers != mask][0])}")
    return integers


def _decode(path: Path, colours: bool) -> np.ndarray:
    """Read a file as [H, W, C] without alpha; palettes as colours or as indices."""
    read = _read_tiff if path.suffix.lower() in TIFF_SUFFIXES else _read_pillow
    try:
        pixels, has_alpha = read(path, colours)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # broken files make the decoders raise anything from OSError to struct.error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: expected a readable image, got: {reason}") from error
    if pixels.dtype == np.bool_:
        pixels = pixels * np.uint8(255)
    if pixels.dtype.kind not in "iuf":
        raise DataError(f"{path}: expected integers or floats, got {pixels.dtype}")
    if has_alpha:
        pixels = _without_alpha(path, pixels)
    return np.ascontiguousarray(pixels)


def _read_pillow(path: Path, colours: bool) -> tuple[np.ndarray, bool]:
    """Read with Pillow: pixels [H, W, C], and whether the last channel is alpha."""
    with Image.open(path) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # in an MPO, a phone's JPEG, the other frames are previews
            raise DataError(f"{path}: expected one image, got {frames} frames")
        if image.mode in ("RGB", "RGBA") and image.tile and str(image.tile[0][3]).endswith(";16B"):
            return _read_colour_png16(path), image.mode == "RGBA"
        upright = ImageOps.exif_transpose(image)
    if upright.mode == "P" and colours:
        upright = upright.convert("RGBA" if "transparency" in upright.info else "RGB")
    elif upright.mode == "1":
        upright = upright.convert("L")
    elif upright.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        upright = upright.convert("RGB")
    pixels = np.asarray(upright)
    if upright.mode.startswith("I"):  # 16-bit grey PNG: older Pillow hands it out as 32-bit
        pixels = pixels.astype(np.uint16)
    return np.atleast_3d(pixels), upright.mode in ("LA", "RGBA")


def _read_colour_png16(path: Path) -> np.ndarray:
    """Read a 16-bit colour PNG, of which Pillow keeps only the upper 8 bits, as [H, W, C]."""
    pixels = kornia.io.load_image(path, kornia.io.ImageLoadType.UNCHANGED).permute(1, 2, 0).numpy()
    if pixels.dtype != np.uint16:
        raise DataError(f"{path}: expected 16 bits per channel from the decoder, got {pixels.dtype}; save it as TIFF")
    return pixels


def _read_tiff(path: Path, colours: bool) -> tuple[np.ndarray, bool]:
    """Read with tifffile: pixels [H, W, C], and whether the last channel is alpha."""
    with tifffile.TiffFile(path) as tiff:
        if len(tiff.series) != 1:
            raise DataError(f"{path}: expected one image, got {len(tiff.series)} images of different shapes")
        series = tiff.series[0]
        page = series.keyframe
        kept = [(axis, size) for axis, size in zip(series.axes, series.shape, strict=True) if size > 1 or axis in "YX"]
        axes = "".join(axis for axis, _ in kept)
        other = axes.replace("Y", "").replace("X", "")
        # Q is tifffile's name for an axis without meaning: of length 3 or 4 it is colour far more often than depth.
        is_channel = other in ("", "S", "C") or (other == "Q" and series.shape[series.axes.index("Q")] in (3, 4))
        if not is_channel:
            raise DataError(
                f"{path}: expected one image, got a stack of shape {series.shape} (axes {series.axes}): "
                "save each slice as a file of its own"
            )
        pixels = series.asarray().reshape([size for _, size in kept])
        if colours and page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            # Colour maps hold 16 bits per colour; what they were made from had 8.
            return np.moveaxis(page.colormap[:, pixels] >> 8, 0, -1).astype(np.uint8), False
        pixels = np.moveaxis(pixels, axes.index(other), -1) if other else pixels[..., None]
        return pixels, other == "S" and any(sample in ALPHA_SAMPLES for sample in page.extrasamples)


def _without_alpha(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Drop the last channel if it is opaque everywhere."""
    opaque = 1 if pixels.dtype.kind == "f" else np.iinfo(pixels.dtype).max
    lowest = pixels[..., -1].min()
    if lowest != opaque:
        raise DataError(
            f"{path}: expected no transparency (alpha {opaque} everywhere), got alpha {lowest}: "
            "flatten the image; of data channels, save TIFF with photometric minisblack"
        )
    return pixels[..., :-1]


def _exact_float32(path: Path, values: np.ndarray) -> np.ndarray:
    """Convert to float32, refusing what is not finite or would change."""
    if not np.isfinite(values).all():
        raise DataError(f"{path}: expected finite values, got NaN or infinity")
    with np.errstate(over="ignore"):
        converted = values.astype(np.float32)
    changed = converted != values
    if changed.any():
        raise DataError(
            f"{path}: expected values that float32 holds exactly, got {values[changed][0]} in {values.dtype}: "
            "save it as float32 or uint16"
        )
    return converted
