"""What is made of weights is recomputed exactly when they change, however that happens."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastunet import ops
from fastunet.cpu import weight_cache
from fastunet.cpu.weight_cache import prepared

LARGE, SMALL = (64, 64, 3, 3), (4, 2, 3, 3)


class Maker:
    """Uses a weight as an op does, and counts how often something is made of it."""

    def __init__(self, kind: str = "sum") -> None:
        self.kind, self.made = kind, 0

    def __call__(self, *sources: Tensor | None) -> float:
        def make() -> float:
            self.made += 1
            return sum(float(t.detach().double().sum()) for t in sources if t is not None)

        with torch.no_grad():
            return prepared(self.kind, sources, make)


def conv(shape: tuple[int, ...] = LARGE) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(shape[1], shape[0], shape[2], bias=False).to(memory_format=torch.channels_last)


def step(optimizer: type, **options: bool) -> Callable[[nn.Conv2d], None]:
    def change(module: nn.Conv2d) -> None:
        module.weight.grad = torch.ones_like(module.weight)
        optimizer(module.parameters(), lr=0.1, **options).step()

    return change


def exchange_values(module: nn.Conv2d) -> None:
    module.weight.data.copy_(module.weight.data.flip(0))


def write_in_inference_mode(module: nn.Conv2d) -> None:
    with torch.inference_mode():
        module.weight.data.mul_(2)


CHANGES: dict[str, Callable[[nn.Conv2d], object]] = {
    "in place": lambda m: m.weight.detach().mul_(2),
    "one value": lambda m: (
        m.weight.data.view(-1)[:1].add_(1) if m.weight.is_contiguous() else m.weight.data[0, 0, 0, 0].add_(1)
    ),
    "sign": lambda m: m.weight.data.neg_(),
    "part of it": lambda m: m.weight.data[-1:].zero_(),
    "other data": lambda m: setattr(m.weight, "data", m.weight.data * 2),
    "other strides": lambda m: setattr(m.weight, "data", m.weight.data.transpose(2, 3)),
    "other parameter": lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach() * 2)),
    "load_state_dict": lambda m: m.load_state_dict({"weight": torch.ones(m.weight.shape)}),
    "sgd": step(torch.optim.SGD, foreach=True),
    "adamw": step(torch.optim.AdamW, fused=True),
    "inference mode": write_in_inference_mode,
    "order": exchange_values,
    "numpy": lambda m: np.multiply(m.weight.detach().numpy(), 2, out=m.weight.detach().numpy()),
}


@pytest.mark.parametrize("shape", [LARGE, SMALL])
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str, shape: tuple[int, ...]) -> None:
    module, use, fresh = conv(shape), Maker(), Maker("fresh")
    use(module.weight)
    for again in (False, True):  # A second change is seen like the first; but the first strides come back.
        made = use.made
        before = module.weight.detach().clone()
        CHANGES[change](module)
        is_changed = not torch.equal(before, module.weight) and not (again and change == "other strides")
        assert use(module.weight) == fresh(module.weight.detach().clone())
        assert use.made == made + is_changed
        assert use(module.weight) == use(module.weight)
        assert use.made == made + is_changed


def test_another_weight_in_the_same_place_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it has the mark, which another use of it has set."""
    monkeypatch.setattr(weight_cache, "places", lambda tensors: [])
    weight, bias, use = torch.randn(LARGE), torch.zeros(16), Maker()
    use(weight, bias)
    del bias
    gc.collect()
    bias = torch.ones(16)
    Maker("other")(bias)
    assert use(weight, bias) == Maker("fresh")(weight, bias)


def test_an_inference_tensor() -> None:
    with torch.inference_mode():
        weight, use = torch.randn(LARGE), Maker()
        first = use(weight)
        assert (use(weight), use.made) == (first, 1)
        weight.mul_(2)
        assert use(weight) == pytest.approx(2 * first)


READS: dict[str, Callable[[nn.Conv2d], object]] = {
    "nothing": lambda m: None,
    "forward": lambda m: m(torch.randn(1, LARGE[1], 8, 8)),
    "backward": lambda m: m(torch.randn(1, LARGE[1], 8, 8)).square().sum().backward(),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "save": lambda m: torch.save(m.state_dict(), io.BytesIO()),
    "address": lambda m: m.weight.data_ptr(),
    "counted without a change": lambda m: m.weight.data.mul_(1),
}


@pytest.mark.parametrize("read", READS)
def test_reading_changes_nothing(read: str) -> None:
    module, use = conv(), Maker()
    value, address = use(module.weight), module.weight.data_ptr()
    for _ in range(2):
        READS[read](module)
        assert use(module.weight) == value
    assert use.made == 1
    assert module.weight.data_ptr() == address


def test_two_kinds_see_one_change() -> None:
    weight, first, second = torch.randn(LARGE), Maker("first"), Maker("second")
    first(weight), second(weight)
    weight.data.mul_(2)
    assert second(weight) == first(weight)
    assert (first.made, second.made) == (2, 2)


def test_two_parts_of_one_storage() -> None:
    whole = torch.randn(2, *LARGE)
    parts, use = (whole[0], whole[1]), Maker()
    before = [use(part) for part in parts]
    whole.data.mul_(2)
    assert [use(part) for part in parts] == pytest.approx([2 * value for value in before])
    parts[1].zero_()
    assert use(parts[0]) == pytest.approx(2 * before[0])
    assert use(parts[1]) == 0
    assert use.made == 5


@pytest.mark.parametrize("foreign", ["numpy", "shared"])
def test_memory_that_is_not_torchs_own(foreign: str) -> None:
    array = np.ones(LARGE, np.float32)
    weight = torch.from_numpy(array) if foreign == "numpy" else torch.ones(LARGE).share_memory_()
    use = Maker()
    total = use(weight)
    assert (use(weight), use.made) == (total, 1)
    if foreign == "numpy":
        array[:1] = 3
    else:
        weight.data[:1] = 3
    assert use(weight) == total + 2 * weight[0].numel()


def test_every_source_counts_at_its_place() -> None:
    """A vector that was the beta, and is the gamma now, is the same vector at the same address."""
    weight, gamma, use = torch.ones(LARGE), torch.ones(4), Maker()
    use(weight, gamma, None)
    gamma.data.mul_(3)
    assert use(weight, gamma, None) == weight.numel() + 12
    assert use(weight, None, None) == weight.numel()
    for sources in ((None, gamma), (gamma, None), (gamma, None)):
        assert use(weight, *sources) == weight.numel() + 12
    assert use.made == 5


def test_a_vector_that_is_made_anew_is_known_by_its_values() -> None:
    """As a compiled graph makes gamma and beta where a bias moves between them."""
    weight, vector, use = torch.ones(LARGE), torch.arange(4.0), Maker()
    kept = [vector.clone() for _ in range(3)]
    assert {use(weight, each) for each in kept} == {weight.numel() + 6}
    assert use.made == 1
    kept[0].data.mul_(2)
    assert use(weight, kept[0]) == weight.numel() + 12
    assert use(weight, vector.to(torch.bfloat16)) == weight.numel() + 6
    assert use(weight, torch.arange(3.0)) == weight.numel() + 3
    assert use.made == 4
    use(weight, torch.ones(SMALL))
    use(weight, torch.ones(SMALL))
    assert use.made == 6, "a matrix would have to be read again at each call"


def test_it_goes_with_the_weight() -> None:
    class Made:
        pass

    weight = torch.randn(LARGE)
    made = weakref.ref(prepared("made", [weight], Made))
    assert not weakref.getweakrefs(weight)  # torch.utils.swap_tensors refuses tensors that have one.
    gc.collect()
    assert made() is not None
    del weight
    gc.collect()
    assert made() is None


def test_what_an_op_keeps_of_a_weight_does_not_keep_the_weight() -> None:
    flat = torch.randn(64 * 577)  # A bias in the weight's own storage, as vector_to_parameters leaves it.
    alive = weakref.ref(flat.untyped_storage())
    with torch.no_grad():
        ops.conv3x3_bias_relu(torch.randn(1, 64, 8, 8), flat[64:].view(LARGE), flat[:64])
    del flat
    gc.collect()
    assert alive() is None


def test_a_write_copies_nothing() -> None:
    weight = torch.randn(LARGE)
    Maker()(weight)
    address = torch._C._data_address(weight)
    weight.mul_(2)
    assert torch._C._data_address(weight) == address
