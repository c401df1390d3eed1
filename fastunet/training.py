"""From a folder of images and masks to a trained U-Net: `train`."""

from __future__ import annotations

import csv
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from . import __version__
from .augmentation import Augmentation
from .checkpoint import (
    CONFIG,
    RunConfig,
    load_checkpoint,
    load_config,
    remove_checkpoints,
    save_checkpoint,
    save_config,
    save_weights,
)
from .checks import ConfigError, DataError, FastUNetError
from .data import DataSummary, Pair, SegmentationDataset, check_foreground, find_pairs, inspect, read_image, split
from .files import write_json, written_whole
from .inference import evaluate
from .losses import BCEDiceLoss, CEDiceLoss
from .report import Sample, write_report
from .train_config import RESUMABLE, TrainConfig, multiplies_bf16
from .unet import UNet

VALIDATIONS = 10  # per run
WARMUP = 0.03  # of the run
REPORTED = 4  # images in the report


@dataclass
class Progress:
    """Where a training run stands: handed to the caller after each step.

    `seconds` counts the training loop alone, over all its continuations; `history` has a row per validation.
    """

    step: int
    epoch: int
    seconds: float
    fraction: float
    loss: float
    history: list[dict[str, float]]


class Interrupted(FastUNetError):
    """Training was stopped by a signal, after its state was saved."""


def train(
    data: str | Path,
    out: str | Path,
    config: TrainConfig | None = None,
    *,
    resume: bool = False,
    on_step: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Train a U-Net on `data/images` and `data/masks`; leave a run in `out`, and return its metrics.

    The run holds model.safetensors, config.json, metrics.json, history.csv and report.png. All files are read and
    checked before training begins. Ctrl-C or SIGTERM ends it after the step under way with a checkpoint, from which
    `resume` continues.

    Raises:
        DataError: unusable files, or `out` holds a run already (or, with `resume`, holds none).
        ConfigError: settings out of range, or other settings than the run to be resumed was begun with.
        Interrupted: after a signal.
    """
    config = config or TrainConfig()
    config.check()
    out = Path(out)
    _check_out(out, config, resume)
    accelerator = _make_accelerator(config)
    pairs = find_pairs(data)
    summary = inspect(pairs, config.classes)
    check_foreground(pairs, summary.mask_values)
    _check_sizes(pairs, summary, config)
    train_pairs, val_pairs = split(pairs, config.val_fraction, config.split_seed)
    if resume:
        _check_same_images(out, train_pairs, val_pairs)

    set_seed(config.seed)
    model = UNet(
        summary.channels,
        summary.classes,
        features=config.features,
        norm=None if config.norm == "none" else config.norm,
    )
    run = RunConfig(
        model=model.config,
        data=summary,
        training=asdict(config),
        train=[pair.stem for pair in train_pairs],
        val=[pair.stem for pair in val_pairs],
        fastunet=__version__,
    )
    out.mkdir(parents=True, exist_ok=True)
    val = SegmentationDataset(val_pairs, summary) if val_pairs else None
    loop = _Loop(accelerator, model, config, run, out, train_pairs, val, on_step)
    if resume:
        loop.restore()
    # Only now: a resumption that is refused leaves the run as it was.
    save_config(out, run)
    loop.run()
    return _finish(accelerator, model, config, run, out, val_pairs or train_pairs[:REPORTED], loop.progress)


# --- checks, before any work ---


def _check_out(out: Path, config: TrainConfig, resume: bool) -> None:
    exists = (out / CONFIG).is_file()
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: expected a folder for the run, got a file")
    if not resume:
        if exists:
            raise DataError(
                f"{out}: expected a folder without a run, got one that holds {CONFIG} (--resume continues it)"
            )
        return
    if not exists:
        raise DataError(f"{out}: expected a run to resume, got no {CONFIG}")
    before = load_config(out).training
    for field in fields(TrainConfig):
        given, kept = getattr(config, field.name), before.get(field.name)
        kept = tuple(kept) if isinstance(kept, list) else kept
        if field.name not in RESUMABLE and given != kept:
            raise ConfigError(f"{field.name}: expected {kept!r}, with which {out} was begun, got {given!r}")


def _check_sizes(pairs: list[Pair], summary: DataSummary, config: TrainConfig) -> None:
    levels, least = len(config.features), 2 ** (len(config.features) - 1)
    if min(summary.size_min) >= least:
        return
    for pair in pairs:
        height, width = read_image(pair.image).shape[:2]
        if min(height, width) < least:
            raise DataError(
                f"{pair.image}: expected at least {least}x{least} pixels for {levels} levels, got {height}x{width}"
            )


def _check_same_images(out: Path, train_pairs: list[Pair], val_pairs: list[Pair]) -> None:
    run = load_config(out)
    for side, before, pairs in (("training", run.train, train_pairs), ("validation", run.val, val_pairs)):
        now = [pair.stem for pair in pairs]
        if now != before:
            raise DataError(
                f"{out}: expected the {len(before)} {side} images the run was begun with, got {len(now)}, "
                f"differing in {sorted(set(now) ^ set(before))[:5]}"
            )


def _make_accelerator(config: TrainConfig) -> Accelerator:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: expected a CUDA device for 'cuda', got none")
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu or cuda, got {config.device!r}")
    cpu = config.device == "cpu"
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if multiplies_bf16(cpu) else "fp32"
    # accelerate keeps device and precision for the whole process; a second training may choose others.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=cpu)
    if accelerator.num_processes > 1:
        # Each process would stop at a time of its own.
        raise ConfigError(f"fastunet trains in one process, got {accelerator.num_processes}")
    return accelerator


# --- the loop ---


class _Loop:
    """The training loop and its state."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: UNet,
        config: TrainConfig,
        run: RunConfig,
        out: Path,
        pairs: list[Pair],
        val: SegmentationDataset | None,
        on_step: Callable[[Progress], None] | None,
    ) -> None:
        self.accelerator, self.config, self.run_config, self.out = accelerator, config, run, out
        self.val, self.on_step = val, on_step or (lambda progress: None)
        self.augmentation = Augmentation()
        self.loss = BCEDiceLoss(batch=True) if run.data.classes == 1 else CEDiceLoss(batch=True)
        gpu = accelerator.device.type != "cpu"
        workers = config.workers if config.workers is not None else (4 if gpu else 0)
        # An epoch is long enough that starting workers anew costs nothing beside it.
        length = config.batch_size * max(100, math.ceil(len(pairs) / config.batch_size))
        self.dataset = SegmentationDataset(pairs, run.data, crop=config.crop, length=length, seed=config.seed)
        loader = DataLoader(self.dataset, config.batch_size, num_workers=workers, pin_memory=gpu)
        # fused: one pass over the weights instead of a dozen.
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.model, self.optimizer, self.loader = accelerator.prepare(model, optimizer, loader)
        self.progress = Progress(step=0, epoch=0, seconds=0.0, fraction=0.0, loss=math.nan, history=[])

    def restore(self) -> None:
        """Go on from the newest checkpoint, at the next epoch. Raises ConfigError where the limits are behind it."""
        self.progress = Progress(**load_checkpoint(self.out, self.accelerator))
        self.progress.epoch += 1
        self._advance(self.progress.seconds)
        if self.progress.fraction >= 1:
            done = f"{self.progress.step} steps and {self.progress.seconds / 60:.1f} minutes"
            raise ConfigError(f"steps, max_minutes: expected limits beyond the {done} done, got {self._limits()}")

    def run(self) -> None:
        """Train to the first limit. Raises Interrupted after a signal, FastUNetError on an infinite or NaN loss."""
        progress, batches = self.progress, self._batches()
        losses: list[float] = []
        start = time.perf_counter() - progress.seconds
        with _stop_requests() as stop:
            while progress.fraction < 1:
                progress.loss = self._step(*next(batches))
                if not math.isfinite(progress.loss):
                    raise FastUNetError(
                        f"step {progress.step + 1}: expected a finite loss, got {progress.loss}; try a lower lr"
                    )
                losses.append(progress.loss)
                before = progress.fraction
                progress.step += 1
                self._advance(time.perf_counter() - start)
                due = int(progress.fraction * VALIDATIONS) > int(before * VALIDATIONS)
                if due:
                    self._validate(sum(losses) / len(losses))
                    losses.clear()
                # Asked once: a signal between saving and leaving would otherwise leave without saving.
                stopping = bool(stop)
                if due or stopping:
                    save_checkpoint(self.out, self.accelerator, asdict(progress))
                self.on_step(progress)
                if stopping and progress.fraction < 1:
                    raise Interrupted(f"stopped at step {progress.step}; --resume continues from {self.out}")

    def _advance(self, seconds: float) -> None:
        progress, config = self.progress, self.config
        progress.seconds = seconds
        by_time = 0.0 if config.max_minutes is None else seconds / (60 * config.max_minutes)
        progress.fraction = min(1.0, max(progress.step / config.steps, by_time))

    def _limits(self) -> str:
        minutes = "no limit in" if self.config.max_minutes is None else f"{self.config.max_minutes:g}"
        return f"{self.config.steps} steps and {minutes} minutes"

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            self.dataset.set_epoch(self.progress.epoch)
            yield from self.loader
            self.progress.epoch += 1

    def _step(self, images: Tensor, labels: Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * rate_at(self.progress.fraction)
        images, labels = self.augmentation(images, labels)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss_of(self.model(images), labels)
        self.accelerator.backward(loss)
        self.optimizer.step()
        return loss.item()

    def _loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss over all classes, background too: foreground's Dice alone hardly sees a rare background."""
        if self.run_config.data.classes > 1:
            return self.loss(logits, labels)
        foreground = labels.unsqueeze(1)
        return self.loss(torch.cat([logits, -logits], dim=1), torch.cat([foreground, 1 - foreground], dim=1))

    def _validate(self, loss: float) -> None:
        progress = self.progress
        row = {"step": progress.step, "minutes": progress.seconds / 60, "train_loss": loss}
        if self.val is not None:
            scores, _ = evaluate(self.model, self.val, self.run_config.class_names)
            row |= {"val_dice": scores["mean_dice"]} | {f"val_dice {k}": v for k, v in scores["dice"].items()}
        progress.history.append(row)
        _write_history(self.out, progress.history)


def rate_at(fraction: float) -> float:
    """The learning rate, as a share of its peak, when that fraction of the run is done: linear warm-up, then cosine."""
    if fraction < WARMUP:
        return (fraction + 1e-3) / (WARMUP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (fraction - WARMUP) / (1 - WARMUP)))


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM asks to stop; a second one interrupts at once."""
    requests: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if requests:
            raise KeyboardInterrupt
        requests.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = {number: signal.signal(number, ask) for number in numbers}
    except ValueError:  # not the main thread: whoever runs it there handles signals
        previous = {}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# --- the end ---


def _finish(
    accelerator: Accelerator,
    model: UNet,
    config: TrainConfig,
    run: RunConfig,
    out: Path,
    shown: list[Pair],
    progress: Progress,
) -> dict[str, Any]:
    """Write weights, metrics, history and report, and drop the checkpoints."""
    save_weights(out, model)
    dataset = SegmentationDataset(shown, run.data)
    scores, predictions = evaluate(model, dataset, run.class_names, tta=config.tta)
    metrics: dict[str, Any] = dict(scores) if run.val else {}
    metrics |= {
        "images": run.val,
        "tta": config.tta,
        "steps": progress.step,
        "seconds": progress.seconds,
        "device": str(accelerator.device),
        "precision": accelerator.mixed_precision.replace("no", "fp32"),
        "torch": torch.__version__,
    }
    write_json(out / "metrics.json", metrics)
    _write_history(out, progress.history)
    samples = [
        Sample(pair.stem, read_image(pair.image), dataset[i][1].numpy(), predictions[i].numpy())
        for i, pair in enumerate(shown[:REPORTED])
    ]
    write_report(out / "report.png", progress.history, samples, run.class_names)
    remove_checkpoints(out)
    return metrics


def _write_history(out: Path, history: list[dict[str, float]]) -> None:
    with written_whole(out / "history.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(history)
