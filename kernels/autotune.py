"""What is known of the kernels on a GPU: which came out right, which configurations are fastest, and against ATen.

Tables have rows of one form. "op", "dtype" (bfloat16, float16, float32 or tf32) and "shape" say what a row is of, and
one more field what is known of it:

    failed    of a family of kernels that was checked on this GPU: what is wrong, "" if nothing
    config    of a kernel: its fastest configuration; the heuristic one stands where there is no row
    speedup   of a layer: how many times as long ATen takes, at least, in nine rounds of ten
    skipped   of a layer that this process leaves unmeasured: why

No row depends on the batch size. A row is looked up in this process, in the cache file of this environment, and in the
package's tuned/<gpu>.json, which `python -m benchmarks tune` writes. Looking up measures nothing.

FASTUNET_CACHE names the folder of cache files. FASTUNET_TUNE=force takes no row from a file: all is measured again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

TUNED = Path(__file__).parent / "tuned"
_REMEMBERED = 4096

# At the end of the names of ops, and of kernels with configurations, that are known for themselves by stride 2.
STRIDE2 = "_stride2"

T = TypeVar("T")
Row = dict[str, Any]
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Layer:
    """An op on images of a size, by which a table knows how fast it is.

    c_out, c_in: the weight's first two sizes, or 0 and the image's channels where there is no weight. training: forward
    and backward together, else forward without gradients.
    """

    op: str
    c_out: int
    c_in: int
    height: int
    width: int
    training: bool

    @property
    def shape(self) -> dict[str, Any]:
        """Return the "shape" of its row."""
        return {name: value for name, value in vars(self).items() if name != "op"}


def layer(op: str, x: Tensor, weight: Tensor | None, *, training: bool) -> Layer:
    """Return the layer of an op by the name it is registered under, its image [N, C, H, W], and its weight if it has
    one.
    """
    c_out, c_in = (0, x.shape[1]) if weight is None else weight.shape[:2]
    return Layer(op, c_out, c_in, x.shape[2], x.shape[3], training)


def format_of(dtype: torch.dtype, allow_tf32: bool) -> str:
    """Return the "dtype" of a row; allow_tf32 matters for float32 only."""
    return "tf32" if allow_tf32 and dtype == torch.float32 else str(dtype).removeprefix("torch.")


# --- looking up ---

# By the GPU's name. What is put into one is seen by all that ask.
_tables: dict[str, dict[Key, Row]] = {}
_generation = 0


def look_up(gpu: str, op: str, dtype: str, shape: Mapping[str, Any]) -> Row:
    """Return the row of that GPU, empty where there is none."""
    return table(gpu).get(_key(op, dtype, shape), {})


def generation() -> int:
    """Return a number that changes when more is known, for those who remember what they have looked up."""
    return _generation


def table(gpu: str) -> dict[Key, Row]:
    """Return all that is known of a GPU of that name."""
    if gpu not in _tables:
        _tables[gpu] = {} if _is_forced() else _packaged(gpu) | read_table(cache_file(gpu), environment(gpu))
    return _tables[gpu]


def _is_forced() -> bool:
    return os.environ.get("FASTUNET_TUNE") == "force"


def put(gpu: str, rows: Iterable[Row], *, keep: bool = True) -> None:
    """Add rows to what is known, and in place of those of the same key. keep: in the cache file, too."""
    global _generation
    added, before = by_key(rows), table(gpu)
    _tables[gpu] = before | added
    if _tables[gpu] != before:
        _generation += 1
        _config.cache_clear()
    if keep:
        path = cache_file(gpu)
        try:
            write_table(path, environment(gpu), read_table(path, environment(gpu)) | added)
        except OSError as error:
            warn_once(f"{path.parent}: nothing can be kept there ({error.strerror}): FASTUNET_CACHE names another one")


def forget_skipped(gpu: str, reason: str) -> None:
    """Drop the rows of what was left unmeasured for that reason, so that it can be measured now."""
    global _generation
    before = table(gpu)
    _tables[gpu] = {key: row for key, row in before.items() if row.get("skipped") != reason}
    _generation += len(_tables[gpu]) < len(before)


def refresh(gpu: str) -> None:
    """Take up what other processes have written."""
    if not _is_forced():
        put(gpu, read_table(cache_file(gpu), environment(gpu)).values(), keep=False)


def by_key(rows: Iterable[Row]) -> dict[Key, Row]:
    """Return the rows by what they are of."""
    return {_key(row["op"], row["dtype"], row["shape"]): row for row in rows}


def _key(op: str, dtype: str, shape: Mapping[str, Any]) -> Key:
    return op, dtype, *sorted(shape.items())


# --- configurations ---

# By op, and shape or None for all.
_overrides: dict[tuple[str, Any], Any] = {}
_asked: list[Key] | None = None


def config_for(op: str, shape: Any, dtype: torch.dtype, allow_tf32: bool, gpu: str, kind: type[T]) -> T | None:
    """Return the config that overrides the heuristic one, or was measured fastest on `gpu` for that shape (a
    dataclass), or None. kind: the config's type.
    """
    if _asked is not None:
        _asked.append((op, shape, dtype, allow_tf32))
    for key in ((op, shape), (op, None)) if _overrides else ():
        if key in _overrides:
            return _overrides[key]
    config = _config(op, shape, format_of(dtype, allow_tf32), gpu)
    return None if config is None else kind(**config)


@functools.lru_cache(_REMEMBERED)  # This is asked at every launch.
def _config(op: str, shape: Any, dtype: str, gpu: str) -> dict[str, Any] | None:
    return look_up(gpu, op, dtype, asdict(shape)).get("config")


def config_row(op: str, shape: Any, dtype: torch.dtype, allow_tf32: bool, config: Any) -> Row:
    """Return the row of a configuration (a dataclass)."""
    return {"op": op, "dtype": format_of(dtype, allow_tf32), "shape": asdict(shape), "config": asdict(config)}


@contextmanager
def overriding(op: str, config: Any, shape: Any = None) -> Iterator[None]:
    """Within the block, `op` ("conv3x3", "conv3x3_input_grad", "conv3x3_weight_grad" or config.COMPOSED) runs with this
    config where it is asked for by that shape (a dataclass), or by any without one.
    """
    before = dict(_overrides)
    _overrides[op, shape] = config
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def is_overridden(op: str) -> bool:
    """Return whether a measurement has set the op's config."""
    return any(op == overridden for overridden, _ in _overrides)


@contextmanager
def configs_asked() -> Iterator[list[Key]]:
    """Yield a list of the op, shape, dtype and allow_tf32 of each config that launches ask for within the block."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


# --- files ---


def cache_file(gpu: str) -> Path:
    """Return where is kept what was found on a GPU of that name in this environment."""
    folder = os.environ.get("FASTUNET_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastunet"
    identity = hashlib.sha256(json.dumps(environment(gpu)).encode()).hexdigest()[:16]
    return Path(folder).expanduser() / f"{_file_name(gpu)}-{identity}.json"


def table_path(gpu: str) -> Path:
    """Return where the package's table of a GPU of that name belongs."""
    return TUNED / f"{_file_name(gpu)}.json"


def _file_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_")


@functools.cache
def environment(gpu: str) -> dict[str, str]:
    """Return what results on a GPU of that name depend on."""
    import triton

    files = sorted(Path(__file__).parent.rglob("*.py"))
    return {
        "gpu": gpu,
        "driver": str(driver_version()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "kernels": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16],
    }


def driver_version() -> int:
    """Return the newest CUDA the driver supports, 13000 for 13.0; 0 without a driver."""
    version = ctypes.c_int()
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _packaged(gpu: str) -> dict[Key, Row]:
    """The package's table; that a kernel was right elsewhere is no reason not to check it here."""
    path = table_path(gpu)
    found = by_key(json.loads(path.read_text())["rows"]) if path.is_file() else {}
    return {key: row for key, row in found.items() if "failed" not in row}


def read_table(path: Path, environment: dict[str, str]) -> dict[Key, Row]:
    """Return the rows of a cache file; none, with a warning, of one that is not whole, or of another environment."""
    try:
        found = json.loads(path.read_text())
        if found["environment"] != environment:
            raise ValueError(f"expected measurements of {environment}, got {found['environment']}")
        return by_key(found["rows"])
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warn_once(f"{path} is ignored: {type(error).__name__}: {error}")
        return {}


def write_table(path: Path, environment: Mapping[str, Any], rows: Mapping[Key, Row]) -> None:
    """Write a table, whole or not at all. Raises OSError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder, path.name)
        file.write_text(json.dumps({"environment": environment, "rows": list(rows.values())}, indent=1))
        os.replace(file, path)


_said: set[str] = set()


def warn_once(text: str) -> None:
    """Warn of it, but not again in this process."""
    if text not in _said:
        _said.add(text)
        warnings.warn(f"fastunet: {text}", RuntimeWarning, stacklevel=3)
