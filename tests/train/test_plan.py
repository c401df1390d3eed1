"""Crops, levels and batch that are planned from the images and the memory, and that a run keeps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from command import fastunet
from image_files import write_masks
from stopped_training import TINY, killed, losses_of, stop_at
from training_ranks import train_in_ranks

from fastunet.checks import ConfigError
from fastunet.data import DataSummary
from fastunet.train.checkpoint import load_config
from fastunet.train.config import PLANNED, TrainConfig, too_small
from fastunet.train.loop import train
from fastunet.train.plan import CPU, GPU, MARGIN, Machine, Plan, Scale, machine_of, planned, step_bytes

FREE = replace(TINY, crop=None, features=None, batch_size=None, device="cpu", steps=2)
GIB = 2**30
Sizes = list[tuple[int, int]]


def plan_of(sizes: Sizes, scale: Scale = CPU, free: int = 64 * GIB, ranks: int = 1, **given: Any) -> Plan:
    heights, widths = zip(*sizes, strict=True)
    ends = {"size_min": (min(heights), min(widths)), "size_max": (max(heights), max(widths))}
    summary = DataSummary(count=len(sizes), channels=1, classes=1, mask_values=(0, 1), dtype="uint8", **ends)
    config = replace(TrainConfig(), **given)
    plan, why = planned(config, sizes, summary, lambda: Machine(scale, free, ranks=ranks))
    replace(config, **plan._asdict()).check()
    assert all((f"--{name.replace('_', '-')} " in why) is (name not in given) for name in PLANNED)
    if len(given) < 3:
        assert step_bytes(plan, 1, 1, 4) <= MARGIN * free
    return plan


@pytest.mark.parametrize(
    ("sizes", "crop", "levels"),
    [
        pytest.param([(512, 512)] * 30, 256, 5, id="ordinary"),
        pytest.param([(256, 256)], 256, 5, id="just a crop"),
        pytest.param([(250, 300)], 240, 5, id="a little smaller"),
        pytest.param([(64, 64)], 64, 5, id="small"),
        pytest.param([(40, 40)], 40, 4, id="smaller"),
        pytest.param([(5, 5)], 4, 2, id="tiny"),
        pytest.param([(2, 2)], 4, 2, id="two pixels"),
        pytest.param([(64, 4000)], 64, 5, id="elongated"),
        pytest.param([(9, 512), (512, 512), (512, 512)], 256, 4, id="one thin among large ones"),
        pytest.param([(100, 100), (1000, 1000), (300, 200)], 192, 5, id="mixed"),
    ],
)
def test_crops_are_no_larger_than_the_middle_image_and_all_images_go_through(
    sizes: Sizes, crop: int, levels: int
) -> None:
    assert plan_of(sizes) == (crop, CPU.features[:levels], 4)
    for norm in ("batch", "instance", "none"):
        plan = plan_of(sizes, norm=norm)
        assert not any(too_small(*size, len(plan.features), norm) for size in sizes if norm != "instance")


def test_on_a_gpu_all_is_larger_and_the_batch_fills_the_memory_up_to_a_share_of_the_data() -> None:
    many = [(1000, 1000)] * 500
    assert plan_of(many, GPU) == (512, GPU.features, 16)
    assert plan_of(many[:40], GPU).batch_size == 8  # a twentieth of 40 million pixels
    assert plan_of(many[:40], GPU, ranks=2).batch_size == 4
    assert plan_of(many[:2], GPU).batch_size == 4
    sizes = [plan_of(many, GPU, free=free * GIB) for free in (5, 8, 12, 30)]
    assert sizes == sorted(sizes)
    assert len({size.batch_size for size in sizes}) == 4
    assert {size.crop for size in sizes} == {512}


def test_with_little_memory_the_batch_goes_first_then_the_crop() -> None:
    plans = [plan_of([(512, 512)], free=round(free * GIB)) for free in np.geomspace(0.1, 1, 30)]
    assert plans == sorted(plans)
    assert plans[0].crop < 128
    assert plans[-1] == (256, CPU.features, 4)
    assert {plan.batch_size for plan in plans if plan.crop == 256} == {2, 3, 4}
    assert max(plan.batch_size for plan in plans if plan.crop < 256) < 4
    with pytest.raises(
        ConfigError, match=r"memory: expected \d+ MiB free for .* --crop 64 --features 16,32,64,128,256 "
    ):
        plan_of([(512, 512)], free=GIB // 100)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"crop": 512}, (512, CPU.features, 4)),
        ({"crop": 32}, (32, CPU.features, 4)),
        ({"crop": 100}, (100, CPU.features, 4)),
        ({"features": (8, 16, 32)}, (256, (8, 16, 32), 4)),
        ({"features": (2,) * 9}, (512, (2,) * 9, 4)),
        ({"batch_size": 1}, (256, CPU.features, 1)),
        ({"batch_size": 50}, (256, CPU.features, 50)),
        ({"crop": 3, "batch_size": 2, "features": (4, 8)}, (3, (4, 8), 2)),
    ],
)
def test_what_is_given_stays_and_the_rest_is_planned_around_it(
    given: dict[str, Any], expected: tuple[int, tuple[int, ...], int]
) -> None:
    assert plan_of([(512, 512)], **given) == expected


def test_a_large_batch_takes_smaller_crops_and_a_large_crop_a_smaller_batch() -> None:
    assert plan_of([(512, 512)], free=GIB, batch_size=16).crop < 200
    assert plan_of([(512, 512)], free=2 * GIB, crop=512).batch_size == 2
    with pytest.raises(ConfigError, match=r"training step of --crop 1024 --features \S+ --batch-size 2, got 1024 MiB"):
        plan_of([(512, 512)], free=GIB, crop=1024)


def test_nothing_to_plan_asks_for_no_memory() -> None:
    asked = Mock()
    given = {"crop": 8192, "features": (64, 128), "batch_size": 64}
    plan, why = planned(replace(TrainConfig(), **given), [(64, 64)], Mock(), asked)
    assert (plan._asdict(), why) == (given, "")
    asked.assert_not_called()


MEASURED = """
import json, re, sys, tempfile
from pathlib import Path
import torch
from fastunet.data.synthetic import write_dataset
from fastunet.train import loop
from fastunet.train.config import TrainConfig

torch.set_num_threads(1)
loop.finish = lambda *args, **options: {}  # a step alone, without the pictures
root, (crop, features, batch_size) = Path(tempfile.mkdtemp()), json.loads(sys.argv[1])
write_dataset(root / "data", 2, size=crop)
common = dict(val_fraction=0.0, precision="fp32", device="cpu")
peaks = []
for plan in [(32, (4, 8), 2), (crop, tuple(features), batch_size)]:
    names = dict(zip(("crop", "features", "batch_size"), plan))
    loop.train(root / "data", root / str(len(peaks)), TrainConfig(steps=2, **names, **common))
    # Not ru_maxrss, which begins with that of the process that began this one.
    peaks.append(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]))
print(peaks[1] - peaks[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux, which tells the peak of a process")
@pytest.mark.parametrize("plan", [Plan(256, (16, 32, 64, 128, 256), 3), Plan(128, (64, 128, 256), 2)], ids=str)
def test_the_estimate_of_a_step_is_what_it_takes(plan: Plan) -> None:
    """To be measured in a process of its own, whose peak nothing else has raised."""
    command = [sys.executable, "-c", MEASURED, json.dumps(plan)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert MARGIN < step_bytes(plan, 1, 1, 4) / int(result.stdout.split()[-1]) < 1 / MARGIN


def test_what_is_free_on_a_gpu_counts_what_torch_keeps_for_reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
    accelerator = Mock(device=torch.device("cuda"), mixed_precision="bf16", num_processes=1)
    assert machine_of(accelerator) == Machine(GPU, 4 * GIB, value_bytes=2, ranks=1)


def test_processes_on_a_machine_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    have_free(monkeypatch, 8 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    accelerator = Mock(device=torch.device("cpu"), mixed_precision="no", num_processes=8)
    accelerator.gather = lambda value: torch.cat([value, torch.tensor([GIB])])
    assert machine_of(accelerator) == Machine(CPU, GIB, value_bytes=4, ranks=8)
    accelerator.gather = lambda value: value
    assert machine_of(accelerator).free == 2 * GIB


# --- in a run ---


def have_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr("fastunet.train.plan.free_memory", lambda: free)


def test_the_plan_is_said_and_kept_whatever_the_memory_then(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    have_free(monkeypatch, 4 * GIB)
    whole = losses_of(data, tmp_path / "whole", FREE, on_plan=said.append)
    assert len(said) == 1
    assert re.fullmatch(
        r"planned: --crop 64 --features 16,32,64,128,256 --batch-size 4 \(images of 64 x 64 in the middle and 64 x 64 "
        r"at the least; a step takes about 0\.\d\d GiB of 4\.0 that are free\)",
        said[0],
    )
    first = losses_of(data, tmp_path / "run", FREE, stop=stop_at(1, killed))
    kept = load_config(tmp_path / "run").training
    assert [kept[name] for name in PLANNED] == [64, [16, 32, 64, 128, 256], 4]
    have_free(monkeypatch, GIB // 100)
    with pytest.raises(ConfigError, match=r"memory: expected .* got 10 MiB: free some, or give smaller ones"):
        train(data, tmp_path / "other", FREE)
    assert not (tmp_path / "other").exists()
    assert first | losses_of(None, tmp_path / "run", None, resume=True, on_plan=said.append) == whole
    assert losses_of(data, tmp_path / "run", FREE, resume=True) == {}
    assert len(said) == 1
    result = fastunet("train", "--config", tmp_path / "run/config.json", "--out", tmp_path / "again", "--device", "cpu")
    assert "planned" not in result.stdout
    assert load_config(tmp_path / "again").training == kept


def test_folds_take_the_plan_of_the_first(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([4 * GIB, GIB // 100])
    monkeypatch.setattr("fastunet.train.plan.free_memory", lambda: next(free))
    result = fastunet("train", data, "--out", tmp_path, "--folds", "2", "--steps", "1", "--features", "4,8,8")
    assert result.stdout.count("planned: --crop 64 --batch-size 4 (") == 1
    plans = [[load_config(tmp_path / f"fold-{fold}").training[name] for name in PLANNED] for fold in (1, 2)]
    assert plans[0] == plans[1]


def test_ranks_plan_alike(data: Path, tmp_path: Path) -> None:
    config = replace(FREE, norm="instance", features=(4, 8))
    assert train_in_ranks(data, tmp_path / "run", config, tmp_path / "results") == [0, 0]
    assert load_config(tmp_path / "run").training["batch_size"] == 4


def test_images_of_few_pixels_are_trained_on_as_they_are(tmp_path: Path) -> None:
    """Crops of 256 pixels and five levels refused them."""
    mask = np.zeros((9, 30), np.uint8)
    mask[2:6, 3:20] = 1
    train(write_masks(tmp_path / "data", mask), tmp_path / "run", FREE)
    with pytest.raises(ConfigError, match="deep_supervision: expected at least 4 levels, got 2"):
        train(tmp_path / "data", tmp_path / "deep", replace(FREE, deep_supervision=True))
    kept = load_config(tmp_path / "run").training
    assert (kept["crop"], tuple(kept["features"])) == (8, (16, 32))


def test_the_weights_to_begin_with_say_the_features(data: Path, run: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", replace(FREE, steps=1, init=str(run)))
    assert tuple(load_config(tmp_path / "run").training["features"]) == TINY.features
