"""What is known of a GPU's kernels: rows that are looked up, kept and overridden, and files that are not taken."""

from __future__ import annotations

import ctypes
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, whose version is part of an environment")

from fastunet.kernels import autotune, gpu
from fastunet.kernels.conv3x3 import config, config_grad
from fastunet.kernels.conv3x3.config import ConvShape

HOPPER = gpu.known_target(90)
SHAPE = ConvShape(64, 0, 64, 512, 512)
IMAGE, WEIGHT = torch.empty(7, 64, 512, 256), torch.empty(32, 64, 3, 3)
LAYER = autotune.layer("conv3x3_bias_relu", IMAGE, WEIGHT, training=True)
ROW = {"op": LAYER.op, "dtype": "bfloat16", "shape": LAYER.shape, "speedup": 1.25}


def choose(
    shape: ConvShape = SHAPE, dtype: torch.dtype = torch.bfloat16, target: gpu.Target = HOPPER
) -> config.ConvConfig:
    return config.conv_config(shape, dtype, target, allow_tf32=False)


def speedup(layer: autotune.Layer = LAYER, dtype: str = "bfloat16", name: str = HOPPER.name) -> float | None:
    return autotune.look_up(name, layer.op, dtype, layer.shape).get("speedup")


def test_a_config_is_of_its_own_shape_dtype_and_gpu_alone() -> None:
    heuristic = choose()
    other_shape, other_dtype = dataclasses.replace(SHAPE, height=256), torch.float16
    before = choose(other_shape), choose(dtype=other_dtype), choose(target=gpu.known_target(100))
    winner = dataclasses.replace(heuristic, tile_h=16, num_warps=8)
    autotune.put(HOPPER.name, [autotune.config_row("conv3x3", SHAPE, torch.bfloat16, False, winner)])
    assert choose() == winner != heuristic
    assert (choose(other_shape), choose(dtype=other_dtype), choose(target=gpu.known_target(100))) == before
    shape = SHAPE, torch.float32, HOPPER
    heuristic = config_grad.weight_grad_config(*shape, allow_tf32=True)
    winner = dataclasses.replace(heuristic, num_stages=2 if heuristic.num_stages != 2 else 3)
    autotune.put(HOPPER.name, [autotune.config_row("conv3x3_weight_grad", SHAPE, torch.float32, True, winner)])
    assert config_grad.weight_grad_config(*shape, allow_tf32=True) == winner
    assert config_grad.weight_grad_config(*shape, allow_tf32=False) != winner


def test_overrides_hold_within_their_block() -> None:
    heuristic = choose()
    other = dataclasses.replace(heuristic, block_n=128)
    with autotune.overriding("conv3x3", other):
        assert choose() == choose(dataclasses.replace(SHAPE, c1=16)) == other
        with autotune.overriding("conv3x3", heuristic):
            assert choose() == heuristic
        assert choose() == other
    assert choose() == heuristic


def test_a_speedup_is_of_its_own_layer_whatever_the_batch() -> None:
    autotune.put(HOPPER.name, [ROW])
    assert speedup() == 1.25
    assert autotune.layer("conv3x3_bias_relu", IMAGE[:2], WEIGHT, training=True) == LAYER
    others = [
        autotune.layer("conv3x3_bias_relu", IMAGE, WEIGHT, training=False),
        autotune.layer("conv3x3_bias_relu", IMAGE, WEIGHT[:16], training=True),
        autotune.layer("conv3x3_bias_relu", IMAGE[..., 1:], WEIGHT, training=True),
        autotune.layer("conv3x3_bias_relu", IMAGE[:, :, 1:], WEIGHT, training=True),
        autotune.layer("conv3x3_batch_norm_relu", IMAGE, WEIGHT, training=True),
        autotune.layer("max_pool2x2", IMAGE, None, training=True),
    ]
    for other in others:
        assert speedup(other) is None, other
    assert speedup(dtype="float16") is None
    assert speedup(name="another GPU") is None


def test_what_is_kept_is_there_for_the_next_process_and_what_is_not_is_not() -> None:
    before = autotune.generation()
    autotune.put(HOPPER.name, [ROW, {**ROW, "dtype": "float16"}])
    autotune.put(HOPPER.name, [{**ROW, "speedup": 1.5}])
    autotune.put(HOPPER.name, [{**ROW, "dtype": "float32"}], keep=False)
    assert autotune.generation() > before, "choices are forgotten"
    assert (speedup(), speedup(dtype="float32")) == (1.5, 1.25)
    autotune._tables.clear()
    assert (speedup(), speedup(dtype="float16"), speedup(dtype="float32")) == (1.5, 1.25, None)


def test_the_packages_table_is_looked_up_last_and_its_verdicts_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "TUNED", tmp_path)
    rows = [{**ROW, "speedup": 3.0}, {**ROW, "dtype": "float16", "speedup": 2.0}]
    rows.append({"op": LAYER.op, "dtype": "bfloat16", "shape": {}, "failed": ""})
    autotune.write_table(autotune.table_path(HOPPER.name), {"driver": "another"}, autotune.by_key(rows))
    autotune.put(HOPPER.name, [ROW])
    for _ in range(2):
        assert (speedup(), speedup(dtype="float16")) == (1.25, 2.0)
        assert autotune.look_up(HOPPER.name, LAYER.op, "bfloat16", {}) == {}
        autotune._tables.clear()
    monkeypatch.setenv("FASTUNET_TUNE", "force")
    assert speedup() is None
    assert autotune.table_path("NVIDIA H100 80GB HBM3").name == "nvidia_h100_80gb_hbm3.json"


def test_tables_in_the_package_can_be_read() -> None:
    for file in autotune.TUNED.glob("*.json"):
        assert autotune.by_key(json.loads(file.read_text())["rows"])


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"environment": {"gpu": "another"}, "rows": []}', '{"rows": [1]}'])
def test_a_corrupt_or_foreign_file_is_ignored_with_one_warning(text: str, recwarn: pytest.WarningsRecorder) -> None:
    autotune._said.clear()
    path = autotune.cache_file(HOPPER.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    for _ in range(2):
        assert speedup() is None
        autotune._tables.clear()
    (warning,) = recwarn
    assert f"{path} is ignored: " in str(warning.message)
    autotune.put(HOPPER.name, [ROW])
    autotune._tables.clear()
    assert speedup() == 1.25, "and replaced by the next measurement"


def test_without_a_place_to_write_what_is_found_holds_for_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTUNET_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="nothing can be kept there"):
        autotune.put(HOPPER.name, [ROW])
    assert speedup() == 1.25


def test_what_a_cache_file_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the driver, too, as CUDA's public interface tells it: torch's own way is not in every release."""

    def path() -> Path:
        autotune.environment.cache_clear()
        return autotune.cache_file("H100")

    def load(_: str) -> SimpleNamespace:
        def get(version: Any) -> None:
            ctypes.cast(version, ctypes.POINTER(ctypes.c_int))[0] = 99990

        return SimpleNamespace(cuDriverGetVersion=get)

    paths = {path(), autotune.cache_file("B200")}
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", load)
        paths.add(path())
        assert autotune.environment("H100")["driver"] == "99990"
    for name, value in {"torch.__version__": "2.9", "triton.__version__": "3.9"}.items():
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            paths.add(path())
    assert len(paths) == 5
    assert len({path(), path()} - paths) == 0
