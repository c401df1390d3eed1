"""The weights a training begins with, their moving average, its early end, and settings from a file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from command import error_of, fastunet
from image_files import write_masks
from safetensors.torch import load_file
from stopped_training import TINY, losses_of

from fastunet import UNet
from fastunet.checks import ConfigError
from fastunet.train import loop
from fastunet.train.checkpoint import load_config
from fastunet.train.loop import train


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, torch.Tensor]]]:
    """The weights before and after each step of the trainings, in turn."""
    found: list[list[dict[str, torch.Tensor]]] = []
    step = loop._Loop._step

    def weights_of(net: UNet) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in net.state_dict().items()}

    def note(self: loop._Loop, images: torch.Tensor, labels: torch.Tensor) -> float:
        before, loss = weights_of(self.net), step(self, images, labels)
        found.append([before, weights_of(self.net)])
        return loss

    monkeypatch.setattr(loop._Loop, "_step", note)
    return found


def test_the_moving_average_is_what_is_kept(data: Path, tmp_path: Path, seen: Any) -> None:
    train(data, tmp_path / "run", replace(TINY, ema=0.5, val_fraction=0.0, device="cpu"))
    (_, average), *others = seen
    for _, weights in others:
        average = {name: (average[name] + weights[name]) / 2 for name in average}
    kept = load_file(tmp_path / "run/model.safetensors")
    for name in (name for name in kept if kept[name].is_floating_point()):
        torch.testing.assert_close(kept[name], average[name])
    assert not torch.equal(kept["outc.conv.weight"], weights["outc.conv.weight"])


def test_no_better_validation_for_long_enough_ends_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = iter([0.1, 0.5, 0.4, 0.3, 0.6, 0.2, *[0.5] * 9])

    scored = Mock(compute=lambda: {"mean_dice": next(dice), "dice": {}})
    monkeypatch.setattr(loop, "validate", lambda *args, **options: (scored, []))
    assert list(losses_of(data, tmp_path / "run", replace(TINY, patience=2))) == [1, 2, 3, 4]
    assert losses_of(None, tmp_path / "run", None, resume=True) == {}
    assert load_config(tmp_path / "run").weights == "step 2 of 4: best validation Dice of the foreground, 0.5000"
    assert list(losses_of(None, tmp_path / "run", replace(TINY, patience=4), resume=True)) == list(range(5, 10))


def test_a_training_begins_with_the_weights_of_another(data: Path, run: Path, tmp_path: Path, seen: Any) -> None:
    """Its head too, but for other classes."""
    config = replace(TINY, steps=1, init=str(run))
    train(data, tmp_path / "same", config)
    labels = np.repeat(np.array([0, 1, 2, 3], np.uint8), 16)[None].repeat(64, 0)
    train(write_masks(tmp_path / "three", labels), tmp_path / "more", config)
    train(data, tmp_path / "same", config, overwrite=True)
    weights = UNet.from_pretrained(run).state_dict()
    same, more, again = (before for before, _ in seen)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert all(torch.equal(same[name], weights[name]) for name in weights)
    assert all(torch.equal(more[name], weights[name]) for name in weights if not name.startswith("outc."))
    assert more["outc.conv.weight"].shape[0] == 4
    with pytest.raises(ConfigError, match=r"init: expected weights of features \(4, 4\), got \(4, 8\) in "):
        train(data, tmp_path / "other", replace(TINY, init=str(run), features=(4, 4)))
    assert not (tmp_path / "other").exists()


def test_a_file_gives_what_options_do(data: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 2, "features": [4, 8], "crop": 32, "batch_size": 2, "augment": "light"}
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    file = tmp_path / "settings.toml"
    file.write_text(f'{text}flip = false\nthreshold = 1\ndata = "{data}"\n')
    typed = ["--steps", "1", "--precision", "fp32"]
    result = fastunet("train", "--config", file, "--out", tmp_path / "a", *typed)
    # Without a terminal a line for each validation.
    assert re.search(r"^100%  0\.\d minutes  step 1  loss \d\.\d{3}  validation Dice 0\.\d{3}$", result.stdout, re.M)
    first = load_config(tmp_path / "a")
    expected = {**settings, "steps": 1, "flip": False, "precision": "fp32"}
    assert {name: first.training[name] for name in expected} == expected
    assert first.reading.threshold == 1
    result = fastunet("train", "--config", tmp_path / "a/config.json", "--out", tmp_path / "b")
    second = load_config(tmp_path / "b")
    assert (second.training, second.reading, second.source) == (first.training, first.reading, first.source)
    for text, words in (
        ("stepz = 2\n", f"error: {file}: expected names of options, got stepz"),
        ("steps = \n", "expected settings in TOML"),
        ('steps = "many"\n', "--steps"),
    ):
        file.write_text(text)
        assert words in error_of("train", data, "--config", file, "--out", tmp_path / "c")
    for number, text in enumerate(("[1, 2]", "5", '{"training": 5}', '{"training": {}, "reading": [1]}', 10**5 * "[")):
        (file := tmp_path / f"{number}.json").write_text(text)
        words = f"{file}: expected settings in TOML, or the config.json of a run, got: "
        assert words in error_of("train", data, "--config", file, "--out", tmp_path / "c")
