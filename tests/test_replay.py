"""Calls repeated from a list: the bits of a call by itself, a list for each kind of arguments, and no memory held."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from fastunet.benchmarks import parity
from fastunet.kernels import config, gpu, tuning
from fastunet.kernels.conv3x3 import conv3x3
from kernel_device import DEVICE, MARK, ieee, poison  # noqa: F401
from torch import Tensor

import fastunet
from fastunet.ops import replay
from fastunet.ops.replay import replayed, replaying
from fastunet.testing import random_cotangent, random_input

pytestmark = MARK


@pytest.fixture(autouse=True)
def forced() -> Iterator[None]:
    with fastunet.backend("triton"):
        yield


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each call that is repeated, into memory full of NaN; tensors lie where compiled kernels are
    told that they do.
    """
    calls: list[int] = []
    run, tensor = replay._Program.__call__, replay._Place.tensor

    def checked(place: replay._Place, table: list[Any]) -> Tensor:
        found = tensor(place, table)
        assert found.data_ptr() == place.address(table)
        return found

    def counted(program: replay._Program, tensors: list[Tensor]) -> Any:
        calls.append(len(tensors))
        return run(program, tensors)

    monkeypatch.setattr(replay._Program, "__call__", counted)
    monkeypatch.setattr(replay._Place, "tensor", checked)
    poison(monkeypatch, "empty_strided")
    return calls


def results(case: parity.Case, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of the case on values of their own."""
    inputs = {}
    for i, (name, shape) in enumerate(case.shapes.items()):
        inputs[name] = random_input(shape, dtype=dtype, seed=100 * seed + i, device=DEVICE)
        inputs[name].requires_grad_(case.backward and name != "target")
    names = ("running_mean", "running_var") if case.buffers else ()
    buffers = {
        name: random_input(case.buffers or (), dtype=torch.float32, seed=100 * seed + i, device=DEVICE).abs() + 0.5
        for i, name in enumerate(names, 50)
    }
    outputs = parity.outputs_of(parity.run_op(case.op, inputs, buffers, case.options))
    cotangents = [random_cotangent(y, seed=20 + seed) for y in outputs] if case.backward else []
    return parity.results_of(outputs, inputs, cotangents) | buffers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", parity.cases_of(2, 3, 5, 4, 16), ids=str)
def test_a_repeated_call_has_the_bits_of_one_by_itself(
    case: parity.Case, dtype: torch.dtype, replays: list[int]
) -> None:
    with replaying(False):
        expected = results(case, dtype, 3)
    for seed in (1, 2):  # Seen, noted down.
        results(case, dtype, seed)
    before = len(replays)
    actual = results(case, dtype, 3)
    assert len(replays) - before >= (2 if case.backward else 1)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, equal_nan=True, msg=f"{case}: {name}")
        assert actual[name].stride() == value.stride()


def test_training_steps_have_the_bits_of_steps_by_themselves(replays: list[int]) -> None:
    """Four steps of two nets, of which one repeats: weights, running statistics and losses stay the same."""
    torch.manual_seed(0)
    nets = [fastunet.UNet(1, 1, features=(3, 5)).to(DEVICE) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = random_input((1, 1, 5, 6), dtype=torch.float32, device=DEVICE)
    loss, target = fastunet.losses.DiceLoss(sigmoid=True), (x > 0).to(torch.uint8)
    losses: list[list[float]] = [[], []]
    for net, kept, enabled in zip(nets, losses, (False, True), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with replaying(enabled):
            for _ in range(4):
                optimizer.zero_grad()
                value = loss(net(x), target)
                value.backward()
                optimizer.step()
                kept.append(value.item())
    assert losses[0] == losses[1]
    assert len({*losses[0]}) == 4
    assert len(replays) > 20
    for (name, a), b in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.fixture
def convolved() -> Callable[..., Tensor]:
    @replayed
    def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, slope: float | None = None) -> Tensor:
        return conv3x3(x, weight, bias, negative_slope=slope)[0]

    return convolved


def image(*, seed: int = 0, shape: tuple[int, ...] = (1, 4, 4, 4), dtype: torch.dtype = torch.float32) -> Tensor:
    return random_input(shape, dtype=dtype, seed=seed, device=DEVICE)


WEIGHT = (16, 4, 3, 3)


def shifted(t: Tensor) -> Tensor:
    """The values, off every boundary of 16 bytes."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def test_each_kind_of_arguments_has_its_own_list(convolved: Callable[..., Tensor], replays: list[int]) -> None:
    x, weight, bias = image(), image(shape=WEIGHT), image(shape=(16,))
    kinds: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, weight), {}),
        ((x, weight, bias), {}),
        ((x, weight), {"slope": 0.0}),
        ((x, weight), {"slope": 0.5}),
        ((x.contiguous(), weight), {}),
        ((x, weight.contiguous()), {}),
        ((shifted(x), weight), {}),
        ((x, shifted(weight)), {}),
        ((x.to(torch.bfloat16), weight.to(torch.bfloat16)), {}),
        ((image(shape=(2, 4, 4, 4)), weight), {}),
        ((image(shape=(1, 4, 4, 8))[..., ::2], weight), {}),
    ]
    for (args, options), _ in itertools.product(kinds, range(3)):
        with replaying(False):
            expected = convolved(*args, **options)
        assert torch.equal(convolved(*args, **options), expected)
    assert len(replays) == len(kinds)


def test_a_tensor_given_twice_is_not_taken_for_two(replays: list[int]) -> None:
    @replayed
    def joined(x: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        return conv3x3(x, weight, up=up)[0]

    a, b, weight = image(), image(seed=1), image(shape=(16, 8, 3, 3))
    for x, up in ((a, a), (a, a), (a, a), (a, b), (a, b), (b, a), (a, a)):
        with replaying(False):
            expected = joined(x, up, weight)
        assert torch.equal(joined(x, up, weight), expected)
    assert len(replays) == 2


def test_torchs_ops_views_and_writes_are_repeated(replays: list[int]) -> None:
    @replayed
    def mixed(x: Tensor, weight: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        y, _ = conv3x3(x[:, :, 1:], weight.flip(2))
        sums = y.new_zeros(2, y.shape[1])
        sums[1].copy_(y.sum((0, 2, 3)))
        halves = torch.cat([y, -y], dim=1).split(16, dim=1)
        signs = (y > 0).view(torch.int8)
        _, means = torch.var_mean(y, dim=1)
        return sums[1] * means.sum(), None, halves[1], -signs

    for seed in range(4):
        x, weight = image(seed=seed, shape=(2, 4, 4, 4))[1:], image(shape=WEIGHT, seed=seed + 9)
        with replaying(False):
            expected = mixed(x, weight)
        for a, b in zip(mixed(x, weight), expected, strict=True):
            assert a is b is None or torch.equal(a, b)
    assert len(replays) == 2


def test_what_reads_a_value_is_called_as_it_is(replays: list[int]) -> None:
    @replayed
    def by_value(x: Tensor, weight: Tensor) -> Tensor:
        return conv3x3(x, weight * x.flatten()[0].item())[0]

    @replayed
    def by_another(x: Tensor, weight: Tensor) -> Tensor:
        return conv3x3(x, weight + held)[0]

    weight, held = image(shape=WEIGHT), image(shape=WEIGHT, seed=4)
    for function, seed in itertools.product((by_value, by_another), range(4)):
        held.add_(1)
        with replaying(False):
            expected = function(image(seed=seed), weight)
        assert torch.equal(function(image(seed=seed), weight), expected)
    assert not replays


def test_nothing_is_repeated_where_launches_are_noted_down_or_configs_set(
    convolved: Callable[..., Tensor], replays: list[int]
) -> None:
    x, weight = image(), image(shape=WEIGHT)
    for _ in range(3):
        expected = convolved(x, weight)
    assert len(replays) == 1
    with gpu.recording() as steps:
        convolved(x, weight)
    assert sum(isinstance(step, gpu.Launch) for step in steps) == 1
    chosen = config.ConvConfig(4, 16, 16, 16, 4, 1, config.POINTER)
    with tuning.pinned(config.CONV3X3, chosen):
        torch.testing.assert_close(convolved(x, weight), expected, rtol=1e-5, atol=1e-5)
        assert len(replays) == 1
        with gpu.recording() as steps:
            convolved(x, weight)
    assert [step.arguments["TILE_H"] for step in steps] == [4]


def test_a_list_holds_no_tensor(convolved: Callable[..., Tensor]) -> None:
    x, weight = image(shape=(1, 4, 7, 4)), image(shape=WEIGHT)
    kept = [weakref.ref(convolved(x, weight)) for _ in range(3)]
    kept += [weakref.ref(x), weakref.ref(weight)]
    del x, weight
    gc.collect()
    assert [ref() for ref in kept] == [None] * 5


def test_tensors_between_steps_are_let_go_of_as_soon_as_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    @replayed
    def chain(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(5):
            x, _ = conv3x3(x, weight)
        return x

    let_go = replay._let_go

    def counted(indices: Sequence[int], table: list[Any]) -> None:
        counts.append(sum(t is not None for t in table[2:]))
        let_go(indices, table)

    monkeypatch.setattr(replay, "_let_go", counted)
    x, weight = image(), image(shape=(4, 4, 3, 3))
    for _ in range(3):
        chain(x, weight)
    assert counts == [1, 2, 2, 2, 2]  # After the first launch x, after the second the first one's result, and so on.


def test_kinds_are_forgotten_before_they_fill_the_memory(monkeypatch: pytest.MonkeyPatch, replays: list[int]) -> None:
    monkeypatch.setattr(replay, "_MOST", 3)

    @replayed
    def scaled(x: Tensor, weight: Tensor, slope: float) -> Tensor:
        return conv3x3(x, weight, negative_slope=slope)[0]

    weight = image(shape=WEIGHT)
    for i, _ in itertools.product(range(5), range(3)):
        scaled(image(), weight, 0.25 + i)
    assert len(replays) == 5
    scaled(image(), weight, 4.25)
    assert len(replays) == 6
    scaled(image(), weight, 0.25)
    assert len(replays) == 6


def test_what_torch_is_set_to_belongs_to_the_kind(convolved: Callable[..., Tensor], replays: list[int]) -> None:
    for precision, _ in itertools.product(("ieee", "tf32"), range(3)):
        with fastunet.testing.float32_precision(precision):
            convolved(image(), image(shape=WEIGHT))
    assert len(replays) == 2
