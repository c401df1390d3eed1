"""Enumerated configurations: the heuristic one first, all within the target's limits, none twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fastunet.kernels import gpu
from fastunet.kernels.conv3x3 import config, config_grad, config_search
from fastunet.kernels.conv3x3.config import DESCRIPTOR, FOLDED, HALO, POINTER, ConvShape

AMPERE, HOPPER = gpu.known_target(80), gpu.known_target(90)
SHAPES = (
    ConvShape(64, 0, 64, 512, 512),
    ConvShape(64, 64, 64, 512, 512),
    ConvShape(1024, 0, 512, 64, 64, c_out2=512),
    ConvShape(3, 0, 64, 512, 512, aligned=False),
    ConvShape(33, 0, 17, 30, 30, aligned=False),
    ConvShape(16, 48, 32, 64, 64),
)


@pytest.mark.parametrize("target", [AMPERE, HOPPER], ids=lambda target: target.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_convolutions(shape: ConvShape, target: gpu.Target, dtype: torch.dtype) -> None:
    found = config_search.feasible_configs(config.CONV3X3, shape, dtype, target, allow_tf32=False)
    heuristic = config.conv_config(shape, dtype, target, allow_tf32=False)
    assert found[0] == heuristic
    assert len(set(found)) == len(found) > 1
    for each in found:
        pixels, sums = each.tile_h * each.tile_w, each.tile_h * each.tile_w * each.block_n
        stage = (pixels + each.block_n) * each.block_k * dtype.itemsize
        # A tile's two halves have the halo variant's warps each.
        warps = 2 * each.num_warps if each.variant == HALO else each.num_warps
        if each.variant != HALO:
            assert each.num_stages * stage <= target.shared_memory
        assert sums / (32 * warps) <= 128
        assert each.tile_w == 8
        assert each.variant != DESCRIPTOR or target.capability >= 90
        if each.variant != FOLDED and shape.aligned:
            assert shape.c1 % each.block_k == shape.c2 % each.block_k == 0
        if heuristic.block_n >= max(shape.c_out, shape.c_out2):
            assert each.block_n >= shape.c_out, "a joined head needs all channels in one block"


def test_forms_and_their_order() -> None:
    shape = SHAPES[0]
    variants = config_search.conv_variants(shape, torch.bfloat16, HOPPER, allow_tf32=False)
    assert list(variants) == [DESCRIPTOR, HALO, POINTER]
    assert variants[POINTER] == config.conv_config(shape, torch.bfloat16, gpu.known_target(89), allow_tf32=False)
    assert list(config_search.conv_variants(shape, torch.bfloat16, AMPERE, allow_tf32=False)) == [POINTER]
    assert list(config_search.conv_variants(SHAPES[3], torch.bfloat16, HOPPER, allow_tf32=False)) == [FOLDED]
    found = config_search.feasible_configs(config.CONV3X3, shape, torch.bfloat16, HOPPER, allow_tf32=False)
    assert found[: len(variants)] == list(variants.values())
    assert {each.variant for each in found} == set(variants)
    other = found[len(variants)]
    changed = [name for name in vars(other) if getattr(other, name) != getattr(variants[other.variant], name)]
    assert len(changed) == 1


def test_a_measured_table_does_not_move_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[0]
    before = config_search.feasible_configs(config.CONV3X3, shape, torch.bfloat16, HOPPER, allow_tf32=False)
    with config.autotune.overriding("conv3x3", replace(before[0], num_warps=16)):
        assert config_search.feasible_configs(config.CONV3X3, shape, torch.bfloat16, HOPPER, allow_tf32=False) == before


@pytest.mark.parametrize("target", [AMPERE, HOPPER], ids=lambda target: target.name)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], ConvShape(512, 0, 1024, 32, 32)], ids=str)
def test_weight_gradients(shape: ConvShape, target: gpu.Target) -> None:
    found = config_search.feasible_configs(config.WEIGHT_GRAD, shape, torch.bfloat16, target, allow_tf32=False)
    heuristic = config_grad.weight_grad_config(shape, torch.bfloat16, target, allow_tf32=False)
    assert found[0] == heuristic
    assert len(set(found)) == len(found) > 1
    for each in found:
        stage = each.tile_h * each.tile_w * (each.block_out + each.block_in) * 2
        assert each.num_stages * stage <= target.shared_memory
        assert each.variant == heuristic.variant
        if each.variant == DESCRIPTOR:
            assert (each.tile_h, each.tile_w) == (heuristic.tile_h, heuristic.tile_w)
            assert each.block_out >= 64
