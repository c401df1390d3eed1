"""What training and 8 bits come to in accuracy, on images that were kept out.

    python -m benchmarks accuracy DATA --minutes 4 --seeds 3 --out DIR
    python -m benchmarks accuracy DATA --minutes 4 --seeds 3 --train-images 6 --out DIR
    python -m benchmarks accuracy --rare --minutes 4 --seeds 3 --out DIR

trains fastunet and the U-Net people write by hand today, the way they train it: same images, same split, same minutes
or steps (`--steps`), once for each seed. Plain PyTorch, NCHW float32, features 16..256, random 256x256 crops with flips
and quarter turns, batches of 4, AdamW at 1e-3 with a cosine schedule, BCE + Dice; nothing of fastunet's is used in it.
Writes DIR/accuracy_<limit>.json. DATA holds grey 8-bit images of one size and binary masks; `--rare` makes some, of
whose pixels 0.3 % are foreground; `--train-images` leaves only the first so many to train on.

    python -m benchmarks accuracy DATA --quantised RUN --out DIR [--calibration 4]

scores a model that `fastunet train` has left in RUN, and its copy in 8 bits, calibrated on images of DATA that it was
trained on, if there are any. Writes DIR/quantization.json. Without a GPU the 8-bit values are multiplied in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastunet
from fastunet.checks import ConfigError, DataError
from fastunet.data import (
    Pair,
    SegmentationDataset,
    find_pairs,
    inspect,
    labels_from_mask,
    read_image,
    read_mask,
    split,
)
from fastunet.data.synthetic import write_dataset
from fastunet.files import write_json
from fastunet.inference.evaluation import evaluate, scores_of_image
from fastunet.metrics import SegmentationMetrics
from fastunet.train.checkpoint import load_run
from fastunet.train.loop import TrainConfig, train

from .dropin_models import PlainUNet
from .harness.environment import environment

CLASSES = ["background", "foreground"]
# Few, small cells among the same debris: 0.3 % of the pixels.
RARE: dict[str, Any] = {"count": 24, "size": 512, "seed": 0, "radii": (4.0, 7.0), "area_per_cell": 2**17}

# --- the plain script ---


def bce_dice(logits: Tensor, target: Tensor) -> Tensor:
    p = logits.sigmoid()
    dice = 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, target) + dice


def random_crop(images: Tensor, masks: Tensor, rng: np.random.Generator, side: int) -> tuple[Tensor, Tensor]:
    """A random crop of images and masks [N, 1, H, W], flipped and turned at random."""
    n = rng.integers(len(images))
    top, left = (int(rng.integers(size - side + 1)) for size in images.shape[-2:])
    turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
    tiles = (torch.rot90(t[n, :, top : top + side, left : left + side], turns, (-2, -1)) for t in (images, masks))
    image, mask = (tile.flip(-1) if mirror else tile for tile in tiles)
    return image, mask


def train_plain(
    images: Tensor, masks: Tensor, steps: int, minutes: float | None, seed: int = 0, crop: int = 256
) -> tuple[nn.Module, int, float]:
    """Train on images [N, 1, H, W] in 0..1 and masks of 0 and 1, for `minutes` if they are set, else `steps`: the
    model, the steps and seconds taken.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = PlainUNet(1, 1, (16, 32, 64, 128, 256)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start, step, progress = time.perf_counter(), 0, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = 0.5e-3 * (1 + math.cos(math.pi * progress))
        x, y = map(torch.stack, zip(*(random_crop(images, masks, rng, crop) for _ in range(4)), strict=True))
        optimizer.zero_grad()
        bce_dice(model(x), y).backward()
        optimizer.step()
        step += 1
        elapsed = time.perf_counter() - start
        progress = elapsed / (60 * minutes) if minutes is not None else step / steps
    return model.eval(), step, time.perf_counter() - start


def load(pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """Images in 0..1 and masks of 0 and 1, both float32 [N, 1, H, W]."""
    images = torch.stack([torch.tensor(read_image(pair.image)).permute(2, 0, 1) for pair in pairs])
    masks = torch.stack([torch.from_numpy(labels_from_mask(read_mask(pair.mask), 1)) for pair in pairs])
    return images.float() / 255, masks.float()[:, None]


# --- both ---


def link(pairs: list[Pair], root: Path) -> None:
    """Link the files of pairs into `root/images` and `root/masks`."""
    for pair in pairs:
        for folder, file in (("images", pair.image), ("masks", pair.mask)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / folder / f"{pair.stem}{file.suffix}").symlink_to(file.absolute())


def scores(found: list[Tensor], pairs: list[Pair]) -> dict[str, Any]:
    """Dice of both classes over the pixels of all images, and the mean V-Rand of the parts of foreground."""
    metrics, rand = SegmentationMetrics(CLASSES), []
    for labels, pair in zip(found, pairs, strict=True):
        truth = torch.from_numpy(labels_from_mask(read_mask(pair.mask), 1)).long()
        metrics.update(labels[None], truth[None])
        rand.append(scores_of_image(labels, truth, CLASSES, parts="foreground")["v_rand"])
    return {"dice": metrics.compute()["dice"], "v_rand": float(np.nanmean(rand))}


def compare(data: Path, config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Train both on the split that `config` makes of a folder, and score both on the images kept out."""
    pairs = find_pairs(data)
    if inspect(pairs).dtype != "uint8":
        raise DataError(f"{data}: expected 8-bit images, which the plain script takes")
    train_pairs, val_pairs = split(pairs, config.val_fraction, config.split_seed)
    model, steps, seconds = train_plain(*load(train_pairs), config.steps, config.max_minutes, config.seed)
    images, _ = load(val_pairs)
    with torch.no_grad():
        plain = scores([(model(image[None])[0, 0] > 0).long() for image in images], val_pairs)
    plain |= {"steps": steps, "seconds": seconds}
    print(f"plain    {config.seed}:", json.dumps(plain), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        metrics = train(data, run, config)
        segmenter = fastunet.load(run, device="cpu")
        ours = {name: metrics[name] for name in ("steps", "seconds", "precision")}
        ours |= scores([torch.from_numpy(segmenter.predict(pair.image) > 0).long() for pair in val_pairs], val_pairs)
    print(f"fastunet {config.seed}:", json.dumps(ours), flush=True)
    return {"plain": plain, "fastunet": ours}


def means(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean scores of each over the seeds, and by how much fastunet's are higher."""
    summary: dict[str, Any] = {}
    for who in ("plain", "fastunet"):
        found = [run[who] for run in runs]
        dice = {name: fmean(each["dice"][name] for each in found) for name in CLASSES}
        summary[who] = {"dice": dice} | {
            key: fmean(each[key] for each in found) for key in ("v_rand", "steps", "seconds")
        }
    ours, plain = summary["fastunet"]["dice"], summary["plain"]["dice"]
    return summary | {"dice_margin": {name: ours[name] - plain[name] for name in CLASSES}}


# --- 8 bits ---


def compare_quantised(run: Path, data: Path, calibration: int) -> dict[str, Any]:
    """Scores of "float" and "e4m3", the "loss" of mean Dice, and the images by stem."""
    model, config = load_run(run)
    model.eval()
    pairs = find_pairs(data)
    summary = inspect(pairs, config.data.classes)
    seen = [pair for pair in pairs if pair.stem in config.train]
    judged = [pair for pair in pairs if pair.stem not in config.train]
    if not judged:
        raise DataError(f"{data}: expected images that {run} was not trained on, got none")
    known = SegmentationDataset((seen or judged)[:calibration], summary)
    quantised = fastunet.quantize(model, (known[i][0][None] for i in range(len(known))))
    images = SegmentationDataset(judged, summary)
    wholes = [images.whole(index) for index in range(len(judged))]
    found: dict[str, Any] = {
        name: evaluate(net, wholes, config.class_names)[0] for name, net in (("float", model), ("e4m3", quantised))
    }
    loss = found["float"]["mean_dice"] - found["e4m3"]["mean_dice"]
    stems = {"calibration": [pair.stem for pair in (seen or judged)[:calibration]], "judged": [p.stem for p in judged]}
    return {**found, "loss": loss, "images": stems}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, nargs="?", metavar="DATA")
    parser.add_argument("--rare", action="store_true", help="make images of whose pixels 0.3 %% are foreground instead")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--minutes", type=float, help="of training, for each of the two")
    what.add_argument("--steps", type=int, help="of training, for each of the two")
    what.add_argument("--quantised", type=Path, metavar="RUN", help="score this model in 8 bits instead")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="trainings of each of the two")
    parser.add_argument("--train-images", type=int, metavar="N", help="train on the first N of those not kept out")
    parser.add_argument("--calibration", type=int, default=4, help="images that tell the ranges of 8 bits")


def run(options: argparse.Namespace) -> int:
    if options.rare == (options.data is not None) or (options.rare and options.quantised is not None):
        raise ConfigError("expected either DATA or, of trainings, --rare")
    if options.seeds < 1:
        raise ConfigError(f"seeds: expected at least 1, got {options.seeds}")
    name, found = _quantised(options) if options.quantised is not None else _trained(options)
    options.out.mkdir(parents=True, exist_ok=True)
    machine = environment("cpu") | {"threads": torch.get_num_threads()}
    write_json(options.out / f"{name}.json", found | {"environment": machine})
    return 0


def _quantised(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    found = compare_quantised(options.quantised, options.data, options.calibration)
    for name in ("float", "e4m3"):
        print(f"{name}: mean Dice {found[name]['mean_dice']:.4f}")
    print(f"loss: {found['loss']:.4f}")
    return "quantization", found


def _trained(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    limit = {"max_minutes": options.minutes} if options.minutes is not None else {"steps": options.steps}
    config = TrainConfig(device="cpu", **limit)
    name = f"minutes_{options.minutes:g}" if options.minutes is not None else f"steps_{options.steps}"
    with tempfile.TemporaryDirectory() as folder:
        data = options.data
        if options.rare:
            data, name = Path(folder) / "rare", f"{name}_rare"
            write_dataset(data, **RARE)
        if options.train_images is not None:
            train_pairs, val_pairs = split(find_pairs(data), config.val_fraction, config.split_seed)
            kept = train_pairs[: options.train_images]
            data, name = Path(folder) / "few", f"{name}_images_{len(kept)}"
            link([*kept, *val_pairs], data)
            config = replace(config, val_fraction=len(val_pairs) / (len(kept) + len(val_pairs)))
        runs = [{"seed": seed} | compare(data, replace(config, seed=seed)) for seed in range(options.seeds)]
    summary = means(runs)
    print(json.dumps(summary, indent=1))
    return f"accuracy_{name}", {"summary": summary, "runs": runs}
