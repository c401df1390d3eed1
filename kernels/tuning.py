"""What was measured on a GPU, from `tuned/<gpu>.json`, and pins for benchmarks.

A table holds "gpu" (the name torch gives it), "configs" and "layers". The configs override the derived ones: rows of
"op", "shape" and "dtype" (bfloat16, float16, float32 or tf32) with the fields of the op's config; beside them what the
row was measured with, and by how many times the derived config and ATen take longer. The derived choice stands where a
table has no row. The layers say where the kernels are faster than ATen, whatever their configs: rows of "op",
"channels", "height", "width", "training" and "dtype" with "margin_over_aten". `python -m benchmarks tune` writes both.
No row depends on the batch size.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

TUNED = Path(__file__).parent / "tuned"

T = TypeVar("T")
_pins: dict[str, Any] = {}


@contextmanager
def pinned(op: str, config: Any) -> Iterator[None]:
    """Within the block, `op` ("conv3x3", "conv3x3_input_grad", "conv3x3_weight_grad" or config.COMPOSED) runs with this
    config whatever its shape.
    """
    before = dict(_pins)
    _pins[op] = config
    try:
        yield
    finally:
        _pins.clear()
        _pins.update(before)


def is_pinned(op: str) -> bool:
    """Return whether a benchmark has set the op's config."""
    return op in _pins


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within the block, the table is read from this file, as it is then, whatever the GPU; none if there is no file."""
    global _reading
    before, _reading = _reading, _read(path)
    try:
        yield
    finally:
        _reading = before


def override(op: str, shape: Any, dtype: torch.dtype, allow_tf32: bool, gpu: str, kind: type[T]) -> T | None:
    """Return the config pinned, or measured best on `gpu` for that shape (a dataclass), or None. kind: the config's
    type.
    """
    if op in _pins:
        return _pins[op]
    configs = _table(gpu).configs
    # This runs at every launch: without a table, nothing is looked up.
    row = configs.get(_key(op, asdict(shape), _format(dtype, allow_tf32))) if configs else None
    return None if row is None else kind(**row)


@dataclass(frozen=True)
class MeasuredLayer:
    """An op on images of a size, by which a table knows how fast it is.

    channels: the weight's first two sizes, or the image's alone where there is no weight. training: forward and
    backward together, else forward without gradients.
    """

    op: str
    channels: tuple[int, ...]
    height: int
    width: int
    training: bool


def layer(op: str, x: Tensor, weight: Tensor | None, *, training: bool) -> MeasuredLayer:
    """Return the layer of an op by the name it is registered under, its image [N, C, H, W], and its weight if it has
    one.
    """
    channels = x.shape[1:2] if weight is None else weight.shape[:2]
    return MeasuredLayer(op, tuple(channels), x.shape[2], x.shape[3], training)


def margin(layer: MeasuredLayer, dtype: torch.dtype, allow_tf32: bool, gpu: str) -> float | None:
    """Return how many times as long ATen takes, at least, in nine rounds of ten on `gpu`; None where it was not
    measured.
    """
    margins = _table(gpu).margins
    return margins.get((layer, _format(dtype, allow_tf32))) if margins else None


def table_path(gpu: str) -> Path:
    """Return where the table of a GPU of that name belongs."""
    return TUNED / f"{re.sub(r'[^a-z0-9]+', '_', gpu.lower()).strip('_')}.json"


def _format(dtype: torch.dtype, allow_tf32: bool) -> str:
    return "tf32" if allow_tf32 and dtype == torch.float32 else str(dtype).removeprefix("torch.")


def _key(op: str, shape: dict[str, Any], dtype: str) -> tuple[Any, ...]:
    return op, dtype, *sorted(shape.items())


@dataclass(frozen=True, eq=False)  # Compared by identity: a key of choices that were made by it.
class _Table:
    configs: Mapping[tuple[Any, ...], dict[str, Any]]
    margins: Mapping[tuple[MeasuredLayer, str], float]


_reading: _Table | None = None


def table_in_force() -> object:
    """Return what identifies the table that `reading` has put in place of the GPU's own, None where there is none."""
    return _reading


def _table(gpu: str) -> _Table:
    return _table_of(gpu) if _reading is None else _reading


@functools.cache
def _table_of(gpu: str) -> _Table:
    return _read(table_path(gpu))


def _read(path: Path) -> _Table:
    if not path.is_file():
        return _Table({}, {})
    try:
        found = json.loads(path.read_text())
        configs = {_key(row["op"], row["shape"], row["dtype"]): row["config"] for row in found["configs"]}
        return _Table(configs, _margins(found.get("layers", [])))
    except (ValueError, KeyError, TypeError) as error:
        expected = "rows of op, shape, dtype and config, and layers"
        raise ValueError(f"{path}: expected {expected}, got {error!r}") from error


def _margins(rows: list[dict[str, Any]]) -> dict[tuple[MeasuredLayer, str], float]:
    margins: dict[tuple[MeasuredLayer, str], float] = {}
    for row in rows:
        values = {field.name: row[field.name] for field in fields(MeasuredLayer)}
        key = MeasuredLayer(**values | {"channels": tuple(row["channels"])}), row["dtype"]
        # With pooling and without, a layer goes by one name: it is faster where both are.
        margins[key] = min(row["margin_over_aten"]["p10"], margins.get(key, float("inf")))
    return margins


def as_row(op: str, shape: Any, dtype: torch.dtype, allow_tf32: bool, config: Any) -> dict[str, Any]:
    """Return a row of a table's "configs"."""
    chosen = {field.name: getattr(config, field.name) for field in fields(config)}
    return {"op": op, "shape": asdict(shape), "dtype": _format(dtype, allow_tf32), "config": chosen}


def as_layer_row(layer: MeasuredLayer, dtype: torch.dtype, allow_tf32: bool) -> dict[str, Any]:
    """Return the part of a row of a table's "layers" that says which it is."""
    return asdict(layer) | {"channels": list(layer.channels), "dtype": _format(dtype, allow_tf32)}
