"""One decoded image, and the room that decoding it takes, found before any is taken."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fastunet.checks import DataError

# Bytes of pixels that a byte of the file can stand for, at most: DEFLATE's longest match is 258 bytes in 2 bits; an LZW
# code of 12 bits stands for less than 4096; PackBits repeats 128 in 2; a baseline JPEG has a bit for each 8x8 block or
# more, and at most 18 blocks for 32x32 pixels of 3 channels; BMP's runs are of 255 in 2.
DEFLATE, LZW, PACKBITS, JPEG, RUNS = 1032, 2731, 64, 1366, 128
# Codecs that write a blank tile, or row, in a few bits. What they claim beyond is refused for the machine's memory.
BLANK = 2**16
COPIES = 4  # of an image that decoding holds at its peak, at most
LARGE = 2**28  # bytes: above, one image is decoded at a time, since each thread alone would find the memory free
_one_large = threading.Lock()


@dataclass(frozen=True)
class Picture:
    """One decoded image."""

    pixels: np.ndarray  # [H, W, C], upright, the file's values with 0 as black; of a palette, the indices [H, W, 1]
    bits: int  # of each value
    palette: np.ndarray | None = None  # colours [N, 3], or [N, 4] with alpha
    alpha: int | None = None  # which of the C channels is alpha
    hidden: Any = None  # the colour [C] that stands for full transparency


def what_is_there(path: Path) -> str:
    """Say what a path is that should be something else."""
    if path.is_symlink() and not path.exists():
        return f"a link to {os.readlink(path)}, where nothing is"
    if not path.exists():
        return "nothing there"
    return "a folder" if path.is_dir() else "a file" if path.is_file() else "neither a file nor a folder"


@contextmanager
def room_for(path: Path, shape: tuple[int, ...], bits: int, claimed: int, expansion: int) -> Iterator[None]:
    """Run a block that decodes, unless the pixels are more than the file can hold or the memory has room for."""
    size = path.stat().st_size
    described = f"{' x '.join(map(str, shape))} values of {bits} bits"
    if 0 in shape:
        raise ValueError(f"no pixels, but {described}")
    if claimed > size * expansion:
        raise ValueError(
            f"a header that claims {described} ({claimed} bytes) in a file of {size} bytes, "
            f"which hold at most {size * expansion}"
        )
    needed = math.prod(shape) * -(-bits // 8) * COPIES
    with _one_large if needed > LARGE else nullcontext():
        free = free_memory()
        if needed > free:
            raise DataError(
                f"{path}: expected an image that takes at most {free / 2**30:.1f} GiB of memory to decode, "
                f"got {described} ({needed / 2**30:.1f} GiB): cut it into parts"
            )
        yield


def free_memory() -> int:
    """Return the bytes that are free, of the machine or of its container."""
    bounds = [psutil.virtual_memory().available]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such file, or "max"
            bounds.append(int(Path(limit).read_text()) - psutil.Process().memory_info().rss)
    return min(bounds)


def upright(pixels: np.ndarray, orientation: int | None) -> np.ndarray:
    """Turn [H, W, C] as TIFF's and EXIF's tag 274 says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels
