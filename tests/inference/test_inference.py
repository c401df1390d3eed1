"""fastunet.predict: activations, tiles, views, and leaving the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import fastunet
from fastunet.checks import ConfigError, ShapeError
from fastunet.inference.cuda_graphs import GraphedModel
from fastunet.inference.predict import labels_of


class Local(nn.Module):
    """A 'model' that sees a 3x3 neighbourhood only, so that tiles can be exact inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return self.conv(x)


@pytest.mark.parametrize(("channels", "activation"), [(1, lambda z: z.sigmoid()), (3, lambda z: z.softmax(1))])
def test_probabilities_of_batch_and_single_image(channels: int, activation) -> None:
    model = Local(channels).train()
    image = torch.randn(2, 1, 9, 7)
    expected = activation(model.conv(image))
    torch.testing.assert_close(fastunet.predict(model, image), expected)
    torch.testing.assert_close(fastunet.predict(model, image[1]), expected[1])
    assert model.training
    assert not fastunet.predict(model, image).requires_grad


class Own(nn.Module):
    """A user's code around one U-Net or several; `use` is what it does with them."""

    def __init__(self, use: Callable[..., Tensor], *nets: nn.Module) -> None:
        super().__init__()
        self.use, self.nets = use, nn.ModuleList(nets)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, *self.nets)


class Halved(fastunet.UNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / 2)


def unet(head: str | None = None, kind: type[fastunet.UNet] = fastunet.UNet) -> fastunet.UNet:
    torch.manual_seed(0)
    return kind(1, 3 if head == "softmax" else 1, features=(2, 4), head=head)


def with_outer_sigmoid(model: fastunet.UNet) -> nn.Module:
    reference = model.to_reference()
    reference.outc = nn.Sequential(reference.outc, nn.Sigmoid())
    return reference


WRAPPINGS: dict[str, Callable[[fastunet.UNet], nn.Module]] = {
    "none": lambda m: m,
    "quantised": lambda m: fastunet.quantize(m, torch.randn(1, 1, 8, 8)),
    "reference": lambda m: m.to_reference(),
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "AveragedModel": AveragedModel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    # A replay calls no module.
    "graphed": lambda m: GraphedModel(m, record=lambda run: (lambda: None, run())),
    "Sequential": lambda m: nn.Sequential(nn.Identity(), m, nn.Dropout()),
    "code": lambda m: Own(lambda x, net: net(x / 2).float(), m),
    "code, compiled": lambda m: Own(lambda x, net: net(x), torch.compile(m, backend="eager")),
    "subclass": lambda m: unet(m.config["head"], Halved),
}
ACTIVATING: dict[str, Callable[[fastunet.UNet], nn.Module]] = {
    "Sequential in DataParallel": lambda m: nn.DataParallel(
        nn.Sequential(nn.Sequential(m, nn.Sigmoid()), nn.Identity())
    ),
    "exchanged head": with_outer_sigmoid,
}
UNKNOWN: dict[str, Callable[[fastunet.UNet], nn.Module]] = {
    "activating code": lambda m: Own(lambda x, net: net(x).sigmoid(), m),
    "mean of two": lambda m: Own(lambda x, a, b: (a(x) + b(x)) / 2, m, unet()),
    "traced": lambda m: torch.jit.trace(m.eval(), torch.zeros(1, 1, 8, 8)),
    "exported": lambda m: torch.export.export(m.eval(), (torch.zeros(1, 1, 8, 8),)).module(),
}


@pytest.fixture(scope="module")
def _process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("head", [None, "softmax"])
@pytest.mark.parametrize("wrapping", [*WRAPPINGS, *(f"activating: {name}" for name in ACTIVATING)])
def test_an_activation_is_applied_once(wrapping: str, head: str | None) -> None:
    is_activating, image = wrapping.startswith("activating: "), torch.randn(2, 1, 9, 8)
    wrapped = (ACTIVATING if is_activating else WRAPPINGS)[wrapping.removeprefix("activating: ")](unet(head)).eval()
    with torch.no_grad():
        expected = wrapped(image)
    if head is None and not is_activating:
        expected = expected.sigmoid()
    assert torch.equal(fastunet.predict(wrapped, image), expected)


@pytest.mark.parametrize("wrapping", UNKNOWN)
def test_what_cannot_be_known_is_asked_for(wrapping: str) -> None:
    wrapped, image = UNKNOWN[wrapping](unet()), torch.randn(1, 1, 8, 8)
    hooks = [len(module._forward_hooks) for module in wrapped.modules()]
    with pytest.raises(ConfigError, match=r"cannot tell .* gives logits or probabilities: .* pass from_logits=True"):
        fastunet.predict(wrapped, image)
    result = fastunet.predict(wrapped, image, from_logits=False)
    assert torch.equal(fastunet.predict(wrapped, image, from_logits=True), result.sigmoid())
    assert [len(module._forward_hooks) for module in wrapped.modules()] == hooks


def test_tiles_agree_with_the_whole_but_at_their_edges() -> None:
    torch.manual_seed(0)
    model = Local(1)
    image = torch.randn(1, 1, 70, 50)
    whole = fastunet.predict(model, image)
    tiled = fastunet.predict(model, image, tile=32, overlap=0.5)
    difference = (tiled - whole).abs()
    # A tile is wrong in its outermost pixels only, and weighs little there.
    assert 0 < (difference > 1e-5).float().mean() < 0.25
    assert difference.mean() < 0.002, "of equal weights it would be 0.004"
    torch.testing.assert_close(fastunet.predict(model, image, tile=70), whole, rtol=0, atol=0)


def test_views_make_the_prediction_turn_with_the_image() -> None:
    model = Local(1)
    image = torch.randn(1, 1, 8, 6)
    result = fastunet.predict(model, image, tta=True)
    assert (fastunet.predict(model, image) - result).abs().max() > 1e-3
    for turns in range(4):
        turned = image.rot90(turns, (-2, -1)).flip(-1)
        back = fastunet.predict(model, turned, tta=True).flip(-1).rot90(-turns, (-2, -1))
        torch.testing.assert_close(back, result)


def test_bad_arguments() -> None:
    model = Local(1)
    with pytest.raises(ShapeError, match=r"expected \[C, H, W\] or \[N, C, H, W\], got \[4, 4\]"):
        fastunet.predict(model, torch.zeros(4, 4))
    with pytest.raises(ConfigError, match="overlap: expected 0 <= overlap < 1, got 1"):
        fastunet.predict(model, torch.zeros(1, 4, 4), overlap=1.0)
    with pytest.raises(ConfigError, match="tile: expected at least 1 pixel or None, got 0"):
        fastunet.predict(model, torch.zeros(1, 4, 4), tile=0)


class StaysInEval(nn.BatchNorm2d):
    """Frozen as torchvision's detectors and many scripts do it."""

    def train(self, mode: bool = True) -> StaysInEval:
        return super().train(False)


class Merging(nn.Conv2d):
    """Its eval mode is more than a flag, as where LoRA's weights are merged."""

    merged = False

    def train(self, mode: bool = True) -> Merging:
        self.merged = not mode
        return super().train(mode)


def frozen(model: fastunet.UNet) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


MODES: dict[str, Callable[[fastunet.UNet], object]] = {
    "train": lambda m: None,
    "eval": lambda m: m.eval(),
    "a frozen block": lambda m: m.inc.eval(),
    "frozen norms": frozen,
    "one part in train mode": lambda m: m.eval().up1.train(),
    "norms that stay frozen": lambda m: setattr(m.inc.double_conv, "1", StaysInEval(2)) or m.train(),
    "a train method of its own": lambda m: setattr(m.outc, "conv", Merging(2, 1, 1)),
}


def modes(model: nn.Module) -> dict[str, tuple[bool, bool]]:
    return {name: (module.training, getattr(module, "merged", False)) for name, module in model.named_modules()}


@pytest.mark.parametrize("way", ["whole", "compiled", "error", "threads"])
@pytest.mark.parametrize("mode", MODES)
def test_each_module_is_left_in_its_mode(mode: str, way: str) -> None:
    model = unet().train()
    MODES[mode](model)
    before, statistics = modes(model), copy.deepcopy(model.state_dict())
    image = torch.randn(1, 1, 8, 8)
    if way == "error":
        with pytest.raises(ShapeError):
            fastunet.predict(model, image[..., :1])
    elif way == "threads":
        seen: list[bool] = []
        model.down1.register_forward_pre_hook(lambda module, _: seen.append(any(m.training for m in model.modules())))
        wrapped = nn.DataParallel(model)
        with ThreadPoolExecutor(4) as pool:
            [*pool.map(lambda i: fastunet.predict(wrapped if i % 2 else model, image), range(40))]
        assert len(seen) == 40
        assert not any(seen)
        model.down1._forward_pre_hooks.clear()
    else:
        fastunet.predict(torch.compile(model, backend="eager") if way == "compiled" else model, image)
    assert modes(model) == before
    for name, t in model.state_dict().items():
        assert torch.equal(t, statistics[name]), name


def test_labels() -> None:
    assert labels_of(torch.tensor([0.5, 0.6]).reshape(1, 1, 2)).tolist() == [[0, 1]]
    assert labels_of(torch.tensor([0.2, 0.5, 0.3]).reshape(3, 1, 1)).item() == 1
