"""Where a training run stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """Where a training run stands: handed to the caller after each step.

    `seconds` counts the training loop alone, over all its continuations; `history` has a row per validation, and
    `loss_sum` is of the `unreported` steps since the last.
    """

    step: int
    epoch: int
    seconds: float
    fraction: float
    loss: float
    history: list[dict[str, float]]
    loss_sum: float = 0.0
    unreported: int = 0
    processes: int = 1  # it is trained in

    @property
    def best(self) -> dict[str, float] | None:
        """The row of the best validation, the first of equals; None where nothing was validated."""
        rows = [row for row in self.history if "val_dice" in row]
        return max(rows, key=lambda row: row["val_dice"]) if rows else None

    @property
    def validations_since_best(self) -> int:
        """How many validations in a row were no better than one before."""
        return 0 if self.best is None else len(self.history) - 1 - self.history.index(self.best)
