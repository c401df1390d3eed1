"""Vectors of parameters in any layout, and batches without images, through every op, forward and backward.

ATen's native functions, oneDNN's and our kernels read a vector as if it were contiguous. Whatever its strides, it is to
count by its values: the results are to the bit those of its contiguous copy, which are torch's (test_ops.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from test_ops import (
    CASES,
    EACH_OP,
    INFERENCE,
    SUMMED,
    Case,
    Dispatched,
    call,
    grads_of,
    make_buffers,
    make_leaves,
    make_tensors,
)
from torch import Tensor

import fastunet
from fastunet import ops
from fastunet.reference import functional as reference

DTYPE = torch.float32
if os.environ.get("TRITON_INTERPRET") == "1":
    pytestmark = pytest.mark.interpreter
    BACKENDS = ["triton"]
else:
    BACKENDS = ["auto", "aten"]


def beside(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], dim=1)[:, 0]


def every_third(t: Tensor) -> Tensor:
    return torch.stack([t, *[torch.full_like(t, torch.nan)] * 2], dim=1).flatten()[::3]


def offset(t: Tensor) -> Tensor:
    return torch.cat([torch.full_like(t, torch.nan), t])[t.numel() :]


def expanded(t: Tensor) -> Tensor:
    return t[:1].clone().expand_as(t)


# The interpreter is slow, and layouts are put right before the kernels.
LAYOUTS = (beside,) if BACKENDS == ["triton"] else (beside, every_third, offset, expanded)
_WITH_VECTORS = (c for c in (*CASES, *INFERENCE) if c.buffers or any(s and len(s) == 1 for s in c.shapes))
VECTORS = [
    *{(case.op, case.options.get("stride"), case.options.get("training")): case for case in _WITH_VECTORS}.values()
]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with fastunet.backend(request.param):
        yield


def results(
    case: Case, tensors: list[Tensor | None], buffers: list[Tensor], *, training: bool, dispatched: bool
) -> list[Tensor]:
    """Outputs, gradients and buffers after the call."""
    for t in tensors:
        if t is not None:
            t.requires_grad_(training)
    with Dispatched() if dispatched else nullcontext(), torch.set_grad_enabled(training):
        outputs = call(getattr(ops, case.op), case, tensors, buffers)
        grads = grads_of(outputs, tensors) if training else []
    return [*outputs, *grads, *buffers]


@pytest.mark.parametrize("dispatched", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", VECTORS, ids=str)
def test_a_vector_counts_by_its_values(case: Case, layout, dispatched: bool) -> None:
    modes = (False,) if case in INFERENCE else (False, True)
    for training in modes:
        found = []
        for arrange in (layout, lambda t: layout(t).clone(memory_format=torch.contiguous_format)):
            tensors = make_tensors(case, DTYPE, torch.channels_last)
            tensors = [arrange(t) if t is not None and t.dim() == 1 else t for t in tensors]
            buffers = make_buffers(case, DTYPE)
            if not (case.options.get("training") and layout is expanded):  # What is written cannot overlap itself.
                buffers = [arrange(t) for t in buffers]
            if "norm" in case.options:
                *vectors, eps = case.options["norm"]
                norm = (*(arrange(t.to(DTYPE)) for t in vectors), eps)
                case = Case(case.op, case.shapes, {**case.options, "norm": norm}, case.buffers)
            found.append(results(case, tensors, buffers, training=training, dispatched=dispatched))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b), f"training={training}"
            assert not a.isnan().any()


@pytest.mark.parametrize("dispatched", [True, False])
@pytest.mark.parametrize("case", EACH_OP, ids=str)
def test_an_empty_batch_has_empty_results_and_zero_gradients(case: Case, dispatched: bool) -> None:
    found = []
    for op in (getattr(ops, case.op), getattr(reference, case.op)):
        images = len(case.shapes) if case.op in SUMMED else 2 if "concat" in case.op or "double" in case.op else 1
        shapes = [(0, *shape[1:]) if shape and i < images else shape for i, shape in enumerate(case.shapes)]
        tensors = make_leaves(Case(case.op, tuple(shapes), case.options), DTYPE, torch.channels_last)
        buffers = make_buffers(case, DTYPE)
        if op is getattr(reference, case.op) and "instance_norm" in case.op:
            # With gamma and beta torch's instance norm raises IndexError on an empty batch.
            outputs = call(op, case, [*tensors[:-2], None, None], buffers)
            found.append([*outputs, *(torch.zeros_like(t) for t in tensors if t is not None)])
            continue
        with Dispatched() if dispatched else torch.enable_grad():
            outputs = call(op, case, tensors, buffers)
            found.append([*outputs, *grads_of(outputs, tensors), *buffers])
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b) or (a.isnan() & b.isnan()).all()


@pytest.mark.parametrize("eps", [0.0, -1.0, float("-inf")])
def test_an_eps_that_torch_refuses_is_refused(eps: float) -> None:
    x, w, p = torch.ones(2, 3, 4, 4), torch.ones(5, 3, 3, 3), torch.ones(5)
    head, up_weight = torch.ones(2, 5, 1, 1), torch.ones(3, 2, 2, 2)
    calls = {
        "training": lambda: ops.conv3x3_batch_norm_relu(x, w, p, p, p, p, training=True, eps=eps),
        "eval": lambda: ops.conv3x3_batch_norm_relu(x, w, p, p, p, p, training=False, eps=eps),
        "head": lambda: ops.conv3x3_relu_conv1x1(x, w, p, head, norm=(p, p, p, eps)),
        "up": lambda: ops.conv_transpose2x2_concat_conv3x3_relu(
            x, x[:, :, :2, :2], up_weight, None, torch.ones(5, 5, 3, 3), p, norm=(p, p, p, eps)
        ),
    }
    for name, run in calls.items():
        if eps < 0 or name == "training":
            with pytest.raises(ValueError, match=f"eps: expected .*, got {eps}"):
                run()
        else:
            assert run().isfinite().all()


@pytest.mark.skipif(BACKENDS == ["triton"], reason="of ATen's way")
@pytest.mark.parametrize(("training", "grad"), [(True, True), (True, False), (False, True), (False, False)])
def test_on_aten_the_batch_norm_is_the_one_that_torch_picks(
    training: bool, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU F.batch_norm picks cuDNN's, and aten.native_batch_norm is another."""
    picked: list[bool] = []
    batch_norm = torch.nn.functional.batch_norm
    monkeypatch.setattr(torch.nn.functional, "batch_norm", lambda *a, **k: picked.append(True) or batch_norm(*a, **k))
    x, w = torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3, requires_grad=True)
    statistics = [torch.zeros(4), torch.ones(4)]
    with fastunet.backend("aten"), torch.set_grad_enabled(grad):
        y = ops.conv3x3_batch_norm_relu(x, w, None, None, *statistics, training=training)
    assert picked == [True]
    assert y.requires_grad == grad
