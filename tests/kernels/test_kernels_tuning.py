"""Tables of measured configurations, and pins: they override the derived choice, and nothing else does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from fastunet.kernels import gpu, tuning
from fastunet.kernels.conv3x3 import config, config_grad
from fastunet.kernels.conv3x3.config import ConvShape

HOPPER = gpu.known_target(90)
SHAPE = ConvShape(64, 0, 64, 512, 512)


def choose(
    shape: ConvShape = SHAPE, dtype: torch.dtype = torch.bfloat16, target: gpu.Target = HOPPER
) -> config.ConvConfig:
    return config.conv_config(shape, dtype, target, allow_tf32=False)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the table of HOPPER is read from."""
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    tuning._table_of.cache_clear()
    yield tuning.table_path(HOPPER.name)
    tuning._table_of.cache_clear()


def test_a_row_overrides_its_own_shape_dtype_and_gpu_alone(table: Path) -> None:
    derived = choose()
    other_shape, other_dtype = dataclasses.replace(SHAPE, height=256), torch.float16
    before = choose(other_shape), choose(dtype=other_dtype), choose(target=gpu.known_target(100))
    winner = dataclasses.replace(derived, tile_h=16, num_warps=8)
    table.write_text(json.dumps({"configs": [tuning.as_row("conv3x3", SHAPE, torch.bfloat16, False, winner)]}))
    tuning._table_of.cache_clear()
    assert choose() == winner != derived
    assert (choose(other_shape), choose(dtype=other_dtype), choose(target=gpu.known_target(100))) == before


def test_rows_of_the_weight_gradient(table: Path) -> None:
    derived = config_grad.weight_grad_config(SHAPE, torch.float32, HOPPER, allow_tf32=True)
    winner = dataclasses.replace(derived, num_stages=2 if derived.num_stages != 2 else 3)
    table.write_text(
        json.dumps({"configs": [tuning.as_row("conv3x3_weight_grad", SHAPE, torch.float32, True, winner)]})
    )
    tuning._table_of.cache_clear()
    assert config_grad.weight_grad_config(SHAPE, torch.float32, HOPPER, allow_tf32=True) == winner
    assert config_grad.weight_grad_config(SHAPE, torch.float32, HOPPER, allow_tf32=False) != winner


@pytest.mark.parametrize("text", ["{", "{}", '{"configs": [{"op": "conv3x3"}]}'])
def test_a_broken_table_is_named(table: Path, text: str) -> None:
    table.write_text(text)
    with pytest.raises(ValueError, match=table.name):
        choose()


def test_pins_hold_within_their_block() -> None:
    derived = choose()
    pin = dataclasses.replace(derived, block_n=128)
    with tuning.pinned("conv3x3", pin):
        assert choose() == choose(dataclasses.replace(SHAPE, c1=16)) == pin
        with tuning.pinned("conv3x3", derived):
            assert choose() == derived
        assert choose() == pin
    assert choose() == derived


def test_tables_in_the_package_can_be_read() -> None:
    for file in tuning.TUNED.glob("*.json"):
        assert tuning.table_path(json.loads(file.read_text())["gpu"]) == file


def test_names_of_tables() -> None:
    assert tuning.table_path("NVIDIA H100 80GB HBM3").name == "nvidia_h100_80gb_hbm3.json"


IMAGE, WEIGHT = torch.empty(7, 64, 512, 256), torch.empty(32, 64, 3, 3)
LAYER = tuning.layer("conv3x3_bias_relu", IMAGE, WEIGHT, training=True)


def layer_row(p10: float) -> dict:
    return tuning.as_layer_row(LAYER, torch.bfloat16, False) | {"margin_over_aten": {"median": 2.0, "p10": p10}}


def test_a_margin_is_of_its_own_layer_alone(table: Path) -> None:
    """The lowest of its rows', with pooling and without: whatever the batch, but in no other size, dtype or task."""
    table.write_text(json.dumps({"configs": [], "layers": [layer_row(1.75), layer_row(1.25), layer_row(1.5)]}))
    tuning._table_of.cache_clear()
    assert tuning.margin(LAYER, torch.bfloat16, False, HOPPER.name) == 1.25
    assert tuning.layer("conv3x3_bias_relu", IMAGE[:2], WEIGHT, training=True) == LAYER
    others = [
        tuning.layer("conv3x3_bias_relu", IMAGE, WEIGHT, training=False),
        tuning.layer("conv3x3_bias_relu", IMAGE, WEIGHT[:16], training=True),
        tuning.layer("conv3x3_bias_relu", IMAGE[..., 1:], WEIGHT, training=True),
        tuning.layer("conv3x3_bias_relu", IMAGE[:, :, 1:], WEIGHT, training=True),
        tuning.layer("conv3x3_batch_norm_relu", IMAGE, WEIGHT, training=True),
        tuning.layer("max_pool2x2", IMAGE, None, training=True),
    ]
    for other in others:
        assert tuning.margin(other, torch.bfloat16, False, HOPPER.name) is None, other
    assert tuning.margin(LAYER, torch.float16, False, HOPPER.name) is None
    assert tuning.margin(LAYER, torch.bfloat16, False, "another GPU") is None


def test_a_table_is_read_in_place_of_the_gpus(table: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    for p10 in (1.25, 0.75):  # Anew at each time.
        other.write_text(json.dumps({"configs": [], "layers": [layer_row(p10)]}))
        with tuning.reading(other):
            assert tuning.margin(LAYER, torch.bfloat16, False, HOPPER.name) == p10
    assert tuning.margin(LAYER, torch.bfloat16, False, HOPPER.name) is None
