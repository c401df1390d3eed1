"""From a folder of images and masks to a trained U-Net: `train`."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from fastunet import __version__
from fastunet.checks import ConfigError, FastUNetError, Interrupted, required
from fastunet.cpu.memory import keep_freed_memory
from fastunet.data import DataOptions, Pair, SegmentationDataset, find_pairs
from fastunet.data.pairing import check_outside
from fastunet.data.survey import Survey, survey_pairs
from fastunet.files import check_folder, locked, write_json
from fastunet.pretrained import CONFIG
from fastunet.train.augmentation import augmentation_of
from fastunet.train.checkpoint import Progress, RunConfig, checkpoints, load_checkpoint, save_checkpoint
from fastunet.train.checks import check_kept, check_out, check_same_images, check_sizes, clear_run, resumed_config
from fastunet.train.config import TrainConfig
from fastunet.train.distributed import (
    agree,
    is_first_rank,
    make_accelerator,
    naming_lost_ranks,
    of_first_rank,
    stop_requests,
)
from fastunet.train.events import write_events
from fastunet.train.loss import TrainingLoss, class_weights, rate_at
from fastunet.train.plan import Plan, machine_of, planned
from fastunet.train.results import REPORTED, finish, validate, write_history
from fastunet.train.supervision import DeepLoss, DeeplySupervised
from fastunet.train.weights import features_of_initial, load_initial
from fastunet.tuning import tune
from fastunet.unet import UNet

VALIDATIONS = 10  # per run
# Of the run, with crops mirrored and turned. Then the net learns what these hide, such as labels drawn a pixel to one
# side: as YOLOX (Ge et al. 2021, arXiv:2107.08430) ends without its augmentation.
FLIPPED = 0.85
_KEPT_BYTES = 1 << 30  # of a freed block: the values of a layer, again at every step
SHORTEST_EPOCH = 100  # steps: restarting workers costs nothing beside it


def train(
    data: str | Path | None,
    out: str | Path,
    config: TrainConfig | None = None,
    *,
    reading: DataOptions | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_step: Callable[[Progress], None] | None = None,
    on_data: Callable[[Survey], None] | None = None,
    on_plan: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train a U-Net on `data/images` and `data/masks`, or as `reading` says; leave a run in `out`; return its metrics.

    The run holds model.safetensors, config.json, metrics.json, history.csv, report.html, report.png and its last
    checkpoint. The weights are those of the step with the best validation Dice of the foreground. All files are read
    and checked before training begins; `on_data` is told what they hold. Where they are None, crop, features and
    batch_size are planned from the images and the memory: `on_plan` is told in a line how and why, and config.json has
    the numbers. Ctrl-C or SIGTERM ends it after the step under way with a checkpoint.

    Of several processes (torchrun, accelerate launch) each takes its part of every batch, and the first one writes.

    `resume` goes on with a run, wherever it was stopped, even killed: with its own settings if `config` is None, and
    its own images if `data` is. A finished one goes on if `config` has higher limits; else it is only finished again.
    On the CPU the steps that follow are to the bit those of a run that was never stopped. `overwrite` begins again.

    Raises:
        DataError: unusable files, or `out` holds a run already (or, with `resume`, holds none), or is being trained in.
        ConfigError: settings out of range, no room for any plan, or other settings than the run to be resumed was begun
            with.
        Interrupted: after a signal.
    """
    out = Path(out)
    if resume and overwrite:
        raise ConfigError("expected resume or overwrite, got both")
    if config is not None:
        config.check()
    if str(out) != str(out).encode(errors="replace").decode():
        raise ConfigError(f"out: expected a name in UTF-8, which safetensors wants, got {str(out)!r}")
    check_folder(out)
    with locked(out) if is_first_rank() else nullcontext():
        before = check_out(out, resume, overwrite)
        if before is not None:
            config = resumed_config(out, {} if config is None else asdict(config))
            config.check()
            data = data or before.source
            check_kept(out, before.reading, reading or before.reading)
            reading = before.reading
        elif config is not None and config.init:
            features = features_of_initial(config.init, out)
            config = replace(config, features=config.features or features)
        if not data:
            raise ConfigError("data: expected a folder of images and masks, got none")
        callbacks = (on_step, on_data or (lambda found: None), on_plan or (lambda text: None))
        return _train(Path(data), reading or DataOptions(), out, config or TrainConfig(), before, *callbacks)


def _train(
    data: Path,
    reading: DataOptions,
    out: Path,
    config: TrainConfig,
    before: RunConfig | None,
    on_step: Callable[[Progress], None] | None,
    on_data: Callable[[Survey], None],
    on_plan: Callable[[str], None],
) -> dict[str, Any]:
    if config.tensorboard:
        text = "tensorboard: expected the package, got none: pip install 'fastunet[tensorboard]'"
        required(text, "torch.utils.tensorboard")
    accelerator = make_accelerator(config)
    found = of_first_rank(lambda: _read(data, reading, out, config))
    on_data(found)
    summary = found.checked()
    sizes = [(fact.shape[0], fact.shape[1]) for fact in found.facts]
    plan, why = planned(config, sizes, summary, lambda: machine_of(accelerator))
    if why:
        on_plan(why)
    config = replace(config, **plan._asdict())
    config.check()
    if config.patience is not None and not found.val:
        raise ConfigError("patience: expected images kept out, by whose scores to end, got none: --val-fraction")
    check_sizes(found.facts, len(plan.features), config.norm)

    set_seed(config.seed)
    model: Any = UNet(
        summary.channels,
        summary.classes,
        features=plan.features,
        norm=None if config.norm == "none" else config.norm,
    )
    if config.init and (before is None or not checkpoints(out)):
        load_initial(model, config.init)
    if config.sync_batch_norm and accelerator.num_processes > 1:  # by torch's module, in place of the fused ops
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    run = RunConfig(
        model=model.config,
        data=summary,
        training=asdict(config),
        train=[pair.stem for pair in found.train],
        val=[pair.stem for pair in found.val],
        source=str(data.absolute()),
        reading=reading,
        weights="" if before is None else before.weights,
        fastunet=__version__,
    )
    if before is not None:
        check_same_images(out, before, run)
    val = SegmentationDataset(found.val, summary) if found.val else None
    loop = _Loop(accelerator, model, config, plan, run, out, found.train, val, on_step)
    with naming_lost_ranks(accelerator, out):
        if before is not None:
            loop.restore()
        elif accelerator.is_main_process:
            clear_run(out)
        if accelerator.is_main_process:
            # Only now: a resumption that is refused leaves the run as it was.
            write_json(out / CONFIG, asdict(run))
        loop.run()
        with accelerator.autocast():  # a net within the trained module has none of its own
            metrics = finish(loop, found.val or found.train[:REPORTED])
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return metrics


def _read(data: Path, reading: DataOptions, out: Path, config: TrainConfig) -> Survey:
    """Find the pairs, and read every file of them."""
    pairs = find_pairs(data, reading)
    check_outside(out, data, reading, pairs)
    return survey_pairs(
        pairs,
        reading,
        config.classes,
        val_fraction=config.val_fraction,
        seed=config.split_seed,
        fold=config.fold_number,
    )


# --- the loop ---


class _Loop:
    """The training loop and its state."""

    def __init__(
        self,
        accelerator: Accelerator,
        net: UNet,
        config: TrainConfig,
        plan: Plan,
        run: RunConfig,
        out: Path,
        pairs: list[Pair],
        val: SegmentationDataset | None,
        on_step: Callable[[Progress], None] | None,
    ) -> None:
        self.accelerator, self.config, self.run_config, self.out = accelerator, config, run, out
        self.plan, self.val, self.on_step = plan, val, on_step or (lambda progress: None)
        self.augmentation = augmentation_of(config.augment, flip=config.flip)
        self.upright = augmentation_of(config.augment, flip=False)
        weights = None
        if config.class_weights != "none":
            weights = class_weights(pairs, run.data, config.weights_of_classes())
        loss = TrainingLoss(
            run.data.classes, border_weight=config.border_weight, ignored=run.data.ignored, weights=weights
        )
        deep = config.deep_supervision
        self.loss = (DeepLoss(loss) if deep else loss).to(accelerator.device)
        gpu = accelerator.device.type != "cpu"
        if not gpu:
            keep_freed_memory(_KEPT_BYTES)
        workers = config.workers if config.workers is not None else (4 if gpu else 0)
        self.ranks, self.rank = accelerator.num_processes, accelerator.process_index
        whole_batch = plan.batch_size * self.ranks
        self.steps_per_epoch = max(SHORTEST_EPOCH, math.ceil(len(pairs) / whole_batch))
        length = whole_batch * self.steps_per_epoch
        self.dataset = SegmentationDataset(
            pairs, run.data, crop=plan.crop, length=length, seed=config.seed, balance=config.balance
        )
        # Its own generator: the loader would draw from that of the augmentation, once more after a resumption.
        self.loading = {"num_workers": workers, "pin_memory": gpu, "generator": torch.Generator()}
        # What is kept in the end, and predicts: the same layers, without the forward that accelerate puts in for
        # autocast, of which nobody could tell what it computes.
        self.net = copy.copy(net)
        model = DeeplySupervised(net) if deep else net
        # As the images are: convolutions would rearrange contiguous weights, and their gradients, at every step.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # fused: one pass over the weights instead of a dozen.
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        ema = get_ema_multi_avg_fn(config.ema)
        average = AveragedModel(net, multi_avg_fn=ema, use_buffers=True) if config.ema else None
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        # Prepared, it is part of every checkpoint.
        self.average = None if average is None else accelerator.prepare_model(average, evaluation_mode=True)
        self.best_weights: Mapping[str, Tensor] | None = None
        first = Progress(step=0, epoch=0, seconds=0.0, fraction=0.0, loss=math.nan, history=[], processes=self.ranks)
        self.progress = first
        if self.rank:
            torch.manual_seed(config.seed + self.rank)  # of the augmentation, by now

    def restore(self) -> None:
        """Go on from the newest checkpoint that is whole, or from the start where there is none."""
        found = load_checkpoint(self.out, self.accelerator)
        if found is not None:
            self.progress, self.best_weights = Progress(**found[0]), found[1]
            if self.progress.processes != self.ranks:
                raise ConfigError(
                    f"processes: expected {self.progress.processes}, with which {self.out} was begun, got {self.ranks}"
                )
            self._advance(self.progress.seconds)
            if self._is_best():
                self.best_weights = self._weights()

    def run(self) -> None:
        """Train to the first limit. Raises Interrupted after a signal, FastUNetError on an infinite or NaN loss."""
        self._tune()
        progress, batches = self.progress, self._batches()
        start = time.perf_counter() - progress.seconds
        if self._is_over() and progress.unreported:  # resumed with no more steps than were done since the last
            self._validate()
        with stop_requests(self.accelerator) as stop:
            while not self._is_over():
                loss = self._step(*next(batches))
                # Asked once: a signal between saving and leaving would otherwise leave without saving.
                progress.loss, stopping, seconds = agree(
                    self.accelerator, loss, bool(stop), time.perf_counter() - start
                )
                if not math.isfinite(progress.loss):
                    raise FastUNetError(
                        f"step {progress.step + 1}: expected a finite loss, got {progress.loss}; try a lower lr"
                    )
                progress.loss_sum += progress.loss
                progress.unreported += 1
                before = progress.fraction
                progress.step += 1
                self._advance(seconds)
                due = int(progress.fraction * VALIDATIONS) > int(before * VALIDATIONS)
                if due:
                    self._validate()
                if due or stopping:
                    others = None if self._is_best() else self.best_weights
                    save_checkpoint(self.out, self.accelerator, asdict(progress), others)
                self.on_step(progress)
                if stopping and not self._is_over():
                    raise Interrupted(f"stopped at step {progress.step}; --resume continues from {self.out}")

    def _is_over(self) -> bool:
        patience = self.config.patience
        return self.progress.fraction >= 1 or (
            patience is not None and self.progress.validations_since_best >= patience
        )

    def _tune(self) -> None:
        """Measure on a GPU what its layers are fastest with, before the first step and its clock."""
        channels, crop, device = self.run_config.data.channels, self.plan.crop, self.accelerator.device
        if device.type == "cuda":
            x = torch.zeros(self.plan.batch_size, channels, crop, crop, device=device)
            tune(self.accelerator.unwrap_model(self.model).train(), x.contiguous(memory_format=torch.channels_last))

    def _advance(self, seconds: float) -> None:
        progress, config = self.progress, self.config
        progress.seconds = seconds
        by_time = 0.0 if config.max_minutes is None else seconds / (60 * config.max_minutes)
        progress.fraction = min(1.0, max(progress.step / config.steps, by_time))

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from the present step on."""
        size, device = self.plan.batch_size, self.accelerator.device
        first, stride = self.rank * size, self.ranks * size
        while True:
            self.progress.epoch, position = divmod(self.progress.step, self.steps_per_epoch)
            self.dataset.set_epoch(self.progress.epoch)
            begins = range(first + position * stride, len(self.dataset), stride)
            rest = [list(range(begin, begin + size)) for begin in begins]
            for images, labels in DataLoader(self.dataset, batch_sampler=rest, **self.loading):
                yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def _step(self, images: Tensor, labels: Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * rate_at(self.progress.fraction)
        augmentation = self.augmentation if self.progress.fraction < FLIPPED else self.upright
        images, labels = augmentation(images, labels)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.model(images), labels)
        self.accelerator.backward(loss)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.net)
        return loss.item()

    def _validate(self) -> None:
        progress = self.progress
        train_loss = progress.loss_sum / progress.unreported
        progress.loss_sum, progress.unreported = 0.0, 0
        row = {"step": progress.step, "minutes": progress.seconds / 60, "train_loss": train_loss}
        if self.val is not None:
            with self.accelerator.autocast():  # the average has none of its own
                scored, _ = validate(self._validated(), self.val, self.run_config.class_names, part=self.part)
            scores = scored.compute()
            row |= {"val_dice": scores["mean_dice"]} | {f"val_dice {k}": v for k, v in scores["dice"].items()}
        progress.history.append(row)
        if self._is_best():
            self.best_weights = self._weights()
        if self.accelerator.is_main_process:
            write_history(self.out, progress.history)
            if self.config.tensorboard:
                write_events(self.out, row, self.config.lr * rate_at(progress.fraction))

    def _is_best(self) -> bool:
        """Whether the present weights are those of the best validation."""
        best = self.progress.best
        return best is not None and best["step"] == self.progress.step

    @property
    def part(self) -> slice:
        """Which images this rank is to be validated on."""
        return slice(self.rank, None, self.ranks)

    def _validated(self) -> Any:
        """The model whose weights are kept: the moving average, or the trained one."""
        return self.net if self.average is None else self.average.module

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self._validated().state_dict().items()}
