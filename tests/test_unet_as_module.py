"""fastunet.UNet is a module like any other: changed, hooked, wrapped or copied it does what its reference does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune
from unet_pair import (
    FEATURES,
    SHAPE,
    Doubled,
    assert_near,
    assert_trains_alike,
    call,
    called,
    pair,
    patched,
    put,
    subclassed,
    wrap,
)

import fastunet
from fastunet.checks import ShapeError
from fastunet.cpu.model_state import Memo
from fastunet.reference import ReferenceUNet
from fastunet.testing import random_cotangent, random_input

X = random_input(SHAPE, dtype=torch.float64)


def assert_alike(model: Any, reference: Any, *, channels: int = 2, trains: bool = True) -> None:
    x = random_input((2, channels, *SHAPE[2:]), dtype=torch.float64)
    for net in (model, reference):
        # As left by the change: parts of it may be frozen.
        for module in net.modules():
            module.training = module.training and trains
    if trains:
        assert_trains_alike(model, reference, x)
    for layout in (torch.contiguous_format, torch.channels_last):
        image = x.contiguous(memory_format=layout)
        assert_near(call(model.eval(), image), call(reference.eval(), image))
        with torch.no_grad():
            assert_near(call(model, image), call(reference, image))
    with torch.no_grad():
        assert_near(call(model.float(), x.float()), call(reference.float(), x.float()))


def setting(path: str, **values: Any) -> Callable[[Any], None]:
    return lambda net: [setattr(net.get_submodule(path), name, value) for name, value in values.items()] and None


def on(path: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda net: change(net.get_submodule(path)) and None


def inserted(path: str, index: int, make: Callable[[], nn.Module]) -> Callable[[Any], None]:
    return lambda net: net.get_submodule(path).insert(index, make()) and None


class Attention(nn.Module):
    """A block that asks for memory as images in torch have it: by `view`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(x.shape[0], x.shape[1], -1)
        weights = (self.query(x).view(*flat.shape) @ flat.transpose(1, 2)).softmax(-1)
        return x + (weights @ flat).view(x.shape)


class Merge(nn.Module):
    """An Up of someone else's."""

    def __init__(self, low: int, skip: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(low + skip, skip, 3, padding=1)

    def forward(self, low: Tensor, skip: Tensor) -> Tensor:
        low = F.interpolate(low, skip.shape[2:])
        return self.conv(torch.cat([low, skip], dim=1))


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True) + super().forward(x)


def unshared(net: Any) -> None:
    net.down1.maxpool_conv[1].double_conv[5] = net.inc.double_conv[5] = nn.PReLU()


def fused_by_torch(net: Any) -> Any:
    layers = net.eval().inc.double_conv
    layers[0], layers[1] = nn.utils.fusion.fuse_conv_bn_eval(layers[0], layers[1]), nn.Identity()
    return net


def with_strided_vectors(net: Any) -> None:
    """Of the model alone: torch's gradient of a batch norm of such is wrong."""
    for module in net.modules() if isinstance(net, fastunet.UNet) else ():
        for name in ("weight", "bias", "running_mean", "running_var") if isinstance(module, nn.BatchNorm2d) else ():
            t = getattr(module, name).detach()
            t = torch.stack([t, torch.full_like(t, torch.nan)], dim=1)[:, 0]
            setattr(module, name, nn.Parameter(t) if name in ("weight", "bias") else t)


def frozen_norms(net: Any) -> None:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            frozen(module)


def emptied(net: Any) -> Any:
    state = copy.deepcopy(net.state_dict())
    net.to("meta").to_empty(device="cpu").load_state_dict(state)
    return net


def stopped_tracking() -> nn.Module:
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    norm.track_running_stats = False
    return norm


def with_5x5(module: Any) -> None:
    module.weight = nn.Parameter(torch.randn(*module.weight.shape[:2], 5, 5) / 8)
    module.padding = (2, 2)


def frozen(module: nn.Module) -> None:
    module.eval().requires_grad_(False)


LAST = "up2.conv.double_conv"
CHANGES: dict[str, Any] = {
    "as built": lambda net: None,
    "average pooling": put("down1.maxpool_conv.0", lambda: nn.AvgPool2d(2)),
    "pooling of odd sizes": setting("down2.maxpool_conv.0", ceil_mode=True),
    "overlapping pooling": put("down1.maxpool_conv.0", lambda: nn.MaxPool2d(3, 2, 1)),
    "something after the pooling": inserted("down1.maxpool_conv", 1, lambda: nn.Hardtanh(-0.5, 0.5)),
    "dropout appended": inserted("inc.double_conv", 6, lambda: nn.Dropout(0.3)),
    "dropout within": inserted("up1.conv.double_conv", 3, lambda: nn.Dropout2d(0.5)),
    "dropout in the last block": inserted(LAST, 6, lambda: nn.Dropout(0.3)),
    "attention appended": inserted("down1.maxpool_conv.1.double_conv", 6, lambda: Attention(6)),
    "a layer removed": on("inc.double_conv", lambda layers: layers.pop(5)),
    "layers in another order": on(LAST, lambda layers: layers.insert(3, layers.pop(5))),
    "another inc": put("inc", lambda: nn.Sequential(nn.Conv2d(2, 4, 7, padding=3), nn.SiLU())),
    "another double_conv": put("inc.double_conv", lambda: nn.Conv2d(2, 4, 3, padding=1)),
    "a residual double_conv": wrap("down2.maxpool_conv.1.double_conv", lambda layers: Residual(*layers)),
    "another down": put("down2", lambda: nn.Conv2d(6, 8, 3, 2, 1)),
    "another up": put("up1", lambda: Merge(8, 6)),
    "another upsampling": put("up1.up", lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 6, 1))),
    "nearest upsampling": (put("up2.up", lambda: nn.Upsample(scale_factor=2)), {"upsample": "bilinear"}),
    "upsampling past the skip": put("up2.up", lambda: nn.ConvTranspose2d(6, 4, 5, stride=2)),
    "another outc": put("outc", lambda: nn.Sequential(nn.Dropout(0.2), nn.Conv2d(4, 5, 3, padding=1))),
    "another head": setting("outc", head="sigmoid"),
    "more classes": put("outc.conv", lambda: nn.Conv2d(4, 7, 1)),
    "a strided head": put("outc.conv", lambda: nn.Conv2d(4, 3, 1, stride=2)),
    "five channels": (put("inc.double_conv.0", lambda: nn.Conv2d(5, 4, 3, padding=1, bias=False)), {}, {"channels": 5}),
    "a bias before the norm": put("inc.double_conv.3", lambda: nn.Conv2d(4, 4, 3, padding=1)),
    "dilated": put("up1.conv.double_conv.0", lambda: nn.Conv2d(12, 6, 3, padding=2, dilation=2, bias=False)),
    "grouped": put(f"{LAST}.0", lambda: nn.Conv2d(8, 4, 3, padding=1, groups=2, bias=False)),
    "circular padding": setting("inc.double_conv.0", padding_mode="circular", _reversed_padding_repeated_twice=[1] * 4),
    "padding by name": put("inc.double_conv.0", lambda: nn.Conv2d(2, 4, 3, padding="same", bias=False)),
    "a lazy convolution": put("inc.double_conv.0", lambda: nn.LazyConv2d(4, 3, padding=1)),
    "a weight of another size": on("inc.double_conv.0", with_5x5),
    "another parameter": on("up1.up", lambda up: setattr(up, "weight", nn.Parameter(2 * up.weight.detach()))),
    "tied weights": lambda net: setattr(net.up2.conv.double_conv[3], "weight", net.inc.double_conv[3].weight),
    "a shared module": unshared,
    "group norm": put("up1.conv.double_conv.1", lambda: nn.GroupNorm(2, 6)),
    "synchronised batch norm": (lambda net: nn.SyncBatchNorm.convert_sync_batchnorm(net), {}, {"trains": False}),
    "batch norm without running statistics": put(
        "inc.double_conv.1", lambda: nn.BatchNorm2d(4, track_running_stats=False)
    ),
    "batch norm with a cumulative average": put(f"{LAST}.4", lambda: nn.BatchNorm2d(4, momentum=None)),
    "batch norm without weights": put("inc.double_conv.4", lambda: nn.BatchNorm2d(4, affine=False)),
    "batch norm told to stop tracking": setting(f"{LAST}.4", track_running_stats=False),
    "batch norm of other settings": setting("up1.conv.double_conv.1", eps=0.5, momentum=0.7),
    "batch norms of strided vectors": with_strided_vectors,
    "frozen batch norms of strided vectors": lambda net: with_strided_vectors(net) or frozen_norms(net),
    "instance norm with running statistics": put(
        "inc.double_conv.1", lambda: nn.InstanceNorm2d(4, track_running_stats=True)
    ),
    "instance norm told to stop tracking": put("inc.double_conv.1", stopped_tracking),
    "instance norm": put("inc.double_conv.1", lambda: nn.InstanceNorm2d(4)),
    "an activation for a norm": put("inc.double_conv.1", nn.ReLU),
    "GELU": put("inc.double_conv.2", nn.GELU),
    "no activation": put("inc.double_conv.2", nn.Identity),
    "no activation without norm": (put("inc.double_conv.2", nn.Identity), {"norm": None}),
    "another slope": put("inc.double_conv.5", lambda: nn.LeakyReLU(0.3)),
    "other slopes without norm": (put("inc.double_conv.5", lambda: nn.LeakyReLU(0.3)), {"norm": None}),
    "a negative slope": put("inc.double_conv.5", lambda: nn.LeakyReLU(-0.4)),
    "a negative slope without norm": (put(f"{LAST}.2", lambda: nn.LeakyReLU(-0.4)), {"norm": None}),
    "a slope of zero": put("up1.conv.double_conv.5", lambda: nn.LeakyReLU(0.0)),
    "in place": put("inc.double_conv.5", lambda: nn.ReLU(inplace=True)),
    "weight norm": on("inc.double_conv.3", parametrizations.weight_norm),
    "weight norm by a hook": on("inc.double_conv.3", nn.utils.weight_norm),
    "pruned": on(f"{LAST}.0", lambda conv: prune.l1_unstructured(conv, "weight", 0.5)),
    "a convolution's inner forward": patched(f"{LAST}.0", "_conv_forward"),
    "checkpointed": wrap("down2", checkpoint_wrapper),
    "compiled within": wrap("inc.double_conv.5", lambda layer: torch.compile(layer, backend="eager")),
    "compiled in its place": on("down1", lambda down: down.compile(backend="eager")),
    "a frozen encoder": on("inc", frozen),
    "frozen norms": frozen_norms,
    "a part without gradients": on("down1", lambda down: down.requires_grad_(False)),
    "fused by torch": fused_by_torch,
    "a copy": copy.deepcopy,
    "a pickled copy": lambda net: pickle.loads(pickle.dumps(net)),
    "emptied and loaded": emptied,
    "in half precision and back": lambda net: net.half().float(),
    "in channels_last": lambda net: net.to(memory_format=torch.channels_last),
    "in shared memory": lambda net: net.share_memory(),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated", "ignore:.*num_features.*", "ignore:Lazy modules")
def test_a_changed_model(name: str) -> None:
    change, options, how = (*CHANGES[name], {}, {})[:3] if isinstance(CHANGES[name], tuple) else (CHANGES[name], {}, {})
    assert_alike(*pair(change, **options), **how)


WAYS: tuple[Callable[[str], Any], ...] = (lambda path: wrap(path, Doubled), patched, subclassed)


@pytest.mark.parametrize("norm", ["batch", None])
def test_each_module_changed(norm: str | None) -> None:
    """In one of the ways each; neighbours in different ones."""
    options = {"norm": norm, "features": (4, 6)}
    for i, path in enumerate(called(**options)):
        model, reference = pair(WAYS[i % len(WAYS)](path), **options)
        if norm is not None:
            assert_trains_alike(model, reference, X)
        with torch.no_grad():
            assert_near(model.eval()(X), reference.eval()(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *((kind, "forward") for kind in (nn.ReLU, nn.Conv2d, nn.Sequential, nn.MaxPool2d)),
        *((kind, "__call__") for kind in (nn.Module, nn.Conv2d)),
        (nn.Conv2d, "_conv_forward"),
    ],
)
def test_a_patched_class(kind: Any, method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = (net.eval().to(dtype) for net in pair())
    x, original = X.to(dtype), getattr(kind, method)
    with torch.no_grad():
        before = model(x)  # And finds out how to compute itself.
        monkeypatch.setattr(kind, method, lambda self, *args: 1.1 * original(self, *args))
        assert_near(model(x), reference(x))
        assert not torch.equal(model(x), before)
        monkeypatch.undo()
        assert_near(model(x), before)


def test_a_shallow_copy_is_another_model() -> None:
    """It has the modules of its own that it is given, whatever the model before it found out of itself."""
    models = [net.eval().float() for net in pair()]
    x, results = X.float(), []
    with torch.no_grad():
        for net in models:
            before = net(x)
            other = copy.copy(net)
            other._modules = dict(net._modules)
            other.outc = nn.Sequential(copy.deepcopy(net.outc), nn.Sigmoid())
            after = other(x)
            other.outc = copy.deepcopy(net.outc)
            other.outc.conv.weight.mul_(3)
            results.append([before, after, other(x), net(x)])
    for a, b in zip(*results, strict=True):
        assert_near(a, b)


def test_what_is_found_of_copies_at_once_is_kept_apart() -> None:
    """One may ask, in another thread, while the other is finding out."""
    first, second, memo = nn.ReLU(), nn.ReLU(), Memo()

    def find() -> str:
        assert memo.answer(second, "way", lambda: "second's") == "second's"
        return "first's"

    assert memo.answer(first, "way", find) == "first's"
    assert memo.answer(second, "way", lambda: "found again") in ("second's", "found again")
    assert memo.answer(first, "way", lambda: "found again") in ("first's", "found again")


def test_the_parts_called_by_hand() -> None:
    model, reference = (net.eval() for net in pair())
    outputs = []
    for net in (model, reference):
        skip = net.inc(X)
        low = net.down2(net.down1(skip))
        outputs.append([skip, low, net.down1.maxpool_conv(skip), net.up2(net.up1(low, net.down1(skip)), skip)])
        outputs[-1].append(net.outc(outputs[-1][-1]))
    for a, b in zip(*outputs, strict=True):
        assert_near(a, b)


def test_blocks_of_a_subclass() -> None:
    """A subclass names its own blocks, and they are what runs."""

    def doubled(base: Any) -> Any:
        return type("Doubled", (base,), {"forward": lambda self, *args: 2 * base.forward(self, *args)})

    nets = []
    for base in (fastunet.UNet, ReferenceUNet):
        names = ("double_conv_type", "down_type", "up_type", "out_type")
        kind = type("Custom", (base,), {name: doubled(getattr(base, name)) for name in names})
        torch.manual_seed(0)
        nets.append(kind(2, 3, features=FEATURES).double())
    assert_alike(*nets)


def test_functional_call_has_the_parameters_it_is_given() -> None:
    model, reference = pair()
    results = []
    for net in (model, reference):
        parameters = {name: (1.5 * p).detach().requires_grad_() for name, p in net.named_parameters()}
        y = torch.func.functional_call(net, parameters, (X,))
        results.append((y, *torch.autograd.grad(y, [*parameters.values()], random_cotangent(y))))
    largest = max(float(t.abs().max()) for t in results[1])
    for a, b in zip(*results, strict=True):
        assert_near(a, b, largest)


@pytest.mark.parametrize("trace", ["fx", "jit"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_traced(trace: str) -> None:
    model, reference = (net.eval() for net in pair())
    traced = torch.fx.symbolic_trace(model) if trace == "fx" else torch.jit.trace(model, X)
    assert_near(traced(X), reference(X))


@pytest.mark.parametrize("path", ["inc.double_conv.2", "up2.up", "down1.maxpool_conv.0", "outc"])
def test_the_reference_is_of_the_model_as_it_is(path: str) -> None:
    model, _ = pair(wrap(path, Doubled))
    model.inc.eval().requires_grad_(False)
    assert_trains_alike(model, model.to_reference(), X)
    reference = model.to_reference()
    assert type(reference) is ReferenceUNet
    assert not any(type(module).__module__ == "fastunet.modules" for module in reference.modules())
    assert all(p.grad is None for p in reference.parameters())
    assert not reference.inc.training


def test_the_reference_of_another_forward_is_refused() -> None:
    class Scaled(fastunet.UNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x / 255)

    with pytest.raises(fastunet.FastUNetError, match="expected UNet's forward, got Scaled's own"):
        Scaled(1, 1, features=FEATURES).to_reference()


def test_the_input_is_checked_against_the_layers_that_are_there() -> None:
    model, _ = pair(put("inc.double_conv.0", lambda: nn.Conv2d(5, 4, 3, padding=1, bias=False)))
    with pytest.raises(ShapeError, match="expected 5 input channels, got 2"):
        model(X)
    model, reference = pair(on("down2.maxpool_conv", lambda layers: layers.pop(0)))
    x = random_input((1, 2, 3, 3), dtype=torch.float64)
    assert_near(model.eval()(x), reference.eval()(x))
    model, _ = pair(put("down2.maxpool_conv.1.double_conv.1", lambda: nn.InstanceNorm2d(8)))
    with pytest.raises(ShapeError, match=r"height or width >= 8 .*got 4x7"):
        model(x.new_zeros(1, 2, 4, 7))


def test_explain_tells_which_layers_run_one_by_one() -> None:
    model, _ = pair()
    model.eval().down1.maxpool_conv[1].double_conv[4].register_forward_hook(lambda *_: None)
    rows = {(row.layer, row.op) for row in fastunet.explain(model, X).rows}
    assert ("down1.maxpool_conv.1.double_conv.3", "convolution") in rows
    assert ("inc.double_conv.3", "conv3x3_batch_norm_relu") in rows
