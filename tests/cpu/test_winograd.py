"""3x3 convolutions by Winograd's algorithm: values and gradients within the bounds of the direct sum, and where it
runs.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_onednn import distance, record
from torch import Tensor

import fastunet
from fastunet import dispatch, ops
from fastunet.cpu import winograd
from fastunet.testing import (
    assert_within,
    conv3x3_expected,
    conv3x3_input_grad_expected,
    conv3x3_weight_grad_expected,
    conv_tolerance,
    in_layout,
    parity,
    random_cotangent,
    random_input,
    random_integers,
)
from fastunet.testing.ops import Call

# Images whose sides are and are not whole tiles; one or two inputs; several images.
SHAPES = [(1, (8,), 5, 8, 12), (3, (5, 3), 6, 9, 7), (2, (4,), 3, 1, 1), (2, (3, 4), 8, 16, 16), (1, (2,), 2, 5, 21)]
sides = pytest.mark.parametrize("m", [2, 4])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(params=[1 << 8, 1 << 23], ids=["a row", "all"])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_PASS_BYTES", request.param)


def sizes(function: Callable[..., Any], tensors: tuple[Any, ...], *args: Any) -> Any:
    """What a function of winograd adds up, each term by its size: by that, not by the terms of the direct sum, its
    rounding errors go.
    """
    transforms = winograd._transforms
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "_transforms", lambda m: winograd._Transforms(*(t.abs() for t in transforms(m))))
        absolute = [[t.abs() for t in of] if isinstance(of, list) else of.abs() for of in tensors]
        return function(*absolute, *args)


def make(shape: tuple[Any, ...], fill: Any = random_input) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Inputs, their shares of one weight, and a gradient."""
    n, channels, channels_out, h, w = shape
    inputs = [fill((n, c, h, w), seed=i) for i, c in enumerate(channels)]
    weight = fill((channels_out, sum(channels), 3, 3), seed=7)
    return inputs, list(weight.split(channels, dim=1)), fill((n, channels_out, h, w), seed=8)


@sides
@shapes
def test_sum_and_gradients_within_bounds_of_float64(shape: tuple[Any, ...], m: int, at_once: None) -> None:
    inputs, weights, grad = make(shape)
    y = winograd.convolve(inputs, weights, None, m)
    exact = conv3x3_expected(torch.cat(inputs, 1), torch.cat(weights, 1)).value
    size = sizes(winograd.convolve, (inputs, weights), None, m).double()
    assert_within(y, exact, conv_tolerance(exact, size, 9 * sum(shape[1]) + 1, torch.float32))
    assert y.is_contiguous(memory_format=torch.channels_last)

    asked = ([True] * len(inputs), True)
    grads, weight_grads = winograd.gradients(grad, inputs, weights, m, *asked)
    size, weight_size = sizes(winograd.gradients, (grad, inputs, weights), m, *asked)
    n, _, channels_out, h, w = shape
    for i, x in enumerate(inputs):
        exact = conv3x3_input_grad_expected(grad, weights[i]).value
        assert_within(grads[i], exact, conv_tolerance(exact, size[i].double(), 9 * channels_out + 1, torch.float32))
        exact = conv3x3_weight_grad_expected(grad, x).value
        assert_within(
            weight_grads[i], exact, conv_tolerance(exact, weight_size[i].double(), n * h * w + 1, torch.float32)
        )


@shapes
def test_tiles_of_two_are_exact_on_integers(shape: tuple[Any, ...]) -> None:
    """Their matrices hold halves at worst, which float32 keeps."""
    inputs, weights, grad = make(shape, random_integers)
    assert_within(
        winograd.convolve(inputs, weights, None, 2),
        conv3x3_expected(torch.cat(inputs, 1), torch.cat(weights, 1)).value,
        0,
    )
    grads, weight_grads = winograd.gradients(grad, inputs, weights, 2, [True] * len(inputs), True)
    for i, x in enumerate(inputs):
        assert_within(grads[i], conv3x3_input_grad_expected(grad, weights[i]).value, 0)
        assert_within(weight_grads[i], conv3x3_weight_grad_expected(grad, x).value, 0)


def test_only_what_is_asked_for() -> None:
    inputs, weights, grad = make((2, (3, 4), 8, 16, 16))
    grads, weight_grads = winograd.gradients(grad, inputs, weights, 2, [False, True], False)
    assert grads[0] is None
    assert weight_grads == [None, None]
    assert_within(grads[1], *conv3x3_input_grad_expected(grad, weights[1]))


def test_results_outlive_the_next_call() -> None:
    """What a call returns is not of the memory that the next one works in."""
    inputs, weights, grad = make((1, (8,), 5, 8, 8))
    y = winograd.convolve(inputs, weights, None, 4)
    (x_grad,), (weight_grad,) = winograd.gradients(grad, inputs, weights, 4, [True], True)
    kept = [t.clone() for t in (y, x_grad, weight_grad)]
    others = [t * 3 for t in inputs]
    winograd.convolve(others, weights, None, 4)
    winograd.gradients(grad * 5, others, weights, 4, [True], True)
    for t, copy in zip((y, x_grad, weight_grad), kept, strict=True):
        assert_within(t, copy, 0)


def test_memory_is_each_threads_own_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = winograd._Workspace()
    here = workspace.empty("name", 10)
    assert workspace.empty("name", 2, 5).data_ptr() == here.data_ptr(), "the same memory for the same name"
    there: list[int] = []
    thread = threading.Thread(target=lambda: there.append(workspace.empty("name", 10).data_ptr()))
    thread.start()
    thread.join()
    assert there[0] != here.data_ptr()
    monkeypatch.setattr(winograd, "_KEPT_BYTES", 400)
    large = workspace.empty("name", 101)
    assert workspace.empty("name", 101).data_ptr() != large.data_ptr(), "a large one is not kept"
    assert workspace.empty("name", 10).data_ptr() == here.data_ptr()


def test_memory_of_inference_serves_training() -> None:
    workspace = winograd._Workspace()
    with torch.inference_mode():
        workspace.empty("name", 4)
    workspace.empty("name", 4).add_(1)  # Would raise of an inference tensor.


# --- in the ops ---

auto = pytest.mark.skipif(dispatch.selected_backend() != "auto", reason="FASTUNET_BACKEND is not auto")
X, UP, WEIGHT = (2, 128, 50, 49), (2, 64, 50, 49), (128, 192, 3, 3)
PLAIN = parity.Case("conv3x3_bias_relu", {"x": X, "weight": (128, 128, 3, 3), "bias": (128,)})
JOINED = parity.Case("concat_conv3x3_bias_relu", {"skip": X, "up": UP, "weight": WEIGHT, "bias": (128,)})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which functions ran."""
    names: list[str] = []
    for name in ("convolve_transformed", "gradients"):
        record(names, name, winograd, name, monkeypatch)
    return names


@auto
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [PLAIN, JOINED], ids=str)
def test_op_within_bounds(case: parity.Case, layout: str, calls: list[str]) -> None:
    inputs = parity.make_inputs(case.shapes, torch.float32, torch.device("cpu"))
    inputs = {name: (in_layout(t, layout) if t.dim() == 4 else t).requires_grad_() for name, t in inputs.items()}
    y = parity.run_op(case.op, inputs, {}, {"relu": False})
    cotangents = [random_cotangent(y)]
    results = parity.results_of((y,), inputs, cotangents)
    assert calls == ["convolve_transformed", "gradients"]
    exact = {name: t.detach() for name, t in inputs.items()}
    parity.compare(results, Call(case.op, exact, {"relu": False}, {}, cotangents))
    for name, t in inputs.items():
        assert results[f"grad {name}"].stride() == t.stride(), name


@auto
@pytest.mark.parametrize("case", [PLAIN, JOINED], ids=str)
def test_inference_within_bounds(case: parity.Case, calls: list[str]) -> None:
    with torch.inference_mode():
        parity.check(dataclasses.replace(case, backward=False), torch.float32, torch.device("cpu"))
    assert calls == ["convolve_transformed"]


@auto
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_op_with_norm_is_nearly_as_near_to_float64_as_on_aten(norm: str, calls: list[str]) -> None:
    """Without an activation: where that bends, a value next to 0 may fall on either side."""
    weight = random_input((128, 128, 3, 3), seed=2, layout="channels_last")
    tensors = [random_input(X, seed=0), weight, *(random_input((128,)) for _ in "ab")]
    op, running = getattr(ops, f"conv3x3_{norm}_norm_relu"), (None, None) if norm == "batch" else ()
    results = []
    for backend, dtype in (("auto", torch.float32), ("aten", torch.float32), ("aten", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        with fastunet.backend(backend):
            y = op(*leaves, *running, relu=False, **({"training": True} if running else {}))
            results.append([y.detach(), *torch.autograd.grad(y, leaves, random_cotangent(y))])
    assert calls == ["convolve_transformed", "gradients"]
    for actual, of_aten, exact in zip(*results, strict=True):
        error, on_aten = distance(actual, exact), distance(of_aten, exact)
        assert error <= 10 * on_aten + 1e-7, (error, on_aten)


@auto
def test_training_step_of_a_net(calls: list[str]) -> None:
    net, x = fastunet.UNet(1, 2, features=(8, 128, 128)).train(), random_input((1, 1, 96, 100), seed=1)
    y = net(x)
    y.backward(random_cotangent(y))
    assert calls == ["convolve_transformed"] * 3 + ["gradients"] * 3
    assert_within(y, net.to_reference().train()(x), 1e-4 * y.abs().max())


WIDE = (128, 128, 3, 3)
PLACES = {
    "training": (X, WIDE, {}, "winograd"),
    "inference": (X, WIDE, {"training": False}, "onednn"),
    "few channels": (X, (127, 128, 3, 3), {}, "aten"),
    "few pixels": ((1, 128, 31, 33), WIDE, {}, "aten"),
    "few products": ((1, 128, 32, 32), WIDE, {}, "aten"),
    "more products": ((1, 256, 32, 32), (128, 256, 3, 3), {}, "winograd"),
    "many weights": ((1, 2048, 32, 32), (1024, 2048, 3, 3), {}, "aten"),
    "no images": ((0, 128, 50, 49), WIDE, {}, "aten"),
    "float64": (X, WIDE, {"dtype": torch.float64}, "aten"),
    "bfloat16": (X, WIDE, {"dtype": torch.bfloat16}, "aten"),
    "backend aten": (X, WIDE, {"backend": "aten"}, "aten"),
}


@pytest.mark.parametrize("name", PLACES)
@auto
def test_where_it_runs(name: str) -> None:
    x, weight, options, expected = PLACES[name]
    tensors = [torch.empty(shape, dtype=options.get("dtype")) for shape in (x, weight)]
    with fastunet.backend(options.get("backend", "auto")):
        chosen = dispatch.choose("conv3x3_bias_relu", *tensors, training=options.get("training", True))
    assert chosen.implementation == expected


@auto
def test_open_sizes_are_left() -> None:
    """Those of a graph that is compiled for any size: to compare them would fix them."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = torch._subclasses.FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(torch.empty(2, 128, 48, 52))
    assert not isinstance(x.shape[2], int)
    assert not dispatch.winograd_wins(x, torch.empty(128, 128, 3, 3))
    assert dispatch.winograd_wins(torch.empty(2, 128, 48, 52), torch.empty(128, 128, 3, 3))


# --- in inference ---


@auto
def test_inference_with_norm_sees_every_change(calls: list[str]) -> None:
    x, weight = random_input(X), random_input((128, 128, 3, 3), seed=2)
    gamma, beta, mean, variance = (random_input((128,), seed=seed) for seed in (11, 12, 13, 14))
    variance = variance.abs() + 0.5

    def check() -> None:
        with torch.no_grad():
            y = ops.conv3x3_batch_norm_relu(x, weight, gamma, beta, mean, variance, training=False, relu=False)
        scale = gamma / (variance + 1e-5).sqrt()
        assert_within(y, *conv3x3_expected(x, weight * scale.view(-1, 1, 1, 1), beta - mean * scale))

    check()
    weight.data.mul_(2)
    check()
    gamma.add_(1)
    check()
    assert calls == ["convolve_transformed"] * 3


@auto
def test_inference_after_stepping_up(calls: list[str]) -> None:
    """The skip's half of a convolution that takes the upsampling into itself."""
    skip, low = random_input(X), random_input((2, 32, 25, 24), seed=1)
    up_weight, up_bias = random_input((32, 64, 2, 2), seed=2), random_input((64,), seed=3)
    weight, bias = random_input(WEIGHT, seed=4), random_input((128,), seed=5)
    with torch.no_grad():
        y = ops.conv_transpose2x2_concat_conv3x3_relu(skip, low, up_weight, up_bias, weight, bias)
    assert calls == ["convolve_transformed"]
    up = F.conv_transpose2d(low.double(), up_weight.double(), up_bias.double(), stride=2)
    joined = torch.cat([skip.double(), F.pad(up, [0, 1, 0, 0])], 1)
    exact = F.relu(F.conv2d(joined, weight.double(), bias.double(), padding=1))
    assert distance(y, exact) < 3e-6


@pytest.fixture
def medium() -> Iterator[Callable[[], None]]:
    """Have matrix products of float32 computed in bfloat16, where the processor does so."""
    before = torch.get_float32_matmul_precision()
    yield lambda: torch.set_float32_matmul_precision("medium")
    torch.set_float32_matmul_precision(before)


def test_products_in_bfloat16_are_no_place_for_it(medium: Callable[[], None], calls: list[str]) -> None:
    torch.manual_seed(0)
    model, x = fastunet.UNet(1, 2, features=(128, 160)).eval(), torch.rand(1, 1, 64, 64)
    frozen = fastunet.freeze(model)
    with torch.no_grad():
        model(x), frozen(x)
        assert calls
        medium()
        calls.clear()
        model(x), frozen(x)
        assert calls == []
        table = fastunet.explain(model, x)
    assert "winograd" not in {row.implementation for row in table.rows}
