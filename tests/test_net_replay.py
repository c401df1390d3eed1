"""A UNet's inference repeated from a list: the bits of its layers one by one, and every change of the net is seen."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_device import DEVICE, MARK, ieee, poison  # noqa: F401
from small_net import net
from torch import Tensor, nn

import fastunet
from fastunet import net_replay
from fastunet.ops import replay
from fastunet.ops.replay import replaying
from fastunet.testing import random_input

pytestmark = MARK


@pytest.fixture(autouse=True)
def forced() -> Iterator[None]:
    with fastunet.backend("triton"), torch.no_grad():
        yield


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of launches of the whole nets that are repeated, into memory full of NaN."""
    found: list[int] = []
    run = replay._Program.__call__

    def counted(program: replay._Program, tensors: list[Tensor]) -> Any:
        launches = sum("_Started" in getattr(step, "__qualname__", "") for step in program._steps)
        if launches >= 6:  # Three blocks of two convolutions; with batch norm or none an op has one launch.
            found.append(launches)
        return run(program, tensors)

    monkeypatch.setattr(replay._Program, "__call__", counted)
    poison(monkeypatch, "empty_strided")
    return found


def image(seed: int = 0, shape: tuple[int, ...] = (1, 2, 5, 6)) -> Tensor:
    return random_input(shape, device=DEVICE, seed=seed)


def check(model: nn.Module, x: Tensor) -> Tensor:
    with replaying(False):
        expected = model(x)
    actual = model(x)
    assert torch.equal(actual, expected)
    assert actual.stride() == expected.stride()
    return actual


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"head": "sigmoid"}, {"norm": None, "activation": "leaky_relu"}),
        *({"norm": "instance", "head": "softmax"}, {"upsample": "bilinear"}),
    ],
    ids=str,
)
def test_results_are_those_of_the_layers_to_the_bit(options: dict, whole: list[int]) -> None:
    """Images of odd sizes too, and other images of the same kind."""
    model = net(**options)
    results = [check(model, image(seed)) for seed in range(4)]
    assert len(whole) == 2, "one call runs layer by layer, one is noted down"
    assert len({float(y.square().sum()) for y in results}) == 4


def test_each_kind_of_image_has_its_list(whole: list[int]) -> None:
    model = net()
    for x in (image(), image(shape=(2, 2, 5, 6)), image(shape=(1, 2, 4, 6)), image()[..., :5], image().contiguous()):
        for _ in range(3):
            check(model, x)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        results = [check(model, image()) for _ in range(3)]
    assert results[0].dtype == torch.bfloat16
    assert len(whole) == 6


def test_modes_and_threads_share_a_list(whole: list[int]) -> None:
    model = net()
    check(model, image())
    with torch.inference_mode():
        check(model, image())
        assert check(model, image()).is_inference()
    assert not check(model, image(1)).is_inference()
    done: list[tuple[int, Tensor]] = []
    with replaying(False):
        expected = [model(image(seed)) for seed in range(4)]

    def work(seed: int) -> None:
        with torch.no_grad():
            done.append((seed, model(image(seed))))

    for seed in range(4):  # One after the other: the interpreter is not made for more.
        thread = threading.Thread(target=work, args=(seed,))
        thread.start()
        thread.join()
    assert all(torch.equal(y, expected[seed]) for seed, y in done)
    assert len(whole) == 6


def in_place(model: fastunet.UNet) -> None:
    model.outc.conv.bias.add_(1)
    model.inc.double_conv[1].running_mean.add_(1)


def through_data(model: fastunet.UNet) -> None:
    model.downs[0].maxpool_conv[1].double_conv[0].weight.data.mul_(2)


def loaded(model: fastunet.UNet) -> None:
    model.load_state_dict({name: t + 1 if t.is_floating_point() else t for name, t in model.state_dict().items()})


def another_parameter(model: fastunet.UNet) -> None:
    model.outc.conv.weight = nn.Parameter(model.outc.conv.weight * 2)


def another_place(model: fastunet.UNet) -> None:
    model.outc.conv.weight.data = model.outc.conv.weight.data * 2


def other_strides(model: fastunet.UNet) -> None:
    weight = model.inc.double_conv[0].weight
    weight.data = weight.data.transpose(2, 3)


def another_setting(model: fastunet.UNet) -> None:
    model.inc.double_conv[1].eps = 0.5


def another_activation(model: fastunet.UNet) -> None:
    model.inc.double_conv[2] = nn.LeakyReLU(0.3)


def no_norm(model: fastunet.UNet) -> None:
    model.inc.double_conv[4] = nn.Identity()


def batch_statistics(model: fastunet.UNet) -> None:
    model.inc.double_conv[1].train()


CHANGES = (
    *(in_place, through_data, loaded, another_parameter, another_place, other_strides),
    *(another_setting, another_activation, no_norm, batch_statistics),
)


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_seen(change: Callable[[fastunet.UNet], None], whole: list[int]) -> None:
    model, x = net(), image()
    before = [check(model, x) for _ in range(3)][-1]
    change(model)
    for _ in range(3):
        after = check(model, x)
    assert not torch.equal(after, before)
    assert len(whole) >= 2


def hooked(model: fastunet.UNet, seen: list[Any]) -> None:
    model.inc.register_forward_hook(lambda module, inputs, y: seen.append(y))


def hooked_before(model: fastunet.UNet, seen: list[Any]) -> None:
    model.outc.conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))


def wrapped(model: fastunet.UNet, seen: list[Any]) -> None:
    class Watching(type(model.inc)):  # type: ignore[misc]
        def forward(self, *args: Any, **options: Any) -> Any:
            seen.append(args)
            return super().forward(*args, **options)

    model.inc.__class__ = Watching


def patched(model: fastunet.UNet, seen: list[Any]) -> None:
    forward = model.inc.forward

    def watching(*args: Any, **options: Any) -> Any:
        seen.append(args)
        return forward(*args, **options)

    model.inc.forward = watching


def replaced(model: fastunet.UNet, seen: list[Any]) -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.clamp(max=0.1)

    model.downs[0].maxpool_conv[1].double_conv[2] = Counting()


@pytest.mark.parametrize("watch", [hooked, hooked_before, wrapped, patched, replaced])
@pytest.mark.parametrize("calls", [0, 3])
def test_what_watches_a_layer_sees_every_call(watch: Callable, calls: int) -> None:
    """Before the first call, and when the net is already repeated."""
    model, x, seen = net(), image(), []
    for _ in range(calls):
        model(x)
    watch(model, seen)
    for n in range(1, 5):
        model(x)
        assert len(seen) == n
    with replaying(False):
        expected = model(x)
    assert torch.equal(model(x), expected)


def test_hooks_of_all_modules_see_every_call() -> None:
    model, x, seen = net(), image(), []
    for _ in range(3):
        model(x)
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, y: seen.append(type(module)))
    try:
        counts = [len(seen) for _ in range(3) if model(x) is not None]
    finally:
        handle.remove()
    assert counts[0] > 1
    assert counts == [counts[0] * n for n in (1, 2, 3)]


def test_training_and_gradients_run_layer_by_layer(whole: list[int]) -> None:
    model, x = net(), image()
    for _ in range(3):
        check(model, x)
    with torch.enable_grad():
        y = model(x)
        y.square().sum().backward()
    assert model.inc.double_conv[0].weight.grad is not None
    model.train()
    assert model in net_replay._nets
    before = model.inc.double_conv[1].running_mean.clone()
    model(x)
    assert not torch.equal(before, model.inc.double_conv[1].running_mean)
    assert model not in net_replay._nets, "it would hold on to weights that others may take the place of"
    model.eval()
    assert len(whole) == 1
    for _ in range(3):
        check(model, x)
    assert len(whole) == 2


def test_dispatch_modes_and_explain_see_the_ops(whole: list[int]) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(op.name())
            return op(*args, **(kwargs or {}))

    model, x, names = net(), image(), []
    for _ in range(3):
        model(x)
    with Names():
        model(x)
    assert "fastunet::conv3x3_batch_norm_relu" in names
    assert len(whole) == 1
    assert len(fastunet.explain(model, x).rows) > 5


def test_other_backends_have_lists_of_their_own(whole: list[int]) -> None:
    model, x = net(), image()
    for _ in range(3):
        check(model, x)
    for name in ("aten", "auto"):  # Which takes torch's ops where nothing was measured.
        with fastunet.backend(name):
            for _ in range(3):
                check(model, x)
    assert len(whole) == 1


def test_copies_and_pickles_are_nets_of_their_own(whole: list[int]) -> None:
    model, x = net(), image()
    for _ in range(3):
        check(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.outc.conv.bias.add_(1)
        for _ in range(3):
            assert not torch.equal(check(other, x), model(x))
    assert len(whole) > 4


def test_a_net_that_is_gone_leaves_nothing() -> None:
    gc.collect()
    model, before = net(), len(net_replay._nets)
    for _ in range(3):
        model(image())
    assert len(net_replay._nets) == before + 1
    del model
    gc.collect()
    assert len(net_replay._nets) == before


def test_bad_images_are_refused_as_ever() -> None:
    model = net()
    for _ in range(3):
        model(image())
    with pytest.raises(fastunet.checks.ShapeError, match="expected 2 input channels, got 3"):
        model(image(shape=(1, 3, 5, 6)))
