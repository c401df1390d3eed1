"""Cell-like fluorescence micrographs with exact masks: data to try everything on, without a download.

Cells are star-shaped outlines with a wavy radius, and the mask is that geometry itself. The image gives each a
brightness, a nucleus and a texture of its own and adds what makes real micrographs hard: light from cells out of focus,
bright debris, uneven illumination, blur and shot noise. Dim cells are darker than much of the background, so that no
threshold separates them. All lengths are in pixels, all light in units of full brightness.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from fastunet.checks import ConfigError, DataError
from fastunet.files import save_png

SMALLEST = 32
RADII = (11.0, 25.0)
CELL_AREA = 1900  # field per cell
WAVES = np.arange(2, 7)  # harmonics of a cell's outline
BRIGHTNESS = (0.14, 0.6)
PHOTONS = 110.0  # per pixel at full brightness: sets the shot noise
READ_NOISE = 0.012
BLUR = 1.1  # sigma


def cells(
    count: int,
    size: int = 256,
    seed: int = 0,
    *,
    radii: tuple[float, float] = RADII,
    area_per_cell: int = CELL_AREA,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Make images and masks, uint8 [size, size] each; masks hold 0 and 255. The same arguments give the same pixels.

    Radii are drawn from a range, and so many cells are tried to be placed as the field holds `area_per_cell`.

    Raises:
        ConfigError: `count` below 1 or `size` below 32.
    """
    if count < 1 or size < SMALLEST:
        raise ConfigError(f"cells: expected count >= 1 and size >= {SMALLEST}, got {count} and {size}")
    pictures = [
        _micrograph(size, generator, radii, area_per_cell) for generator in np.random.default_rng(seed).spawn(count)
    ]
    return [image for image, _ in pictures], [mask for _, mask in pictures]


def write_dataset(root: str | Path, count: int, size: int = 256, seed: int = 0, **sizes: Any) -> None:
    """Write `cells` to `root/images` and `root/masks` as cell_000.png, cell_001.png, ...; `sizes` are its others.

    Raises:
        DataError: one of the files is there already, of whatever content.
    """
    pictures = cells(count, size, seed, **sizes)
    folders = [Path(root) / name for name in ("images", "masks")]
    files = [[folder / f"cell_{index:03}.png" for index in range(count)] for folder in folders]
    if taken := [file for file in (*files[0], *files[1]) if os.path.lexists(file)]:
        raise DataError(f"{taken[0]}: expected nothing there yet, got a file")
    for folder, names, arrays in zip(folders, files, pictures, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        for file, array in zip(names, arrays, strict=True):
            save_png(file, array)


def _micrograph(
    size: int, generator: np.random.Generator, radii: tuple[float, float], area_per_cell: int
) -> tuple[np.ndarray, np.ndarray]:
    """One image and its mask."""
    light = np.zeros((size, size))
    inside = np.zeros((size, size), bool)
    texture = _smooth_noise(size, 1.5, generator)
    for row, column, radius in _place_cells(size, generator, radii, area_per_cell):
        _add_cell(light, inside, texture, row, column, radius, generator)
    for number, sigmas, amplitudes in (
        (size**2 // 6500, (14.0, 34.0), (0.08, 0.3)),  # cells out of focus
        (size**2 // 4500, (0.8, 2.2), (0.25, 0.9)),  # debris
    ):
        for _ in range(number):
            sigma, center = generator.uniform(*sigmas), generator.uniform(0, size, 2)
            rows, columns = np.exp(-(((np.arange(size) - center[:, None]) / sigma) ** 2) / 2)
            light += np.outer(rows, columns) * generator.uniform(*amplitudes)
    illumination = 1 + 0.22 * _smooth_noise(size, size / 5, generator)
    scene = _blur((light + 0.04) * np.clip(illumination, 0.4, 1.6), BLUR)
    # The transform's rounding may leave a tiny negative, which Poisson refuses.
    photons = generator.poisson(np.clip(scene, 0, None) * PHOTONS)
    signal = photons / PHOTONS + generator.normal(0, READ_NOISE, scene.shape)
    return (np.clip(signal, 0, 1) * 255).astype(np.uint8), inside.astype(np.uint8) * 255


def _place_cells(
    size: int, generator: np.random.Generator, radii: tuple[float, float], area_per_cell: int
) -> list[tuple[float, float, float]]:
    """Choose (row, column, radius) at random, some across the border, none on top of another."""
    placed: list[tuple[float, float, float]] = []
    for _ in range(4 * size**2 // area_per_cell):
        row, column = generator.uniform(-5, size + 5, 2)
        radius = generator.uniform(*radii)
        if all(np.hypot(row - r, column - c) > 1.02 * (radius + other) for r, c, other in placed):
            placed.append((row, column, radius))
    return placed


def _add_cell(
    light: np.ndarray,
    inside: np.ndarray,
    texture: np.ndarray,
    row: float,
    column: float,
    radius: float,
    generator: np.random.Generator,
) -> None:
    """Draw one cell into `light` and its exact area into `inside`, both [size, size]."""
    down = (np.arange(light.shape[0]) - row)[:, None]
    right = (np.arange(light.shape[1]) - column)[None, :]
    reach = 1.6 * radius  # beyond any outline: only this window is computed
    window = np.ix_(np.abs(down[:, 0]) < reach, np.abs(right[0]) < reach)
    down, right = down[window[0][:, 0]], right[:, window[1][0]]
    amplitudes = generator.normal(0, 0.3, len(WAVES)) / WAVES**1.6
    phases = generator.uniform(0, 2 * np.pi, len(WAVES))
    angle = np.arctan2(down, right)[..., None]
    outline = radius * (1 + (amplitudes * np.cos(WAVES * angle + phases)).sum(-1))
    distance = np.hypot(down, right) / outline  # 1 on the outline
    body = distance < 1
    nucleus = 0.5 * np.exp(-((distance / 0.42) ** 4))
    membrane = 0.3 * np.exp(-(((distance - 0.95) / 0.1) ** 2))
    shade = 0.6 + nucleus + membrane + 0.13 * texture[window]
    light[window] += body * generator.uniform(*BRIGHTNESS) * np.clip(shade, 0.1, None)
    inside[window] |= body


def _smooth_noise(size: int, sigma: float, generator: np.random.Generator) -> np.ndarray:
    """Noise of mean 0 and standard deviation 1 whose grain has size `sigma`."""
    noise = _blur(generator.normal(size=(size, size)), sigma)
    return (noise - noise.mean()) / noise.std()


def _blur(picture: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur; continues beyond the border by mirroring."""
    from scipy.ndimage import fourier_gaussian

    margin = min(int(2 * sigma) + 1, len(picture) - 1)
    padded = np.pad(picture, margin, mode="reflect")
    spectrum = fourier_gaussian(np.fft.rfft2(padded), sigma, len(padded))
    return np.fft.irfft2(spectrum, s=padded.shape)[margin:-margin, margin:-margin]
