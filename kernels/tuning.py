"""Configurations that override the derived ones: measured winners from `tuned/<gpu>.json`, and pins for benchmarks.

A table holds "gpu" (the name torch gives it) and "configs": rows of "op", "shape" and "dtype" (bfloat16, float16,
float32 or tf32) with the fields of the op's config; beside them what the row was measured with, and by how many times
the derived config and ATen take longer. `python -m benchmarks.tune` writes it. No row depends on the batch size. The
derived choice stands where a table has no row.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

TUNED = Path(__file__).parent / "tuned"

T = TypeVar("T")
_pins: dict[str, Any] = {}


@contextmanager
def pinned(op: str, config: Any) -> Iterator[None]:
    """Within the block, `op` ("conv3x3" or "conv3x3_weight_grad") runs with this config whatever its shape."""
    before = dict(_pins)
    _pins[op] = config
    try:
        yield
    finally:
        _pins.clear()
        _pins.update(before)


def override(op: str, shape: Any, dtype: torch.dtype, allow_tf32: bool, gpu: str, kind: type[T]) -> T | None:
    """The config pinned, or measured best on `gpu` for that shape (a dataclass), or None. kind: the config's type."""
    if op in _pins:
        return _pins[op]
    table = _table(gpu)
    # This runs at every launch: without a table, nothing is looked up.
    row = table.get(_key(op, asdict(shape), _format(dtype, allow_tf32))) if table else None
    return None if row is None else kind(**row)


def table_path(gpu: str) -> Path:
    """Where the table of a GPU of that name belongs."""
    return TUNED / f"{re.sub(r'[^a-z0-9]+', '_', gpu.lower()).strip('_')}.json"


def _format(dtype: torch.dtype, allow_tf32: bool) -> str:
    return "tf32" if allow_tf32 and dtype == torch.float32 else str(dtype).removeprefix("torch.")


def _key(op: str, shape: dict[str, Any], dtype: str) -> tuple[Any, ...]:
    return op, dtype, *sorted(shape.items())


@functools.cache
def _table(gpu: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    path = table_path(gpu)
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text())["configs"]
        return {_key(row["op"], row["shape"], row["dtype"]): row["config"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected rows of op, shape, dtype and config, got {error!r}") from error


def as_row(op: str, shape: Any, dtype: torch.dtype, allow_tf32: bool, config: Any) -> dict[str, Any]:
    """A row of a table's "configs"."""
    chosen = {field.name: getattr(config, field.name) for field in fields(config)}
    return {"op": op, "shape": asdict(shape), "dtype": _format(dtype, allow_tf32), "config": chosen}
