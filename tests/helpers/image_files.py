"""Image files for tests: noise, and how it is saved, also as libraries would not; a folder of images and masks."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image


def noise(shape: tuple[int, ...], dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    high = {"uint8": 256, "uint16": 65536}[dtype]
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in (".tif", ".tiff"):
        tifffile.imwrite(path, pixels, **options)
    else:
        Image.fromarray(pixels).save(path, **options)
    return path


def make_data(root: Path, count: int = 4, size: tuple[int, int] = (12, 10)) -> Path:
    """Write `count` grey images a, b, ... with binary masks of which each has some foreground."""
    for index, stem in enumerate("abcdefgh"[:count]):
        save(root / "images" / f"{stem}.png", noise(size, seed=index))
        mask = np.zeros(size, np.uint8)
        mask[index : index + 3, 2:5] = 255
        save(root / "masks" / f"{stem}.png", mask)
    return root


def png(header: tuple[int, ...], rows: bytes, **chunks: bytes) -> bytes:
    """A PNG of width, height, bits, colour type, 0, 0, 0, and rows with a filter's byte before each."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    extra = [chunk(kind.encode(), body) for kind, body in chunks.items()]
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", *header)), *extra, chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def save_png(path: Path, pixels: np.ndarray, bits: int, **chunks: bytes) -> Path:
    """Write [H, W, C] of 1 to 16 bits as PNG, of which Pillow writes not every kind; with PLTE, as indices."""
    height, width, channels = pixels.shape
    colour_type = 3 if "PLTE" in chunks else {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    values = pixels.reshape(height, -1).astype(">u2").view(np.uint8).reshape(height, -1, 2)
    rows = np.packbits(np.unpackbits(values, axis=-1)[..., 16 - bits :].reshape(height, -1), axis=-1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    path.write_bytes(png((width, height, bits, colour_type, 0, 0, 0), raw, **chunks))
    return path


def tiff(tags: dict[int, int], data: bytes = b"\0" * 16, following: int = 0) -> bytes:
    """A grey TIFF of 16 x 16 bytes with only `data` behind its header, changed by `tags`; those of -1 are left out."""
    plain = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 273: 16, 277: 1, 278: 16, 279: len(data)}
    kept = {tag: value for tag, value in sorted((plain | tags).items()) if value >= 0}
    entries = b"".join(struct.pack("<HHQQ", tag, 16, 1, value) for tag, value in kept.items())  # of 64 bits each
    header = b"II+\0" + struct.pack("<HHQ", 8, 0, 16 + len(data))
    return header + data + struct.pack("<Q", len(kept)) + entries + struct.pack("<Q", following)


def write_masks(root: Path, mask: np.ndarray, count: int = 4) -> Path:
    """A data folder of equal masks, the images being the masks with noise."""
    generator = np.random.default_rng(0)
    for index in range(count):
        save(root / f"images/{index}.png", mask // 2 + generator.integers(0, 40, mask.shape).astype(np.uint8))
        save(root / f"masks/{index}.png", mask)
    return root
