"""Inference from a list of launches in one block of memory: places, results to the bit, and what is refused."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from kernel_device import DEVICE, MARK, ieee  # noqa: F401
from small_net import net
from torch import Tensor, nn

import fastunet
from fastunet.checks import ConfigError
from fastunet.plan import Buffer, arrange, planned, record
from fastunet.testing import assert_within, random_input

pytestmark = MARK


@pytest.fixture(autouse=True)
def forced() -> Iterator[None]:
    with fastunet.backend("triton"), torch.no_grad():
        yield


def needed(buffers: list[Buffer]) -> int:
    """The most that is needed at one step."""
    steps = range(max(b.last for b in buffers) + 1)
    return max(sum(-(-b.size // 512) * 512 for b in buffers if b.first <= i <= b.last) for i in steps)


def end(buffers: list[Buffer], offsets: list[int]) -> int:
    return max(offset + -(-b.size // 512) * 512 for offset, b in zip(offsets, buffers, strict=True))


def test_no_two_that_are_needed_at_once_overlap() -> None:
    random.seed(0)
    for _ in range(50):
        firsts = [random.randrange(12) for _ in range(14)]
        buffers = [Buffer(random.randrange(1, 9000), first, first + random.randrange(5)) for first in firsts]
        offsets = arrange(buffers)
        for (a, at), (b, bt) in itertools.combinations(zip(buffers, offsets, strict=True), 2):
            if a.first <= b.last and b.first <= a.last:
                assert at + a.size <= bt or bt + b.size <= at
            assert at % 512 == 0
        assert end(buffers, offsets) <= 1.5 * needed(buffers)


def test_a_chain_takes_two_places() -> None:
    """Each step reads what the one before wrote."""
    buffers = [Buffer(1000, i, i + 1) for i in range(6)]
    assert sorted(set(arrange(buffers))) == [0, 1024]
    assert end(buffers, arrange(buffers)) == needed(buffers)


def image(seed: int = 0, shape: tuple[int, ...] = (2, 2, 4, 6)) -> Tensor:
    return random_input(shape, device=DEVICE, seed=seed)


@pytest.mark.parametrize(
    "options",
    [{}, {"head": "sigmoid"}, {"norm": None, "activation": "leaky_relu"}, {"norm": "instance", "head": "softmax"}],
    ids=str,
)
def test_results_are_the_models_to_the_bit(options: dict) -> None:
    model = net(**options)
    fast = planned(model)
    results = [(fast(image(seed)), model(image(seed))) for seed in (0, 1)]
    for actual, expected in results:
        assert_within(actual, expected, 0)
    assert not torch.equal(results[0][0], results[1][0])


def test_changes_of_weights_are_seen() -> None:
    model, x = net(), image()
    fast = planned(model)
    before = fast(x)
    model.ups[0].up.weight.data.mul_(2)  # It is copied for its kernel.
    assert_within(fast(x), model(x), 0)
    assert not torch.equal(fast(x), before)
    model.outc.conv.weight = nn.Parameter(model.outc.conv.weight * 3)
    assert_within(fast(x), model(x), 0)
    model.load_state_dict(net(norm="batch").state_dict())
    assert_within(fast(x), before, 0)


def test_the_block_is_what_is_needed_at_once() -> None:
    """Of the classic order of layers: a third of all that is written."""
    from fastunet.kernels import gpu

    model, x = net(), image(shape=(1, 2, 16, 16))
    with gpu.recording() as steps:
        model(x)
    lasting = {t.data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    written = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for step in steps
        for t in (getattr(v, "base", v) for v in getattr(step, "arguments", {}).values())
        if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in lasting
    }
    replay, result = record(lambda: model(x))
    assert result.untyped_storage().nbytes() < 0.6 * sum(-(-size // 512) * 512 for size in written.values())
    replay()
    assert_within(result, model(x), 0)


def test_a_list_that_does_not_repeat_the_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here because all that it needs takes one place; on a GPU whatever the reason may be."""
    monkeypatch.setattr("fastunet.plan.arrange", lambda buffers: [0] * len(buffers))
    model, x = net(), image()
    with pytest.raises(ConfigError, match="does not repeat"):
        record(lambda: model(x))


class Doubled(nn.Module):
    """Work of ATen's after, before or between kernels."""

    def __init__(self, model: nn.Module, where: str) -> None:
        super().__init__()
        self.model, self.where = model, where

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "after":
            return self.model(x) * 2
        if self.where == "in place":
            return self.model(x).mul_(2)
        return self.model(x * 2)


@pytest.mark.parametrize("where", ["after", "in place", "before"])
def test_other_work_is_refused(where: str) -> None:
    with pytest.raises(ConfigError, match="Triton kernel"):
        planned(Doubled(net(), where).eval())(image())


def test_what_pads_or_runs_on_aten_is_refused() -> None:
    with pytest.raises(ConfigError, match="not all work"):
        planned(net())(image(shape=(1, 2, 5, 5)))
    with fastunet.backend("aten"), pytest.raises(ConfigError, match="no Triton kernel runs"):
        planned(net())(image())


def test_only_a_threads_own_launches_are_noted() -> None:
    import threading

    from fastunet.kernels import gpu

    model, x = net(), image()
    with gpu.recording() as steps:
        thread = threading.Thread(target=lambda: model(x))
        thread.start()
        thread.join()
    assert steps == []
