"""A net by prepared weights: where oneDNN's ReLU is used, that no NaN is lost by it, and `fastunet.freeze`."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from onednn_here import MARKS, needs_bfloat16
from test_onednn import distance
from torch import Tensor, nn
from unet_pair import moved

import fastunet
from fastunet.cpu import net_graph, onednn

pytestmark = MARKS
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]


def unet(**options: object) -> fastunet.UNet:
    torch.manual_seed(0)
    return fastunet.UNet(1, 2, **{"features": (4, 8, 16, 8), **options}).eval()


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each convolution, whether its activation was left to oneDNN."""
    found: list[bool] = []
    for kind in (onednn.Convolution, onednn.Composed):

        def run(
            self: object, inputs: object, slope: object, *, is_finite: bool = False, of: Callable = kind.__call__
        ) -> Tensor:
            found.append(is_finite)
            return of(self, inputs, slope, is_finite=is_finite)

        monkeypatch.setattr(kind, "__call__", run)
    return found


def scaled(model: fastunet.UNet, factor: float) -> fastunet.UNet:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(factor)
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("value", "factor", "of_descent", "of_ascent"),
    [
        (1.0, 1.0, True, True),
        (2.0**19, 1.0, True, True),
        (2.0**21, 1.0, False, False),  # Its image is not moderate,
        (math.nan, 1.0, False, False),
        (math.inf, 1.0, False, False),
        (-math.inf, 1.0, False, False),
        (1.0, 2.0**25, False, False),  # nor are its weights,
        (1.0, math.nan, False, False),
        (2.0**19, 2.0**6, True, False),  # nor what the lower levels hold.
    ],
)
def test_nothing_that_is_not_finite_is_lost(
    value: float, factor: float, of_descent: bool, of_ascent: bool, dtype: torch.dtype, fused: list[bool]
) -> None:
    """Neither from the image on nor made on the way: where it could be, the ReLU that drops NaN is not used."""
    model = scaled(unet(norm=None), factor)
    x = torch.rand(1, 1, 32, 40) + 0.5
    x[0, 0, 9, 11] = value
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        y = model(x)
        with fastunet.backend("aten"):
            expected = model(x)
    assert fused == [of_descent] * 6 + [of_descent and of_ascent] * 8
    fused.clear()
    frozen = fastunet.freeze(model, dtype=dtype)(x)
    assert fused == ([] if of_ascent else [of_descent] * 6 + [False] * 8)  # The graph, or after it the layers.
    for found in (y, frozen):
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())
    assert expected.isfinite().all() == (factor < 2**25 and math.isfinite(value))


@pytest.mark.parametrize("options", [{}, {"norm": None}, {"upsample": "bilinear"}], ids=str)
def test_a_nan_in_any_parameter_is_seen(options: dict) -> None:
    model, x = unet(**options), torch.rand(1, 1, 32, 40)
    for name, t in model.state_dict().items():
        if not t.is_floating_point():
            continue
        before = t.clone()
        t[0] = math.nan
        with torch.no_grad():
            y = model(x)
            with fastunet.backend("aten"):
                expected = model(x)
        assert torch.equal(y.isnan(), expected.isnan()), name
        assert expected.isnan().any(), name
        t.copy_(before)


@pytest.mark.parametrize("options", [{"activation": "leaky_relu"}, {"norm": "instance"}], ids=str)
def test_only_a_relu_is_left_to_onednn(options: dict, fused: list[bool]) -> None:
    with torch.no_grad():
        unet(**options)(torch.rand(1, 1, 32, 32))
    assert fused
    assert not any(fused)


@pytest.mark.parametrize("norm", ["batch", None])
def test_no_value_exceeds_its_bound(norm: str | None) -> None:
    """A window of the signs of a channel's weights gives the largest value that there is."""
    for layer in unet(norm=norm).prepared_net(torch.rand(1, 1, 32, 32), torch.float32).descent[1]:
        weight, bias = layer.folded()
        bound = 3.0
        largest = 0.0
        for channel, of in enumerate(weight):
            window = bound * of.sign()[None]
            y = nn.functional.conv2d(
                window.double(), weight.double(), None if bias is None else bias.double(), padding=1
            )
            largest = max(largest, float(y[0, channel, 1, 1].detach().abs()))
        assert largest == pytest.approx(layer.grown(bound), rel=0.2)
        assert largest <= layer.grown(bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("options", "by_layers"),
    [
        ({}, ()),
        ({"features": (32, 64)}, ()),  # Its upsampling is oneDNN's.
        ({"features": (4, 8), "upsample": "bilinear", "head": "softmax", "norm": None}, ()),
        # Of another activation there are no bounds.
        ({"norm": None, "activation": "leaky_relu"}, (torch.float32, torch.bfloat16)),
        ({"features": (176, 176)}, (torch.float32,)),  # Winograd's algorithm takes less time.
    ],
    ids=str,
)
def test_a_frozen_net_is_as_near_to_float64_as_torchs_layers(
    options: dict, by_layers: tuple[torch.dtype, ...], dtype: torch.dtype, fused: list[bool]
) -> None:
    model = moved(unet(**options))
    plain, frozen = model.to_reference(), fastunet.freeze(model, dtype=dtype)
    for x in (torch.rand(2, 1, 32, 40), torch.rand(1, 1, 33, 31), torch.rand(2, 3, 40, 32)[:, 1:2].transpose(2, 3)):
        with torch.no_grad():
            exact = plain.double()(x.double())
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
                y, expected = frozen(x), plain.float()(x)
        assert y.dtype == dtype
        assert not y.requires_grad
        assert distance(y, exact) <= 2 * distance(expected, exact)
    assert bool(fused) == (dtype in by_layers)


def test_all_convolutions_of_a_frozen_net_are_compiled() -> None:
    x = torch.rand(1, 1, 32, 40)
    frozen = fastunet.freeze(unet(features=(32, 64)))
    frozen(x)
    (graph,) = frozen._nets.values()
    compiled = str(graph._graph.graph_for(x)).split("with prim::")[0]
    assert "oneDNNFusionGroup" in compiled
    assert "aten::conv" not in compiled
    assert "aten::_convolution" not in compiled
    assert not torch.jit.onednn_fusion_enabled()  # Other people's graphs are left as they were.


@pytest.mark.parametrize("has_torchscript", [False, True])
def test_a_frozen_net_without_the_graph_compiler(
    has_torchscript: bool, monkeypatch: pytest.MonkeyPatch, fused: list[bool]
) -> None:
    """As in builds of torch that have only the name of the setting, and where TorchScript is gone."""
    monkeypatch.setattr(net_graph, "_HAS_TORCHSCRIPT", has_torchscript)
    monkeypatch.setattr(torch.jit, "enable_onednn_fusion", lambda enabled: None)
    if not has_torchscript:
        monkeypatch.delattr(torch.jit, "trace")
    model, x = unet(), torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(fastunet.freeze(model)(x), model(x))
    assert fused


def test_a_frozen_net_in_several_threads() -> None:
    frozen, images = fastunet.freeze(unet()), torch.rand(40, 1, 1, 32, 32)
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(frozen, images)]
    for y, x in zip(found, images, strict=True):
        assert torch.equal(y, frozen(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{"upsample": "bilinear"}, {"features": (8, 16, 32)}], ids=str)
def test_a_frozen_net_computes_in_its_dtype_under_autocast(
    options: dict, autocast: torch.dtype, dtype: torch.dtype
) -> None:
    frozen, x = fastunet.freeze(unet(**options), dtype=dtype), torch.rand(2, 1, 32, 40)
    with torch.autocast("cpu", autocast):
        y = frozen(x)
    assert y.dtype == dtype
    assert torch.equal(y, frozen(x))


def test_a_frozen_net_is_the_model_of_then() -> None:
    model, x = unet(head="sigmoid"), torch.rand(1, 1, 16, 16)
    frozen = fastunet.freeze(model)
    expected = frozen(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        assert not torch.equal(model(x), expected)
    for net in (frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(net(x), expected)
    assert torch.equal(fastunet.predict(frozen, x[0], tta=False), expected[0])
    assert str(fastunet.explain(frozen, x)) == str(fastunet.explain(model, x))


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (lambda model: model.train(), fastunet.FastUNetError, "train mode"),
        (lambda model: model.to_reference(), fastunet.FastUNetError, "ReferenceUNet"),
        (lambda model: model.double(), TypeError, "float64"),
        (lambda model: model.to("meta"), ValueError, "meta"),
        (lambda model: model.inc.register_forward_hook(lambda *_: None) and model, ValueError, "hooks"),
        (lambda model: fastunet.UNet(1, 2, features=(2, 4), dims=3).eval(), ValueError, "dims=3"),
    ],
)
def test_what_cannot_be_frozen_is_refused(change: Callable, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        fastunet.freeze(change(unet()))


def test_a_frozen_net_refuses_what_the_model_does() -> None:
    frozen = fastunet.freeze(unet())
    for x in (torch.rand(1, 2, 32, 32), torch.rand(1, 1, 4, 32), torch.zeros(1, 1, 32, 32, dtype=torch.uint8)):
        with pytest.raises(fastunet.FastUNetError):
            frozen(x)


def test_a_frozen_net_stays_in_eval_mode() -> None:
    """A module that holds it may be put in train mode: a teacher beside what learns from it."""
    frozen, x, other = fastunet.freeze(unet()), torch.rand(1, 1, 32, 32), torch.rand(1, 1, 48, 48)
    expected = fastunet.freeze(unet())(other)
    frozen(x)
    nn.ModuleDict({"teacher": frozen}).train()
    assert torch.equal(frozen(other), expected)
    assert not any(module.training for module in frozen.modules())


@pytest.mark.parametrize("options", [{}, {"features": (8, 16, 32)}, {"upsample": "bilinear"}], ids=str)
def test_stand_ins_are_on_the_cpu(options: dict) -> None:
    model, x = unet(**options), torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        expected = fastunet.freeze(model)(x), model(x)
        with torch.device("meta"):
            found = fastunet.freeze(model)(x), copy.deepcopy(model)(x)
    assert all(map(torch.equal, found, expected))


@needs_bfloat16
def test_another_dtype_of_the_weights_is_seen() -> None:
    model, x = unet(norm=None, features=(16, 32)), torch.rand(1, 1, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)
        y = model.bfloat16()(x)
        assert torch.equal(y, copy.deepcopy(model)(x))
