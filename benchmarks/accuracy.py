"""fastunet's training against the plain script of `plain_unet.py`: same images, same split, same minutes or same steps.

    python -m benchmarks.accuracy DATA --minutes 4 --out DIR
    python -m benchmarks.accuracy DATA --steps 400 --out DIR

Writes DIR/accuracy_<limit>.json with the scores of both on the images kept out, and prints them. DATA holds grey 8-bit
images of one size and binary masks.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastunet.data import Pair, find_pairs, inspect, labels_from_mask, read_image, read_mask, split
from fastunet.files import write_json
from fastunet.metrics import SegmentationMetrics
from fastunet.training import TrainConfig, train

from .plain_unet import predict_plain, train_plain

CLASSES = ["background", "foreground"]


def load(pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """Images in 0..1 and masks of 0 and 1, both float32 [N, 1, H, W]."""
    images = torch.stack([torch.tensor(read_image(pair.image)).permute(2, 0, 1) for pair in pairs])
    masks = torch.stack([torch.from_numpy(labels_from_mask(read_mask(pair.mask), 1)) for pair in pairs])
    return images.float() / 255, masks.float()[:, None]


def run_plain(data: Path, config: TrainConfig) -> dict[str, Any]:
    """Train and score the plain script on the split that `config` makes."""
    pairs = find_pairs(data)
    if inspect(pairs).dtype != "uint8":
        raise SystemExit("error: the plain script takes 8-bit images")
    train_pairs, val_pairs = split(pairs, config.val_fraction, config.split_seed)
    by_minutes = config.max_minutes is not None
    limit = {"minutes": config.max_minutes} if by_minutes else {"steps": config.steps}
    model, steps, seconds = train_plain(*load(train_pairs), seed=config.seed, **limit)
    images, masks = load(val_pairs)
    metrics = SegmentationMetrics(CLASSES)
    metrics.update(predict_plain(model, images)[:, 0].long(), masks[:, 0].long())
    return {**metrics.compute(), "steps": steps, "seconds": seconds}


def environment() -> dict[str, str | int]:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    limit = parser.add_mutually_exclusive_group(required=True)
    limit.add_argument("--minutes", type=float, help="for each of the two")
    limit.add_argument("--steps", type=int, help="for each of the two")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON")
    parser.add_argument("--keep", type=Path, help="folder to keep fastunet's run in")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    defaults = {"seed": arguments.seed, "device": "cpu"}
    if arguments.minutes is not None:
        config = TrainConfig(max_minutes=arguments.minutes, **defaults)
    else:
        config = TrainConfig(steps=arguments.steps, **defaults)
    plain = run_plain(arguments.data, config)
    print("plain:   ", json.dumps(plain["dice"]), plain["steps"], "steps", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        ours = train(arguments.data, arguments.keep or Path(folder) / "run", config)
    print("fastunet:", json.dumps(ours["dice"]), ours["steps"], "steps")

    margins = {name: ours["dice"][name] - plain["dice"][name] for name in CLASSES}
    print("margin:  ", json.dumps(margins))
    name = f"minutes_{arguments.minutes:g}" if arguments.minutes is not None else f"steps_{arguments.steps}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(
        arguments.out / f"accuracy_{name}.json",
        {"summary": {"dice_margin": margins}, "plain": plain, "fastunet": ours, "environment": environment()},
    )


if __name__ == "__main__":
    main()
