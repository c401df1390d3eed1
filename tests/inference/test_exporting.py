"""What torch makes programs of: a UNet is then torch's own ops, for any size of image."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

import fastunet
from fastunet.testing import assert_within

OPTIONS: dict[str, dict[str, Any]] = {
    "batch": {},
    "instance, bilinear": {"norm": "instance", "upsample": "bilinear", "head": "softmax"},
    "none": {"norm": None, "activation": "leaky_relu", "head": "sigmoid"},
}
EXAMPLE, OTHERS = (2, 1, 16, 16), [(3, 1, 25, 21), (1, 1, 32, 17)]


def net(options: str) -> fastunet.UNet:
    torch.manual_seed(0)
    return fastunet.UNet(1, 2, features=(2, 4), **OPTIONS[options]).double().eval()


def assert_as_reference(program: Any, model: fastunet.UNet) -> None:
    """Both are the same ops in float64, though in other memory formats."""
    reference = model.to_reference()
    for shape in (EXAMPLE, *OTHERS):
        x = torch.randn(shape, dtype=torch.float64)
        assert_within(program(x).detach(), reference(x).detach(), 1e-12)


def example() -> Tensor:
    return torch.randn(EXAMPLE, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "grad", "strict"),
    [
        ("batch", False, True),
        ("instance, bilinear", True, False),
        pytest.param("none", True, True, marks=pytest.mark.slow),
    ],
)
def test_exports_with_free_sizes(options: str, grad: bool, strict: bool) -> None:
    model, free = net(options), torch.export.Dim.DYNAMIC
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (example(),), dynamic_shapes=[{0: free, 2: free, 3: free}], strict=strict)
    program = program.run_decompositions()
    assert not [node for node in program.graph.nodes if "fastunet" in str(node.target)]
    assert_as_reference(program.module(), model)


@pytest.mark.parametrize(("options", "grad"), [("batch", True), ("instance, bilinear", False)])
def test_traces_with_free_sizes(options: str, grad: bool) -> None:
    model = net(options)
    with torch.set_grad_enabled(grad):
        program = torch.jit.trace(model, example())
    assert "fastunet::" not in str(program.inlined_graph)
    assert_as_reference(program, model)


@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "dynamo"])
def test_goes_to_onnx_as_it_is(dynamo: bool) -> None:
    pytest.importorskip("onnxscript" if dynamo else "onnx", reason="needs the extra onnx")
    file = io.BytesIO()
    torch.onnx.export(net("batch").float(), (example().float(),), file, dynamo=dynamo)
    assert file.getvalue()
