"""Inference by graphs: when one is recorded, what it is given, and what comes back; recording itself is faked here."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastunet
from fastunet.checks import ConfigError, DeviceError
from fastunet.inference.cuda_graphs import GraphedModel, graphed


class Recorder:
    """A replay runs the function again, and leaves its result where the first lay, as a graph does."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        result = run().clone()

        def replay() -> None:
            self.replayed += 1
            result.copy_(run())

        return replay, result


@pytest.fixture
def net() -> fastunet.UNet:
    torch.manual_seed(0)
    return fastunet.UNet(1, 2, features=(4, 8), head="softmax").eval()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def fast(net: fastunet.UNet, recorder: Recorder) -> GraphedModel:
    return GraphedModel(net, record=recorder)


def image(n: int = 1, side: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_results_are_the_models_and_stay(net: fastunet.UNet, fast: GraphedModel, recorder: Recorder) -> None:
    x, other = image(), image(seed=1)
    first = fast(x)
    second = fast(other)
    torch.testing.assert_close(first, net(x))
    torch.testing.assert_close(second, net(other))
    assert not torch.equal(first, second)
    assert (recorder.recorded, recorder.replayed) == (1, 2)


@torch.no_grad()
def test_all_is_done_on_the_images_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is current: a graph is recorded on the current GPU's stream."""
    current, seen = ["cuda:0"], []

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(str(chosen))
        yield
        current.pop()

    def replayed(self: GraphedModel, x: Tensor) -> Tensor:
        seen.append(current[-1])
        return x

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(GraphedModel, "_replayed", replayed)
    with FakeTensorMode():  # A tensor of a GPU that is not here.
        graphed(nn.Identity().eval())(torch.empty_strided((1, 1, 8, 8), (64, 64, 8, 1), device="cuda:1"))
    assert seen == ["cuda:1"]
    assert current == ["cuda:0"]


@torch.no_grad()
def test_each_kind_of_call_has_a_graph_and_the_oldest_goes(net: fastunet.UNet, recorder: Recorder) -> None:
    fast = GraphedModel(net, most=2, record=recorder)
    fast(image())
    fast(image(2))
    fast(image(seed=3))
    assert recorder.recorded == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(image()).dtype == torch.bfloat16
    assert recorder.recorded == 3, "the graph of two images is the oldest, and gone"
    fast(image())
    assert recorder.recorded == 3
    fast(image(2))
    assert recorder.recorded == 4


@torch.no_grad()
def test_changes_of_weights_are_seen(net: fastunet.UNet, fast: GraphedModel, recorder: Recorder) -> None:
    x = image()
    with fastunet.backend("aten"):  # Which prepares nothing, as most layers on a GPU.
        before = fast(x)
        net.outc.conv.bias.add_(torch.tensor([3.0, 0.0]))
        changed = fast(x)
        assert not torch.equal(before, changed)
        torch.testing.assert_close(changed, net(x))
    assert recorder.recorded == 1, "what is changed in place is where the graph reads it"
    assert not copy.deepcopy(fast)._graphs, "a copy records its own"


@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_calls_in_inference_mode_and_without(
    net: fastunet.UNet, fast: GraphedModel, recorder: Recorder, modes: tuple[Any, Any]
) -> None:
    for seed, mode in enumerate(modes):
        with mode():
            x = image(seed=seed)
            y = fast(x)
            torch.testing.assert_close(y, net(x))
            assert y.is_inference() == torch.is_inference_mode_enabled()
    assert recorder.recorded == 1


MOVES: dict[str, Callable[[Any, Any], object]] = {
    "model": lambda fast, net: setattr(fast, "model", fastunet.UNet(1, 2, features=(4, 8)).eval()),
    "module": lambda _, net: setattr(net, "outc", copy.deepcopy(net.outc)),
    "parameter": lambda _, net: setattr(net.outc.conv, "weight", nn.Parameter(net.outc.conv.weight.detach().clone())),
    "buffer": lambda _, net: setattr(net.inc.double_conv[1], "running_var", torch.ones(4)),
    "address": lambda _, net: setattr(net.outc.conv.weight, "data", net.outc.conv.weight.data.clone()),
    "one module more": lambda _, net: setattr(net.outc, "more", nn.Identity()),
}


@torch.no_grad()
@pytest.mark.parametrize("move", MOVES)
def test_what_lies_elsewhere_is_recorded_anew(fast: GraphedModel, recorder: Recorder, move: str) -> None:
    for recorded in (1, 2):
        for seed in (0, 1):
            torch.testing.assert_close(fast(image(seed=seed)), fast.model(image(seed=seed)))
            assert recorder.recorded == recorded
        MOVES[move](fast, fast.model)


@torch.no_grad()
def test_another_place_in_the_same_storage_is_recorded(
    net: fastunet.UNet, fast: GraphedModel, recorder: Recorder
) -> None:
    biases = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for recorded, bias in enumerate(biases, start=1):
        net.outc.conv.bias.data = bias
        torch.testing.assert_close(fast(image()), net(image()))
        assert recorder.recorded == recorded


@pytest.mark.usefixtures("layers_of_any_size")
@torch.no_grad()
def test_what_is_prepared_of_weights_is_in_the_graph(net: fastunet.UNet) -> None:
    """Here the replay does not run the model again: what it had prepared is part of it."""
    recorded = []

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        recorded.append(run())
        return lambda: None, recorded[-1]

    fast, x = GraphedModel(net, record=record), image()
    before = fast(x)
    torch.testing.assert_close(fast(x), before)
    assert len(recorded) == 1
    net.up1.conv.double_conv[0].weight.data.mul_(2)
    torch.testing.assert_close(fast(x), net(x))
    assert len(recorded) == 2
    assert not torch.equal(recorded[0], recorded[1])


def test_explain_looks_within(net: fastunet.UNet) -> None:
    assert fastunet.explain(graphed(net), image()) == fastunet.explain(net, image())


def test_errors(net: fastunet.UNet) -> None:
    with pytest.raises(ConfigError, match="at least 1 graph, got 0"):
        graphed(net, most=0)
    with pytest.raises(DeviceError, match="expected images on a GPU, got cpu"):
        graphed(net)(image())
    with pytest.raises(ConfigError, match="expected eval mode, got train mode"):
        graphed(net.train())(image())


@torch.no_grad()
def test_threads_take_turns(net: fastunet.UNet) -> None:
    def slow(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        result = run().clone()

        def replay() -> None:
            time.sleep(0.01)  # in which another thread would bring its image
            result.copy_(run())

        return replay, result

    fast = GraphedModel(net, record=slow)
    images = [image(seed=seed) for seed in range(8)]
    fast(images[0])
    with ThreadPoolExecutor(4) as pool:
        for x, found in zip(images, pool.map(fast, images), strict=True):
            assert torch.equal(found, net(x))
