"""What a run leaves on disk. Every file appears under its name only when it is complete.

`RUN/config.json` says how the model was made and its inputs are read, `RUN/model.safetensors` holds the weights, and
`RUN/checkpoint-NNNNNN/` all that training needs to go on.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checks import DataError
from .data import DataSummary
from .files import write_json
from .pretrained import CONFIG, WEIGHTS, write_weights
from .unet import UNet

if TYPE_CHECKING:
    from accelerate import Accelerator

PROGRESS = "progress.json"


@dataclass(frozen=True)
class RunConfig:
    """Everything about a run but its weights.

    Attributes:
        model: the arguments of UNet.
        data: what the images must look like.
        training: the settings it was trained with.
        train, val: stems of the images on either side of the split.
        fastunet: the version that wrote it.
    """

    model: dict[str, Any]
    data: DataSummary
    training: dict[str, Any]
    train: list[str] = field(default_factory=list)
    val: list[str] = field(default_factory=list)
    fastunet: str = ""

    @property
    def class_names(self) -> list[str]:
        """Names of labels 0, 1, ..."""
        if self.data.classes == 1:
            return ["background", "foreground"]
        return [f"class {index}" for index in range(self.data.classes)]


def save_config(run: Path, config: RunConfig) -> None:
    """Write RUN/config.json."""
    write_json(run / CONFIG, asdict(config))


def load_config(run: str | Path) -> RunConfig:
    """Read RUN/config.json. Raises DataError where there is none, or one that is not a run's."""
    path = Path(run) / CONFIG
    if not path.is_file():
        raise DataError(f"{path}: expected the config.json of a training run, got no such file")
    try:
        raw = json.loads(path.read_text())
        return RunConfig(**{**raw, "data": DataSummary(**_tuples(raw["data"]))})
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: expected the config.json of a training run, got {error!r}") from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def save_weights(run: Path, model: UNet) -> None:
    """Write RUN/model.safetensors."""
    write_weights(run / WEIGHTS, model.state_dict())


def load_run(run: str | Path) -> tuple[UNet, RunConfig]:
    """The trained model, on the CPU and in eval mode, with its config. Raises DataError on missing or broken files."""
    config = load_config(run)
    path = Path(run) / WEIGHTS
    if not path.is_file():
        raise DataError(f"{path}: expected the weights of a finished run, got no such file (continue it with --resume)")
    return UNet.from_pretrained(run), config


def save_checkpoint(run: Path, accelerator: Accelerator, progress: dict[str, Any]) -> None:
    """Keep the training state and `progress` (JSON) as RUN/checkpoint-NNNNNN, NNNNNN = progress["step"].

    The folder gets its name when it is complete; only then older ones are removed.
    """
    target = run / f"checkpoint-{progress['step']:06d}"
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    accelerator.save_state(str(partial))
    (partial / PROGRESS).write_text(json.dumps(progress))
    older = [folder for folder in _checkpoints(run) if folder != target]
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for folder in older:
        shutil.rmtree(folder)


def load_checkpoint(run: Path, accelerator: Accelerator) -> dict[str, Any]:
    """Restore the newest checkpoint and return its progress. Raises DataError where there is none."""
    folders = _checkpoints(run)
    if not folders:
        raise DataError(
            f"{run}: expected a checkpoint to resume from, got none (finished, or stopped before the first)"
        )
    accelerator.load_state(str(folders[-1]))
    return json.loads((folders[-1] / PROGRESS).read_text())


def remove_checkpoints(run: Path) -> None:
    """Remove every checkpoint, complete or partial: a finished run needs none."""
    for folder in [*_checkpoints(run), *run.glob(".checkpoint-*.partial")]:
        shutil.rmtree(folder)


def _checkpoints(run: Path) -> list[Path]:
    return sorted(folder for folder in run.glob("checkpoint-*") if (folder / PROGRESS).is_file())
