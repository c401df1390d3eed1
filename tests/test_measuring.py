"""Measuring layers on a GPU, feigned here: what wins, what stays with ATen, when nothing is measured, in what order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fake_clock import FakeClock
from fastunet.kernels import autotune, gpu, self_test
from torch import Tensor, nn

import fastunet
from fastunet import dispatch, measuring, tuning
from fastunet.compiler.backend import find_patterns
from fastunet.explanation import calls
from fastunet.files import locked

pytest.importorskip("triton", reason="needs triton, whose version is part of an environment")

OP, GPU = "max_pool2x2", gpu.known_target(90)


class Args(NamedTuple):
    x: Tensor

    def choice(self, *, training: bool = False) -> dispatch.Choice:
        return dispatch.choose(OP, self.x, training=training)


class Ops:
    """An op whose time is known, by implementation, on the clock of a GPU."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock, self.seconds, self.off, self.fits = clock, {"triton": 1.0, "aten": 1.25}, 0.0, 99
        self.batches: set[int] = set()

    def call(self, args: Args) -> Tensor:
        if len(args.x) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        backend = dispatch.selected_backend()
        self.batches.add(len(args.x))
        self.clock.time += self.seconds[backend]
        return args.x * 2 + (self.off if backend == "triton" else 0.0)

    def settle(self, side: int = 8) -> dispatch.Choice:
        args = Args(torch.zeros(4, 3, side, side))
        return measuring.settle(self.call, args, args.choice())


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ops]:
    """A GPU whose kernels pass their check."""
    clock = FakeClock()

    def check(families: list[str], dtype: str, device: torch.device) -> dict[str, str]:
        autotune.put(GPU.name, [{"op": name, "dtype": dtype, "shape": {}, "failed": ""} for name in families])
        return dict.fromkeys(families, "")

    monkeypatch.setattr(self_test, "check", check)
    monkeypatch.setattr(gpu, "target", lambda _: GPU)
    monkeypatch.setattr(dispatch, "triton_unsupported", lambda *_: None)
    is_to_measure = dispatch.is_to_measure
    monkeypatch.setattr(dispatch, "is_to_measure", lambda choice, _: is_to_measure(choice, torch.device("cuda")))
    monkeypatch.setattr(measuring, "clock_of", lambda _: clock)
    monkeypatch.setattr(measuring, "process_budget", measuring.Budget(1e9, lambda: clock.time))
    with fastunet.backend("auto"):
        yield Ops(clock)


@pytest.fixture
def measured(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> list[autotune.Layer]:
    """The layers that would be measured, in order; they are skipped."""
    layers: list[autotune.Layer] = []

    def measure(call: Any, args: Any, layer: autotune.Layer, *options: Any) -> None:
        layers.append(layer)
        measuring.skip(args, layer, "as a test has it")

    monkeypatch.setattr(measuring, "measure", measure)
    return layers


@pytest.mark.parametrize(("aten", "implementation"), [(1.25, "triton"), (1.02, "aten"), (0.5, "aten")])
def test_what_is_faster_wins_from_its_first_call_on(ops: Ops, aten: float, implementation: str) -> None:
    ops.seconds["aten"] = aten
    random = torch.get_rng_state()
    choice = ops.settle()
    assert torch.equal(torch.get_rng_state(), random), "what follows in a training must not depend on it"
    assert (choice.implementation, choice.speedup) == (implementation, pytest.approx(aten))
    autotune._tables.clear()
    dispatch._choices.clear()
    assert Args(torch.zeros(9, 3, 8, 8)).choice() == choice, "in another process, and for another batch"


def test_the_budget_ends_and_what_is_left_waits_for_the_next_process(ops: Ops) -> None:
    measuring.process_budget = measuring.Budget(10.0, lambda: ops.clock.time)
    assert ops.settle(8).implementation == "triton", "what is begun is finished"
    choice = ops.settle(16)
    assert (choice.implementation, choice.unmeasured) == ("aten", None)
    assert choice.reason.endswith("no time was left (FASTUNET_TUNE_SECONDS)")
    autotune._tables.clear()
    assert Args(torch.zeros(1, 3, 16, 16)).choice().reason == choice.reason, "choices are remembered"
    dispatch._choices.clear()
    assert Args(torch.zeros(1, 3, 16, 16)).choice().unmeasured is not None


def test_wrong_results_at_the_size_of_the_layer_are_kept_and_told(ops: Ops) -> None:
    ops.off, ops.seconds["triton"] = 0.1, 1e-3
    with pytest.warns(RuntimeWarning, match="does not run on Triton on sm_90: AssertionError: off by"):
        choice = ops.settle()
    assert (choice.implementation, "off by" in choice.reason) == ("aten", True)
    autotune._tables.clear()
    dispatch._choices.clear()
    assert Args(torch.zeros(4, 3, 8, 8)).choice() == choice


def test_out_of_memory_fewer_images_are_taken(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    ops.fits = 1
    assert ops.settle().implementation == "triton"
    assert ops.batches == {1}
    ops.fits = 0
    choice = ops.settle(16)
    assert (choice.implementation, choice.reason.endswith("does not fit into memory twice")) == ("aten", True)


def test_what_another_process_measures_is_waited_for_and_taken(ops: Ops) -> None:
    autotune._said.clear()
    folder = autotune.cache_file(GPU.name).parent
    layer = autotune.Layer(OP, 0, 3, 8, 8, training=False)
    dtype = autotune.format_of(torch.float32, dispatch.tf32_allowed())
    rows = [{"op": OP, "dtype": dtype, "shape": shape} for shape in ({}, layer.shape)]
    kept = autotune.by_key([rows[0] | {"failed": ""}, rows[1] | {"speedup": 9.0}])
    with locked(folder):
        with pytest.warns(RuntimeWarning, match="another process is measuring"):
            assert ops.settle().unmeasured is not None
        autotune.write_table(autotune.cache_file(GPU.name), autotune.environment(GPU.name), kept)
    assert ops.settle().speedup == 9.0
    assert ops.batches == set()


def test_without_a_place_to_write_layers_are_measured_all_the_same(
    ops: Ops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTUNET_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="nothing can be kept there"):
        assert ops.settle().implementation == "triton"


def test_nothing_is_measured_where_it_must_not_be(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the layer stays to be measured."""
    conditions: dict[str, list[tuple[Any, str, Any]]] = {
        "switched off": [(dispatch, "_tune", "0")],
        "deterministic": [(torch, "are_deterministic_algorithms_enabled", lambda: True)],
        "several ranks": [(dispatch, "ranks", lambda: 2)],
        "tracing": [(torch.compiler, "is_compiling", lambda: True)],
        "capture": [(torch.cuda, name, lambda: True) for name in ("is_available", "is_current_stream_capturing")],
    }
    for name, patches in conditions.items():
        with monkeypatch.context() as patch:
            for patched in patches:
                patch.setattr(*patched)
            assert ops.settle().unmeasured is not None, name
    found: list[dispatch.Choice] = []
    thread = threading.Thread(target=lambda: found.append(ops.settle()))
    thread.start()
    thread.join()
    assert found[0].unmeasured is not None
    assert ops.batches == set()
    monkeypatch.undo()
    choice = dispatch.Choice("aten", "", unmeasured=autotune.Layer(OP, 0, 3, 8, 8, training=False))
    assert not dispatch.is_to_measure(choice, torch.device("cpu"))


def test_an_op_measures_itself_in_each_way_it_is_called(measured: list[autotune.Layer]) -> None:
    """But explaining a model measures nothing, nor does tracing it."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2)), torch.randn(1, 3, 8, 8)
    fastunet.explain(fastunet.UNet(3, 2, features=(4, 8)), x)
    fastunet.explain(model, x)
    torch.export.export(fastunet.UNet(3, 2, features=(4, 8)), (x,))
    assert measured == []
    calls: list[Callable[[Tensor], Any]] = [
        fastunet.ops.max_pool2x2,
        torch.ops.fastunet.max_pool2x2,
        torch.compile(fastunet.ops.max_pool2x2, backend="aot_eager"),
    ]
    for side, call in enumerate(calls, 4):
        for _ in range(2):
            call(torch.randn(1, 3, 2, 2 * side))
    assert [layer.width for layer in measured] == [8, 10, 12], "each once"
    fastunet.ops.max_pool2x2(x.requires_grad_()).sum().backward()
    assert measured[3].training


def test_a_net_left_to_aten_runs_its_ops_until_they_are_measured(measured: list[autotune.Layer]) -> None:
    model, x = fastunet.UNet(3, 2, features=(4, 8)).train(), torch.randn(2, 3, 16, 16)
    model(x)
    assert {layer.op for layer in measured} == {"conv3x3_batch_norm_relu", "conv_transpose2x2", "conv1x1"}
    before = len(measured)
    model(x)
    assert len(measured) == before


# --- configurations ---


def search(seconds: list[float | Exception], left: float = 100.0) -> int:
    """Which of the candidates 0, 1, ... wins."""
    clock = FakeClock()

    def prepare(candidate: int) -> list[Callable[[], None]]:
        found = seconds[candidate]
        if isinstance(found, Exception):
            raise found
        clock.time += 20
        return [clock.run("candidate", found)]

    budget = measuring.Budget(left, lambda: clock.time)
    with budget.spend():
        timed = lambda runs: measuring.interleaved_samples(runs, clock, rounds=5)  # noqa: E731
        return measuring.search(range(len(seconds)), prepare, timed, budget)


def test_the_fastest_configuration_wins_and_the_heuristic_one_a_draw() -> None:
    assert search([2.0, 1.0, 4.0]) == 1
    assert search([1.0, 1.0, 4.0]) == 0
    assert search([3.0, AssertionError("y is off"), RuntimeError("out of resources"), 2.0]) == 3, "however fast"
    assert search([3.0, 2.0, 1.0], left=30.0) == 1, "the third is not begun"
    assert search([3.0, 2.0, 1.0], left=10.0) == 0
    with pytest.raises(AssertionError, match="y is off"):
        search([AssertionError("y is off"), 1.0])


# --- ahead ---


def test_those_with_most_to_gain_come_first_and_those_without_are_left(
    measured: list[autotune.Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = fastunet.UNet(3, 2, features=(4, 8)).train(), torch.zeros(2, 3, 16, 16)

    def gain_of(call: Any, args: Any, layer: autotune.Layer, *rates: float) -> tuple[float, float]:
        return float(layer.c_in), 0.5 if layer.op == "conv3x3_batch_norm_relu" else 0.01

    monkeypatch.setattr(tuning, "peak_rates", lambda _: (1.0, 1.0))
    monkeypatch.setattr(tuning, "gain_of", gain_of)
    told: list[tuple[int, int, str]] = []
    tuning._measure(model, x, measuring.process_budget, 2, lambda *standing: told.append(standing))
    assert [layer.c_in for layer in measured] == [8, 8, 4, 4, 3]
    assert all(layer.training for layer in measured)
    assert told[-1] == (7, 7, "")
    reasons = {row.op: row.reason for row in fastunet.explain(model, x).rows}
    assert "least time that the GPU's peak rates allow" in reasons["conv1x1"]
    assert "as a test has it" in reasons["conv3x3_batch_norm_relu"]


def test_what_there_was_no_time_for_is_measured_when_asked_to(
    measured: list[autotune.Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the process that had none."""
    monkeypatch.setattr(tuning, "peak_rates", lambda _: (1.0, 1.0))
    model, x, skipped = fastunet.UNet(3, 2, features=(4, 8)).train(), torch.zeros(2, 3, 16, 16), set()
    for _, args in calls(model, x):
        layer = args.choice(training=True).unmeasured
        if layer is not None:
            measuring.skip(args, layer, measuring.NO_TIME)
            skipped.add(layer)
    assert not any(args.choice(training=True).unmeasured for _, args in calls(model, x))
    tuning._measure(model, x, measuring.Budget(0.0), 2, lambda *standing: None)
    assert skipped
    assert {*measured} == skipped


def test_a_compiled_model_is_measured_by_what_would_replace_it(ops: Ops) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)).train()
    for each in (model, torch.compile(model)):
        ((op, args),) = calls(each, torch.zeros(2, 3, 16, 16))
        assert (op.name, args.pool, args.slope) == ("conv3x3", True, 0.0)
        assert args.choice(training=True).unmeasured == autotune.Layer("conv3x3_bias_relu", 4, 3, 16, 16, training=True)


def patterns_of(model: nn.Module, x: Tensor, **options: Any) -> list[Any]:
    """What the compiler's backend finds in model(x)."""
    found: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        found.extend(pattern for _, patterns in find_patterns(graph) for pattern in patterns)
        return graph.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, **options)(x)
    return found


@pytest.mark.parametrize(("inductor", "is_replaced"), [(1.2, True), (1.05, False), (None, False)])
def test_what_inductor_makes_of_a_layer_is_measured_too(
    ops: Ops, inductor: float | None, is_replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel a quarter faster than ATen replaces it in a compiled graph where it is faster than that as well."""

    def compiled(args: Args) -> Tensor:
        if inductor is None:
            raise RuntimeError("no compiler")
        ops.clock.time += inductor
        return args.x * 2

    args = Args(torch.zeros(2, 3, 8, 12))
    layer = args.choice().unmeasured
    assert layer is not None
    measuring.measure(ops.call, args, layer, measuring.process_budget, compiled=compiled)
    assert args.choice().over_inductor == (inductor and pytest.approx(inductor))
    (pattern,) = patterns_of(nn.Sequential(nn.MaxPool2d(2)), args.x)
    assert pattern.is_replaced == is_replaced, pattern.reason


def test_on_the_cpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "measure", None)
    model, x = fastunet.UNet(3, 2, features=(4, 8)), torch.zeros(2, 3, 16, 16)
    assert fastunet.tune(model, x).rows == fastunet.explain(model, x).rows


def _rank(rank: int, file: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    if rank == 0:
        autotune.put("a GPU", [{"op": OP, "dtype": "float32", "shape": {}, "failed": ""}], keep=False)
    tuning.share("a GPU")
    assert "failed" in autotune.look_up("a GPU", OP, "float32", {})
    assert dispatch.ranks() == 2
    torch.distributed.destroy_process_group()


def test_ranks_know_what_the_first_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"),), nprocs=2)


def test_a_quantised_model_leaves_kernels_that_fail_their_check(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def check(families: list[str], dtype: str, device: torch.device) -> dict[str, str]:
        asked.append(families)
        autotune.put(GPU.name, [{"op": "conv3x3_fp8", "dtype": dtype, "shape": {}, "failed": "y is off"}])
        return {"conv3x3_fp8": "y is off"}

    monkeypatch.setattr(self_test, "check", check)
    for _ in range(2):
        assert measuring.failure_of("conv3x3_fp8", "bfloat16", torch.device("cuda")) == "y is off"
    assert asked == [["conv3x3_fp8"]]


def test_an_open_size_is_left_to_the_op_where_some_size_was_faster(ops: Ops) -> None:
    model, x = nn.Sequential(nn.Identity(), nn.MaxPool2d(2)), torch.randn(2, 3, 8, 12)
    (before,) = patterns_of(model, x, dynamic=True)
    ops.settle(16)
    torch.compiler.reset()
    (after,) = patterns_of(model, x, dynamic=True)
    assert (before.is_replaced, after.is_replaced) == (False, True)
    assert after.reason.endswith("the op decides when it runs")
