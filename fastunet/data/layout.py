"""How a data folder is read: where its images and masks lie, and what the values of masks mean."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from fastunet.checks import ConfigError

Value = int | tuple[int, int, int]  # of a mask: a number, or a colour


def _option(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class DataOptions:
    """How DATA is read, with what each option means as `fastunet check --help` shows it."""

    images: str = _option("images", "Folder of the images in DATA.")
    masks: str = _option("masks", "Folder of the masks or outlines in DATA, or a COCO file.")
    mask_suffix: str = _option("", "Ending of the names of masks that images do not have, such as _mask.")
    labels: str = _option(
        "",
        "Mask value of each class, the background's first, such as 0,128,255, or colours 0:0:0,255:0:0 "
        "[0 and 255, 0 and 1, or 0..K-1].",
    )
    ignore: str = _option("", "Mask values or colours of pixels that do not count, such as 255.")
    threshold: float | None = _option(
        None, "Mask value from which on a pixel is foreground: for lossy and soft masks, and for instances."
    )

    def check(self) -> None:
        """Raise ConfigError on options that cannot be read, or contradict each other."""
        labels, ignore = self.label_values, self.ignored_values
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"threshold: expected a finite number, got {self.threshold}")
        if labels and self.threshold is not None:
            raise ConfigError(f"labels: expected none beside a threshold, got {self.labels}")
        if len(labels) == 1 or len(labels) > 255:
            raise ConfigError(f"labels: expected 2 to 255 values, got {len(labels)}")
        numbers = [value for value in labels if isinstance(value, int)]
        if numbers and not 0 <= min(numbers) <= max(numbers) < 2**16:
            raise ConfigError(f"labels: expected values from 0 to 65535, as predictions have them, got {self.labels}")
        if both := set(labels) & set(ignore):
            raise ConfigError(f"ignore: expected values that are none of the labels, got {texts_of(both)}")
        if len({isinstance(value, tuple) for value in labels + ignore}) > 1:
            raise ConfigError(f"labels, ignore: expected numbers or colours, got both: {self.labels},{self.ignore}")

    @property
    def label_values(self) -> tuple[Value, ...]:
        """Value of each class, or none."""
        return _parsed("labels", self.labels)

    @property
    def ignored_values(self) -> tuple[Value, ...]:
        """Values that do not count."""
        return _parsed("ignore", self.ignore)

    @property
    def are_colours(self) -> bool:
        """Whether the values of masks are given as colours."""
        return any(isinstance(value, tuple) for value in self.label_values + self.ignored_values)


def _parsed(name: str, text: str) -> tuple[Value, ...]:
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    values: list[Value] = []
    for part in parts:
        is_value = re.fullmatch(r"-?\d{1,10}|\d{1,3}(:\d{1,3}){2}", part)
        numbers = [int(each) for each in part.split(":")] if is_value else []
        if len(numbers) == 1 and abs(numbers[0]) < 2**31:
            values.append(numbers[0])
        elif len(numbers) == 3 and max(numbers) <= 255:
            values.append((numbers[0], numbers[1], numbers[2]))
        else:
            raise ConfigError(
                f"{name}: expected values such as 0,128,255 or colours such as 0:0:0,255:0:0, got {part!r}"
            )
    if len(set(values)) < len(values):
        raise ConfigError(f"{name}: expected each value once, got {text}")
    return tuple(values)


def text_of(value: Value) -> str:
    """Return a mask value as an option has it: 128, or 255:0:0."""
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)


def texts_of(values: Any) -> str:
    """Return mask values as an option has them, ascending."""
    return ",".join(text_of(value) for value in sorted(values))
