"""The search for configurations: what wins and by how much, what is dropped, and the table that comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_clock import FakeClock
from fastunet.benchmarks import tune
from fastunet.benchmarks.__main__ import main
from fastunet.benchmarks.cases import Settings
from fastunet.benchmarks.gpu_steps import layer_of
from fastunet.kernels import gpu, tuning
from fastunet.kernels.conv3x3 import config

from fastunet.timing import interleaved_samples

HOPPER = gpu.known_target(90)
SETTINGS = Settings(device="cpu", rounds=5)
DERIVED = config.ConvConfig(16, 8, 64, 32, 4, 2, config.POINTER)
OTHERS = [replace(DERIVED, tile_h=8), replace(DERIVED, num_warps=8)]
CANDIDATES = [DERIVED, *OTHERS]
PREPARING = 20  # Seconds.


def choose(seconds: list[float | Exception], aten: float) -> dict:
    clock = FakeClock()

    def prepare(candidate: config.ConvConfig) -> list[Callable[[], None]]:
        found = seconds[CANDIDATES.index(candidate)]
        if isinstance(found, Exception):
            raise found
        clock.time += PREPARING
        return [clock.run("candidate", found)]

    def timer(settings: Settings, runs: dict) -> dict[str, list[float]]:
        return interleaved_samples(runs, clock, rounds=settings.rounds)

    return tune.choose(CANDIDATES, prepare, [clock.run("aten", aten)], SETTINGS, lambda: clock.time, timer)


def test_the_fastest_wins_with_its_margins() -> None:
    found = choose([2.0, 1.0, 4.0], aten=0.5)
    assert found["winner"] == OTHERS[0]
    assert found["margin_over_derived"]["median"] == 2.0
    assert found["margin_over_aten"]["median"] == 0.5, "a loss against cuDNN is on record too"
    assert (found["tried"], found["dropped"]) == (3, [])


def test_the_derived_one_stays_where_none_is_faster() -> None:
    for seconds in ([1.0, 2.0, 4.0], [1.0, 1.0, 1.0]):
        found = choose(seconds, aten=3.0)
        assert found["winner"] == DERIVED
        assert (found["margin_over_derived"]["median"], found["margin_over_aten"]["median"]) == (1.0, 3.0)


def test_what_is_wrong_or_does_not_run_is_dropped_however_fast() -> None:
    found = choose([AssertionError("y is off"), 5.0, RuntimeError("out of resources")], aten=10.0)
    assert found["winner"] == OTHERS[0]
    assert [each["reason"] for each in found["dropped"]] == [
        "parity failed: y is off",
        "RuntimeError: out of resources",
    ]
    assert "margin_over_derived" not in found
    with pytest.raises(AssertionError, match="none of 3 configurations is right: parity failed: y is off"):
        choose([AssertionError("y is off")] * 3, aten=1.0)


@pytest.mark.parametrize(("limit", "tried"), [(1, 1), (30, 2), (50, 3)])
def test_preparing_ends_in_time_but_not_before_the_first(
    limit: int, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "_PREPARING", limit)
    assert choose([4.0, 2.0, 1.0], aten=1.0)["tried"] == tried


def test_every_shape_is_searched_once() -> None:
    steps = tune.tune_steps(Settings())
    assert [step.variant for step in steps] == sorted((step.variant for step in steps), key=tune.KERNELS.index)
    assert {step.name for step in steps if step.variant == config.COMPOSED} == {f"up{i}.c1" for i in (1, 2, 3, 4)}
    forward = {step.name for step in steps if step.variant == config.CONV3X3}
    assert {"inc.c1", "inc.c2", "up4.c1", "down4.c2"} <= forward
    assert not {"up4.c2", "outc", "up1.up"} & forward, "up4.c2 has inc.c2's shape; the others are no 3x3 convolutions"
    assert "inc.c1" not in {step.name for step in steps if step.variant == config.INPUT_GRAD}


def meta(*sizes: int) -> torch.Tensor:
    return torch.empty(sizes, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)


def test_a_composed_launch_takes_what_the_table_says(tmp_path: Path) -> None:
    kernels = pytest.importorskip("fastunet.kernels.conv_transpose2x2_concat_conv3x3", reason="needs triton")
    (layer,) = (each for each in tune._layers_of(Settings(batch=2), config.COMPOSED) if each.name == "up4.c1")
    shape = tune.conv_shape(layer.shapes, config.COMPOSED)
    candidates = tune.candidates_of(config.COMPOSED, shape, HOPPER)
    assert all(64 % candidate.block_n == 0 for candidate in candidates)
    winner = candidates[-1]
    row = {"name": "up4.c1", "entry": tuning.as_row(config.COMPOSED, shape, torch.bfloat16, False, winner)}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(tune.table([row], HOPPER.name, {})))
    images = meta(2, 64, 512, 512), meta(2, 128, 256, 256)
    weights = kernels.Composed(meta(64, 9 * 64, 1, 1)[:, :, 0, 0], meta(4 * 64, 4 * 128, 1, 1)[:, :, 0, 0], None)
    with tuning.reading(path), gpu.recording(HOPPER) as launches:
        kernels.conv_transpose2x2_concat_conv3x3(*images, weights)
    (launch,) = launches
    assert winner != candidates[0]
    assert (launch.num_warps, launch.arguments["TILE_H"]) == (winner.num_warps, winner.tile_h)
    assert launch.arguments["BLOCK_K"] == winner.block_k


@pytest.mark.parametrize("name", ["inc.c1", "inc.c2", "up4.c1"])
@pytest.mark.parametrize("kind", [kernel for kernel in tune.KERNELS if kernel != config.COMPOSED])
def test_the_launchers_take_what_the_table_says(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shape of a search is that of the launch: from the file that is written to the kernel's blocks."""
    kernels = pytest.importorskip("fastunet.kernels.conv3x3.grad", reason="needs triton")
    from fastunet.kernels.conv3x3 import pointer

    layer = layer_of(Settings(batch=2), name)
    shape = tune.conv_shape(layer.shapes, kind)
    winner = tune.candidates_of(kind, shape, HOPPER)[-1]
    row = {"name": name, "entry": tuning.as_row(kind, shape, torch.bfloat16, False, winner)}
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    tuning._table_of.cache_clear()
    tuning.table_path(HOPPER.name).write_text(json.dumps(tune.table([row], HOPPER.name, {"commit": "abc"})))
    tensors = [meta(*layer.shapes[each]) for each in ("x", "skip", "up") if each in layer.shapes]
    x, up = (*tensors, None)[:2]
    weight, y = meta(*layer.shapes["weight"]), meta(2, layer.shapes["weight"][0], *x.shape[2:])
    with gpu.recording(HOPPER) as launches:
        if kind == config.CONV3X3:
            assert pointer.choose(x, up, weight, HOPPER, allow_tf32=False) == winner
        elif kind == tune.WEIGHT_GRAD:
            kernels.conv3x3_weight_grad(y, x)
        elif up is None:
            kernels.conv3x3_input_grad(y, weight)
        else:
            kernels.conv3x3_two_input_grads(y, weight, x.shape[1])
    for chosen in launches[:1]:
        blocks = {key: value for key, value in chosen.arguments.items() if key.startswith("BLOCK")}
        assert (chosen.num_warps, chosen.num_stages) == (winner.num_warps, winner.num_stages)
        assert blocks == {key.upper(): value for key, value in vars(winner).items() if key.startswith("block")}
    tuning._table_of.cache_clear()


def test_a_table_keeps_the_rows_of_other_shapes() -> None:
    def row(height: int, tile: int) -> dict:
        shape = config.ConvShape(64, 0, 64, height, 64)
        entry = tuning.as_row("conv3x3", shape, torch.bfloat16, False, replace(DERIVED, tile_h=tile))
        return {"name": "inc.c2", "entry": entry | {"margin_over_aten": 1.5}}

    first = tune.table([row(64, 8), row(32, 8)], "a GPU", {"commit": "old", "torch": "2.11"})
    second = tune.table([row(64, 16), {"name": "up1.c2"}], "a GPU", {"commit": "new"}, first)
    found = [(e["shape"]["height"], e["config"]["tile_h"], e["measured"]["commit"]) for e in second["configs"]]
    assert found == [(64, 16, "new"), (32, 8, "old")]
    assert second["gpu"] == "a GPU"
    assert second["configs"][0]["margin_over_aten"] == 1.5


@pytest.mark.skipif(tune.dispatch.interpreting(), reason="TRITON_INTERPRET=1 lets kernels run on the CPU")
def test_without_a_gpu_there_is_nothing_to_tune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.json"
    with pytest.raises(SystemExit):
        main(["tune", "--out", str(out), "--device", "cpu"])
    assert "there is nothing to tune: " in capsys.readouterr().err
    assert not out.exists()
