"""The long search: what it leaves in a table whatever comes of it, and that launches take what a table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from fake_clock import FakeClock
from fastunet.benchmarks import tune
from fastunet.benchmarks.__main__ import main
from fastunet.benchmarks.cases import Settings
from fastunet.benchmarks.harness.worker import Budget
from fastunet.benchmarks.tables import tune_table

pytest.importorskip("triton", reason="needs triton, for kernels and descriptors")

from fastunet.kernels import autotune, gpu
from fastunet.kernels import conv_transpose2x2_concat_conv3x3 as composed
from fastunet.kernels.conv3x3 import config, config_search, grad, pointer

HOPPER = gpu.known_target(90)


def test_a_table_holds_what_was_measured_when_the_time_was_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first net takes 40 of 60 seconds, the second crashes, the third hangs."""
    clock, asked = FakeClock(), []
    row = {"op": "conv1x1", "dtype": "bfloat16", "shape": {"height": 8}, "speedup": 1.5}

    def ask(request: tuple[Any, str, float], timeout: float) -> None:
        asked.append(request)
        clock.time += [40, 5, 15][len(asked) - 1]
        if len(asked) == 1:
            autotune.put(HOPPER.name, [row])
            autotune._tables.clear()  # It is another process.
        else:
            raise ChildProcessError("crashed") if len(asked) == 2 else TimeoutError("no result")

    monkeypatch.setattr(tune, "Spawned", process := MagicMock())
    process().__enter__().ask = ask
    monkeypatch.setattr(gpu, "target", lambda _: HOPPER)
    path = tmp_path / "new" / "table.json"
    rows = tune.measure_table(Settings(device="cpu"), path, Budget(60.0, lambda: clock.time))
    assert asked == [("batch", "inference", 60.0), ("batch", "training", 20.0), ("instance", "inference", 15.0)]
    assert rows == json.loads(path.read_text())["rows"] == [row]
    assert "| conv1x1 | bfloat16 | height=8 | 1.5 |" in tune_table(rows)


def test_a_net_is_tuned_as_it_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple] = []

    def fake(model: Any, x: torch.Tensor, **options: Any) -> None:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        seen.append((model.config["norm"], model.training, [*x.shape], dtype, options))

    monkeypatch.setattr(tune.fastunet, "tune", fake, raising=False)
    settings = Settings(device="cpu", features=(4, 8), size=16, batch=2)
    tune.tune_net(settings, ("instance", "training", 7.0))
    assert seen == [("instance", True, [2, 3, 16, 16], torch.bfloat16, {"seconds": 7.0, "neighbours": None})]


def meta(*sizes: int) -> torch.Tensor:
    return torch.empty(sizes, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [(3, 0), (64, 0), (64, 64)], ids=str)
@pytest.mark.parametrize("op", [config.CONV3X3, config.INPUT_GRAD, config.WEIGHT_GRAD, config.COMPOSED])
def test_launches_ask_for_what_a_search_tries_and_take_what_wins(op: str, channels: tuple[int, int]) -> None:
    """The shape that they ask with is that of the row: from the search to the kernel's blocks."""
    (c1, c2), side = channels, 512
    x, up, y = (meta(2, channels, side, side) for channels in (c1, c2, 64))
    weight, low = meta(64, c1 + c2, 3, 3), meta(2, 128, side // 2, side // 2)

    def launch() -> gpu.Launch:
        with gpu.recording(HOPPER) as launches:
            if op == config.CONV3X3:
                pointer.conv3x3(x, weight, up=up if c2 else None)
            elif op == config.WEIGHT_GRAD:
                grad.conv3x3_weight_grad(y, x)
            elif op == config.COMPOSED:
                parts = meta(64, 9 * c1, 1, 1)[:, :, 0, 0], meta(4 * 64, 4 * 128, 1, 1)[:, :, 0, 0]
                composed.conv_transpose2x2_concat_conv3x3(x, low, composed.Composed(*parts, None))
            else:
                grad.conv3x3_input_grads(y, weight, [c1, c2] if c2 else [c1])
        return launches[0]

    if op == config.COMPOSED and c1 == 3:
        pytest.skip("it has no kernel for so few channels")
    with autotune.configs_asked() as asked:
        launch()
    ((name, shape, dtype, allow_tf32),) = asked
    assert name == op
    candidates = config_search.feasible_configs(*asked[0][:3], HOPPER, allow_tf32=allow_tf32)
    winner = next(each for each in reversed(candidates) if each.variant == candidates[0].variant)
    assert winner != candidates[0]
    autotune.put(HOPPER.name, [autotune.config_row(op, shape, dtype, allow_tf32, winner)])
    after = launch()
    blocks = {key: value for key, value in after.arguments.items() if key.startswith("BLOCK")}
    assert (after.num_warps, after.num_stages) == (winner.num_warps, winner.num_stages)
    assert blocks == {key.upper(): value for key, value in vars(winner).items() if key.startswith("block")}


def test_without_a_gpu_there_is_nothing_to_tune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        main(["tune", "--out", str(tmp_path / "table.json")])
    assert "there is nothing to tune: " in capsys.readouterr().err
    assert not (tmp_path / "table.json").exists()
