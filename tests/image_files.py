"""Image files for tests: noise, and how it is saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image


def noise(shape: tuple[int, ...], dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    high = {"uint8": 256, "uint16": 65536}[dtype]
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in (".tif", ".tiff"):
        tifffile.imwrite(path, pixels)
    else:
        Image.fromarray(pixels).save(path)
    return path
