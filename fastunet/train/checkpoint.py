"""What a run leaves on disk. Every file appears under its name only when it is complete.

`RUN/config.json` says how the model was made and its inputs are read, `RUN/model.safetensors` holds the weights, and
`RUN/checkpoint-NNNNNN/` all that training needs to go on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastunet.checks import DataError, check_types
from fastunet.data import DataOptions, DataSummary
from fastunet.files import write_json
from fastunet.pretrained import CONFIG, WEIGHTS, read_weights, write_weights
from fastunet.unet import UNet

if TYPE_CHECKING:
    from accelerate import Accelerator

PROGRESS = "progress.json"
BEST = "best.safetensors"
# What `written_whole` calls a file until it is complete.
TEMPORARY = re.compile(r"\.([0-9a-f]{16}|(config|history|metrics|model|report)\.\d+)\.\w+")
SUMS = "SHA256SUMS"  # as of the command sha256sum, which checks them too


@dataclass(frozen=True)
class RunConfig:
    """Everything about a run but its weights."""

    model: dict[str, Any]  # the arguments of UNet
    data: DataSummary  # what the images must look like
    training: dict[str, Any]  # the settings it was trained with
    train: list[str] = field(default_factory=list)  # stems of the images on either side of the split
    val: list[str] = field(default_factory=list)
    source: str = ""  # the folder they came from
    reading: DataOptions = field(default_factory=DataOptions)  # how it is read
    weights: str = ""  # of which step, and why
    fastunet: str = ""  # the version that wrote it

    @property
    def class_names(self) -> list[str]:
        """Names of labels 0, 1, ..."""
        if self.data.names:
            return ["background", *self.data.names]
        if self.data.classes == 1:
            return ["background", "foreground"]
        return [f"class {index}" for index in range(self.data.classes)]


def load_config(run: str | Path) -> RunConfig:
    """Read RUN/config.json. Raises DataError where there is none, or one that is not a run's."""
    path = Path(run) / CONFIG
    if not path.is_file():
        raise DataError(f"{path}: expected the config.json of a training run, got no such file")
    try:
        raw = json.loads(path.read_text())
        data = {name: _as_tuples(value) for name, value in raw["data"].items()}
        reading = DataOptions(**raw.get("reading", {}))
        run_config = RunConfig(**{**raw, "data": DataSummary(**data), "reading": reading})
        for part in (run_config, run_config.data, reading):
            check_types(part)
        return run_config
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: expected the config.json of a training run, got {error!r}") from error


def _as_tuples(value: Any) -> Any:
    """JSON's lists, and those within, were tuples."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def load_run(run: str | Path) -> tuple[UNet, RunConfig]:
    """The trained model, on the CPU and in eval mode, with its config. Raises DataError on missing or broken files."""
    config = load_config(run)
    path = Path(run) / WEIGHTS
    if not path.is_file():
        raise DataError(f"{path}: expected the weights of a finished run, got no such file (continue it with --resume)")
    return UNet.from_pretrained(run), config


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
        """Return how many validations in a row were no better than one before."""
        return 0 if self.best is None else len(self.history) - 1 - self.history.index(self.best)


def save_checkpoint(
    run: Path, accelerator: Accelerator, progress: dict[str, Any], best: Mapping[str, Tensor] | None
) -> None:
    """Keep the training state and `progress` (JSON) as RUN/checkpoint-NNNNNN, NNNNNN = progress["step"].

    `best`: the weights to be kept in the end, where they are not those of this step. The folder gets its name when it
    is complete and on the disk; only then older ones are removed but the last. All ranks call it: each keeps the state
    of its generators, and the first one all the rest.
    """
    target = run / f"checkpoint-{progress['step']:06d}"
    partial = target.with_name(f".{target.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        if best is not None:
            write_weights(partial / BEST, best)
        write_json(partial / PROGRESS, progress)
        for file in partial.iterdir():
            shutil.copymode(partial / PROGRESS, file)
        sums = {file.name: _sha256(file, sync=True) for file in sorted(partial.iterdir())}
        (partial / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    except Exception as error:  # safetensors and torch have errors of their own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(run).free / 2**20
        reason = " ".join(str(error).split())
        raise DataError(f"{target}: expected to write it, with {free:.0f} MiB free, got: {reason}") from error
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    remove_checkpoints(run, keep=2)


def load_checkpoint(run: Path, accelerator: Accelerator) -> tuple[dict[str, Any], Mapping[str, Tensor] | None] | None:
    """Restore the newest checkpoint that is whole; return its progress, and the best weights if others than its own.

    None where there is no checkpoint. Warns of damaged ones; raises DataError, which names the file, if all are.
    """
    damages = []
    for folder in reversed(checkpoints(run)):
        if damage := find_damage(folder):
            damages.append(damage)
            continue
        for text in damages:
            warnings.warn(f"{text}; going on from {folder}", stacklevel=2)
        try:
            accelerator.load_state(str(folder))
        except RuntimeError as error:
            if "loading state_dict" not in str(error):  # Of memory, say.
                raise
            raise DataError(f"{folder}: expected a checkpoint of the net in {CONFIG}, got another's") from error
        best = folder / BEST
        return read_progress(folder), read_weights(best) if best.is_file() else None
    if damages:
        raise DataError(f"{damages[0]}: remove {run}, or that folder, to begin anew")
    return None


def read_progress(folder: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` was given as progress."""
    return json.loads((folder / PROGRESS).read_text())


def checkpoints(run: Path) -> list[Path]:
    """List the checkpoints of a run, the newest last; each is complete, but for damage done since."""
    found = [folder for folder in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{6,}", folder.name)]
    return sorted(found, key=lambda folder: int(folder.name.partition("-")[2]))


def remove_checkpoints(run: Path, keep: int) -> None:
    """Remove all checkpoints but the newest, and what killed processes left of these and of files."""
    for folder in checkpoints(run)[:-keep]:
        if (folder / SUMS).is_file():
            # Renamed first: half a checkpoint would look like a damaged one.
            folder.rename(folder.with_name(f".{folder.name}.partial"))
    for folder in run.glob(".checkpoint-*.partial"):
        shutil.rmtree(folder)
    for file in run.glob(".*"):
        if TEMPORARY.fullmatch(file.name):
            file.unlink()


def find_damage(folder: Path) -> str | None:
    """Name the first file of a checkpoint that is not what was written, or None."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    except (OSError, ValueError) as error:
        return f"{folder / SUMS}: expected the checksums of the checkpoint, got {type(error).__name__}"
    for name in sorted({PROGRESS, "model.safetensors", "optimizer.bin"} | set(sums)):
        try:
            found = _sha256(folder / name)
        except OSError as error:
            return f"{folder / name}: expected a file of the checkpoint, got: {error.strerror}"
        if found != sums.get(name):
            return f"{folder / name}: expected a file of SHA-256 {sums.get(name)}, got {found}: it is damaged"
    return None


def _sha256(path: Path, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
