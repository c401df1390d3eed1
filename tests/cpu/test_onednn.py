"""Inference on the CPU through oneDNN with prepared weights: values, NaN, changed weights, and where it stays out."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from onednn_here import MARKS, needs_bfloat16
from torch import Tensor, nn

import fastunet
from fastunet import dispatch, ops
from fastunet.cpu import onednn
from fastunet.cpu.onednn import activate_
from fastunet.ops import convolution
from fastunet.testing import parity, random_input
from fastunet.testing.ops import Call

pytestmark = MARKS
JOINED_UP = "conv_transpose2x2_concat_conv3x3_relu"


def record(names: list[str], name: str, owner: object, attribute: str, patch: pytest.MonkeyPatch) -> None:
    """Have each call of a function put a name into the list."""
    original = getattr(owner, attribute)

    def run(*args: object, **options: object) -> object:
        names.append(name)
        return original(*args, **options)

    patch.setattr(owner, attribute, run)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is computed by prepared weights, by ops or in a net, in the order it runs."""
    names: list[str] = []
    record(names, "conv3x3", onednn.Convolution, "__call__", monkeypatch)
    record(names, "conv_transpose2x2_concat_conv3x3", onednn.Composed, "__call__", monkeypatch)
    record(names, "conv_transpose2x2", onednn, "convolve_transpose2x2", monkeypatch)
    return names


# A second input by stride 2, whose first one's sum it is added to where that is large, and joined where it is small.
TWO_BY_STRIDE_2 = [
    parity.Case(
        "concat_conv3x3_bias_relu",
        {"skip": (2, 8, h, w), "up": (2, 5, h, w), "weight": (24, 13, 3, 3), "bias": (24,)},
        {"stride": 2},
    )
    for h, w in ((51, 48), (64, 65), (9, 10))
]


def inference_cases() -> list[parity.Case]:
    return [
        case
        for case in [*parity.cases(), *TWO_BY_STRIDE_2]
        if parity.registered(case.op, case.options) in dispatch.ONEDNN_OPS and not case.options.get("training")
    ]


@pytest.mark.parametrize("case", inference_cases(), ids=str)
def test_within_bounds_of_float64(case: parity.Case, calls: list[str]) -> None:
    inputs = parity.make_inputs(case.shapes, torch.float32, torch.device("cpu"))
    buffers = {}
    if case.buffers is not None:
        buffers = {"running_mean": random_input(case.buffers), "running_var": random_input(case.buffers).abs() + 0.5}
    with torch.no_grad():
        outputs = parity.outputs_of(parity.run_op(case.op, inputs, buffers, case.options))
        contiguous = {name: t.contiguous() for name, t in inputs.items()}
        of_contiguous = parity.outputs_of(parity.run_op(case.op, contiguous, buffers, case.options))
    assert calls
    call = Call(case.op, inputs, case.options, buffers, [], y=outputs[0] if case.op in parity.DECIDED_BY_Y else None)
    parity.compare(parity.results_of(outputs, {}, []), call)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in outputs)
    assert all(y.is_contiguous() for y in of_contiguous)


@pytest.mark.parametrize("up_first", [False, True])
def test_repeated_pixels_are_within_bounds_of_float64(up_first: bool, calls: list[str]) -> None:
    shapes = {"skip": (2, 24, 40, 36), "low": (2, 40, 20, 18), "weight": (48, 64, 3, 3), "bias": (48,)}
    inputs = parity.make_inputs(shapes, torch.float32, torch.device("cpu"))
    skip, low, weight, bias = inputs.values()
    with torch.no_grad():
        y = ops.conv_transpose2x2_concat_conv3x3_relu(skip, low, None, None, weight, bias, up_first=up_first)
    assert calls == ["conv_transpose2x2_concat_conv3x3"]
    parity.compare({"y": y}, Call(JOINED_UP, inputs, {"up_first": up_first}, {}, []))


# A folded norm rounds the weight once more than the bounds of bfloat16 know of: that is for the net's test.
@needs_bfloat16
@pytest.mark.parametrize(
    "case", [c for c in inference_cases() if "batch_norm" not in c.op and c.op != JOINED_UP], ids=str
)
def test_within_bounds_under_autocast(case: parity.Case, calls: list[str]) -> None:
    exact = parity.make_inputs(case.shapes, torch.bfloat16, torch.device("cpu"))
    inputs = {name: t.float() if "weight" in name or "bias" in name else t for name, t in exact.items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = parity.outputs_of(parity.run_op(case.op, inputs, {}, case.options))
    assert calls
    y = outputs[0] if case.op in parity.DECIDED_BY_Y else None
    call = Call(case.op, exact, case.options, {}, [], y=y, stores_steps=True)
    parity.compare(parity.results_of(outputs, {}, []), call)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_weight_gradient_as_a_matrix_product(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many weights and few pixels, where oneDNN's is slow."""
    asked: list[int] = []
    by_matmul = convolution._weight_grad_by_matmul
    monkeypatch.setattr(convolution, "_weight_grad_by_matmul", lambda *args: asked.append(args[-1]) or by_matmul(*args))
    shapes = {"x": (2, 512, 7, 6), "weight": (228, 512, 3, 3), "bias": (228,)}
    parity.check(parity.Case("conv3x3_bias_relu", shapes, {"stride": stride}), torch.float32, torch.device("cpu"))
    assert asked == [stride]


def test_relu_of_every_bfloat16_is_torchs() -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every.reshape(1, 1, 256, 256).clone()
    expected, actual = F.relu(x), activate_(x.clone(), 0.0)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[~actual.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_torchs(value: float) -> None:
    x, weight, bias = random_input((1, 8, 6, 7)), random_input((8, 8, 3, 3)), random_input((8,))
    x[0, 3, 2, 2] = value
    with torch.no_grad():
        actual = ops.conv3x3_bias_relu(x, weight, bias)
    expected = F.relu(F.conv2d(x, weight, bias, padding=1))
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    assert not expected.isfinite().all()


def unet(**options: object) -> fastunet.UNet:
    torch.manual_seed(0)
    model = fastunet.UNet(3, 2, features=(8, 16, 32), **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.weight)
    return model


def distance(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": None, "activation": "leaky_relu"},
        {"norm": "instance"},
        {"upsample": "bilinear"},
        {"head": "sigmoid"},
        {"head": "softmax", "norm": None},
    ],
    ids=str,
)
def test_net_is_as_near_to_float64_as_on_aten(options: dict, calls: list[str]) -> None:
    """At each size, by what is packed for another."""
    model = unet(**options)
    reference = model.to_reference().double()
    for size in ((32, 32), (33, 30), (31, 41), (8, 9)):
        x = random_input((2, 3, *size))
        with torch.no_grad():
            exact = reference(x.double())
            with fastunet.backend("aten"):
                plain = distance(model(x), exact)
            calls.clear()
            assert distance(model(x), exact) <= 2 * plain, size
    composed = calls.count("conv_transpose2x2_concat_conv3x3")
    composes = options.get("upsample") != "bilinear" and options.get("norm") != "instance"
    transposes = options.get("upsample") != "bilinear"
    assert (composed, calls.count("conv_transpose2x2")) == (2 * composes, 2 * (transposes - composes))
    assert calls.count("conv3x3") == 10 - composed


@needs_bfloat16
@pytest.mark.parametrize("norm", ["batch", "instance", None])
def test_net_under_autocast(norm: str | None, calls: list[str]) -> None:
    model, x = unet(norm=norm), random_input((2, 3, 33, 32))
    reference = model.to_reference()
    with torch.no_grad():
        exact = copy.deepcopy(reference).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            plain, ours = reference(x), model(x)
    assert ours.dtype == torch.bfloat16
    assert distance(ours, exact) <= 2 * distance(plain, exact)
    apart = ["conv3x3"] * 2 + ["conv_transpose2x2"] * 2
    assert sorted(calls) == ["conv3x3"] * 8 + (
        apart if norm == "instance" else ["conv_transpose2x2_concat_conv3x3"] * 2
    )


def test_every_change_of_the_model_is_seen() -> None:
    model, x = unet(), random_input((1, 3, 16, 16))

    def check() -> None:
        with torch.no_grad():
            actual = model(x)
            with fastunet.backend("aten"):
                expected = model(x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: setattr(model.down1.maxpool_conv[1].double_conv[1], "eps", 0.1),
        lambda: model.up1.up.weight.data.mul_(-1),
        lambda: model.up1.up.bias.data.add_(1),
        lambda: model.inc.double_conv[1].running_mean.add_(1),
        lambda: model.up2.conv.double_conv[0].weight.data.neg_(),
        lambda: model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()}),
        lambda: model.train()(x).square().mean().backward(),
        lambda: torch.optim.SGD(model.eval().parameters(), lr=0.1).step(),
    ]
    for change in changes:
        change()
        model.eval()
        check()


def test_one_weight_after_two_norms() -> None:
    x, weight, ones = random_input((1, 4, 6, 6)), random_input((4, 4, 3, 3)), torch.ones(4)
    with torch.no_grad():
        for mean in (torch.zeros(4), torch.full((4,), 2.0), torch.zeros(4)):
            arguments = (weight, ones, ones, mean, ones)
            actual = ops.conv3x3_batch_norm_relu(x, *arguments, training=False)
            expected = F.relu(F.conv2d(x, weight, padding=1) - mean[:, None, None] + 1)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_where_it_stays_out(calls: list[str]) -> None:
    model, x = unet(), random_input((1, 3, 16, 16))
    model(x)  # A gradient may be asked for.
    model.train()(x)
    with torch.no_grad():
        model(x)  # With the batch's statistics nothing can be folded.
        model.eval()
        with fastunet.backend("aten"):
            model(x)
        with torch.backends.mkldnn.flags(enabled=False):
            model(x)
        copy.deepcopy(model).double()(x.double())
        copy.deepcopy(model).bfloat16()(x.bfloat16())
        assert ops.conv3x3_bias_relu(x[:0], model.inc.double_conv[0].weight).shape == (0, 8, 16, 16)
        assert calls == []
        model(x)
    assert len(calls) == 10


def test_explain_tells() -> None:
    rows = fastunet.explain(unet(), torch.zeros(1, 3, 16, 16)).rows
    assert {row.implementation for row in rows} == {"onednn"}
    assert [row.op for row in rows].count(JOINED_UP) == 2
    assert {row.implementation for row in fastunet.explain(unet().train(), torch.zeros(1, 3, 16, 16)).rows} == {"aten"}


def test_folding_of_the_upsampling_can_be_left_out(calls: list[str]) -> None:
    model, x = unet(), random_input((1, 3, 32, 32))
    with torch.no_grad():
        folded = model(x)
        assert calls.count("conv_transpose2x2_concat_conv3x3") == 2
        for up in model.ups:
            up.folds_upsampling = False
        calls.clear()
        apart = copy.deepcopy(model)(x)
    assert calls.count("conv_transpose2x2") == 2
    assert "conv_transpose2x2_concat_conv3x3" not in calls
    assert not torch.equal(folded, apart)
    assert distance(apart, folded.double()) < 1e-5
