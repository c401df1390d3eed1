"""Upsampling as one op: to the bit what torch computes, and in which graphs it stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.compiler import backend, rewriting
from fastunet.ops.interpolation import InterpolateArgs
from fastunet.testing import assert_within, random_cotangent, random_input

HOW = pytest.mark.parametrize(
    ("size", "mode", "align_corners"),
    [((8, 6), "nearest", False), ((11, 5), "nearest", False), ((8, 6), "bilinear", True), ((11, 5), "bilinear", False)],
)


def image(dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    return random_input((2, 3, 4, 3), dtype=dtype).contiguous(**options).requires_grad_()


@HOW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_values_and_gradients_are_torchs(
    size: tuple[int, int], mode: str, align_corners: bool, dtype: torch.dtype, format: torch.memory_format
) -> None:
    x = image(dtype, memory_format=format)
    y = torch.ops.fastunet.interpolate(*InterpolateArgs(x, *size, mode, align_corners))
    corners = None if mode == "nearest" else align_corners
    expected = F.interpolate(x, size, mode=mode, align_corners=corners)
    assert_within(y, expected, 0)
    cotangent = random_cotangent(y).contiguous(memory_format=format)
    (grad,), (expected_grad,) = (torch.autograd.grad(each, x, cotangent) for each in (y, expected))
    assert_within(grad, expected_grad, 0)
    assert y.is_contiguous(memory_format=format)
    assert grad.is_contiguous(memory_format=format)


@HOW
def test_opcheck(size: tuple[int, int], mode: str, align_corners: bool) -> None:
    args = InterpolateArgs(image(torch.float64), *size, mode, align_corners)
    torch.library.opcheck(torch.ops.fastunet.interpolate.default, tuple(args))


def kept(run: Any, x: Tensor) -> tuple[bool, Tensor]:
    """Whether the upsampling in run(x) stays whole in the graph that inductor gets, and what that computes."""
    found: list[bool] = []

    def spied(graph_module: Any, inputs: Any) -> Any:
        rewriting.keep_interpolations(graph_module)
        found.append("fastunet.interpolate" in str(graph_module.graph))
        return graph_module.forward

    torch._dynamo.reset()
    y = torch.compile(run, backend=spied, dynamic=False)(x)
    return found[0], y


@pytest.mark.parametrize(
    ("options", "stays"),
    [
        ({"scale_factor": 2}, True),
        ({"scale_factor": (2.0, 3.0), "mode": "bilinear", "align_corners": True}, True),
        ({"size": (5, 7), "mode": "bilinear"}, True),
        ({"size": 8}, True),
        ({"scale_factor": 1.5}, False),  # Of three columns four: they lie elsewhere than the sizes say.
        ({"scale_factor": 2.2, "mode": "bilinear"}, False),
        ({"scale_factor": 2, "mode": "bilinear", "antialias": True}, False),
        ({"scale_factor": 2, "mode": "bicubic"}, False),
        ({"scale_factor": 2, "mode": "nearest-exact"}, False),
    ],
    ids=str,
)
def test_which_upsamplings_stay_whole(options: dict[str, Any], stays: bool) -> None:
    x = image()

    def run(x: Tensor) -> Tensor:
        return F.interpolate(x, **options) * 2

    found, y = kept(run, x)
    assert found == stays
    assert_within(y, run(x), 0)


def test_without_a_gradient_it_is_inductors() -> None:
    assert not kept(lambda x: F.interpolate(x, scale_factor=2), image().detach())[0]
    with torch.no_grad():
        assert not kept(lambda x: F.interpolate(x, scale_factor=2), image())[0]


def test_a_cast_is_not_lost() -> None:
    """Where autocast upsamples in another dtype than the image has."""
    x = image()

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.interpolate(x.bfloat16(), scale_factor=2, mode="bilinear")

    _, y = kept(run, x)
    assert y.dtype == run(x).dtype


def test_the_backend_trains_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled by AOTAutograd, forward and backward: one call of each."""
    graphs: list[str] = []

    def run_backend(name: str, graph_module: Any, inputs: Any, **options: Any) -> Any:
        graphs.append(str(graph_module.graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph_module, inputs)

    monkeypatch.setattr(backend, "run_backend", run_backend)
    monkeypatch.setattr(backend, "default_fallback", lambda: "inductor")
    x = image()
    torch._dynamo.reset()
    y = torch.compile(lambda x: F.interpolate(x.sin(), scale_factor=2, mode="bilinear"), backend="fastunet")(x)
    expected = F.interpolate(x.sin(), scale_factor=2, mode="bilinear")
    cotangent = random_cotangent(y)
    (grad,), (expected_grad,) = (torch.autograd.grad(each, x, cotangent) for each in (y, expected))
    assert graphs[0].count("fastunet.interpolate") == 1
    assert_within(y, expected, 0)
    assert_within(grad, expected_grad, 0)
