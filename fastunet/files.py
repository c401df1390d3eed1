"""What fastunet writes: whole under its name or not at all, and never over what it has not written itself."""

from __future__ import annotations

import json
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checks import DataError

if TYPE_CHECKING:
    import numpy as np

SOFTWARE = "fastunet"  # the PNG's field of this name says who wrote it
LOCK = ".fastunet.lock"
LONGEST_SUFFIX = 100  # bytes; longer ones are no format's


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Return a temporary path beside `path`: moved to it when the block ends, removed when it raises.

    What is moved is on the disk already, and has the permissions of any new file, whatever those its writer chose.
    """
    path = Path(path)
    # Short, since the name of `path` may be as long as the system allows. The suffix stays last: writers choose their
    # format by it.
    suffix = path.suffix if len(os.fsencode(path.suffix)) < LONGEST_SUFFIX else ""
    temporary = path.with_name(f".{secrets.token_hex(8)}{suffix}")
    temporary.touch(exist_ok=False)
    try:
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def check_folder(folder: Path) -> None:
    """Raise DataError unless files can be written into `folder`, made first where it is missing; leave nothing there.

    Raises OSError where the system refuses the name itself.
    """
    for place in (folder, *folder.parents):
        try:
            mode = os.stat(place).st_mode
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                raise DataError(f"{place}: expected a folder, got a link to nothing") from None
            continue
        if not stat.S_ISDIR(mode):
            raise DataError(f"{place}: expected a folder, got a file")
        try:
            with tempfile.TemporaryFile(dir=place):
                return
        except OSError as error:
            raise DataError(f"{place}: expected a folder to write into, got: {error.strerror}") from error


def check_apart(out: Path, files: Iterable[Path]) -> None:
    """Raise DataError where `out` is a folder of the input files, of their targets if they are links, or of masks.

    An input may itself be a folder: of masks, or a Zarr array.
    """
    places: set[Path] = set()
    for file in files:
        for folder in (file.parent.absolute(), file.parent.resolve(), file.resolve().parent):
            places |= {folder, folder.parent / "masks"} if folder.name == "images" else {folder}
        places |= {file} if file.is_dir() else set()
    for place in places:
        if out.exists() and place.exists() and os.path.samefile(out, place):
            raise DataError(f"{out}: expected a folder apart from the images and masks, got that of {place}")


def check_replaceable(path: Path, overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    """Raise DataError where something is at `path`, unless it may be overwritten and fastunet wrote it.

    Raises OSError where the system refuses the name itself, in a folder that is still to be made too.
    """
    folder = next(place for place in path.parents if place.is_dir())
    with suppress(FileNotFoundError):
        os.lstat(folder / path.name)
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise DataError(f"{path}: expected nothing there, got a file (--overwrite replaces what fastunet wrote)")
    # Of a pipe `is_ours` would wait for what it reads.
    if path.is_symlink() or not (path.is_file() or path.is_dir()) or not is_ours(path):
        raise DataError(f"{path}: expected a file that fastunet wrote, got another: --overwrite does not replace it")


def is_our_png(path: Path) -> bool:
    """Whether fastunet wrote this picture."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except Exception:  # no picture, or a broken one: a decoder raises anything
        return False


def is_our_json(path: Path, keys: Iterable[str]) -> bool:
    """Whether this is a JSON object with all of the keys."""
    try:
        return set(keys) <= json.loads(path.read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def save_png(path: Path, pixels: np.ndarray, palette: np.ndarray | None = None) -> None:
    """Write uint8 pixels [H, W] or [H, W, 3] as a PNG that `is_our_png` knows, whole or not at all.

    palette: colours uint8 [256, 3], of which the pixels are indices.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(palette.tobytes())
    with written_whole(path) as temporary:
        image.save(temporary, pnginfo=mark)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` and hold its lock, which dies with the process; leave neither where nothing came into it.

    Raises DataError where another holds the lock.
    """
    from filelock import FileLock, Timeout

    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DataError(f"{folder}: expected no training in it, got one that is still running") from None
    try:
        yield
    finally:
        # Before the release: the next to hold it must not lose its own.
        with suppress(OSError):
            (folder / LOCK).unlink()
        lock.release()
        for place in made:
            with suppress(OSError):  # not empty
                place.rmdir()
