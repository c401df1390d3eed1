"""The U-Nets people already have on the Triton kernels, in the interpreter: a training step, and inference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fastunet.benchmarks.dropin_models import MODELS, DropInModel
from parity import built, compare, compare_grads, flat, image, ops_run, step

from fastunet import dispatch

pytestmark = pytest.mark.interpreter
if not dispatch.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1, set before triton is imported", allow_module_level=True)

# Of the largest value: float32's rounding in some thirty layers, norms of few pixels among them.
OUTPUT, GRADIENT = 2e-4, 2e-3


@pytest.mark.parametrize(
    "model",
    [MODELS[0], *(pytest.param(model, marks=pytest.mark.slow) for model in MODELS[1:])],
    ids=lambda model: model.name,
)
def test_training_and_inference(model: DropInModel) -> None:
    side = 64 if model.name.startswith("smp") else 32  # Five levels down, more than a pixel for a batch norm.
    plain, x = built(model, 2), image(model, side, side, batch=1)
    net = copy.deepcopy(plain)
    compiled: Any = torch.compile(net, backend="fastunet", options={"fallback": "eager"})
    outputs, grads = step(plain.double().train(), x.double())
    net.train()
    results: list[Any] = []
    assert ops_run(lambda: results.append(step(compiled, x)))
    compare([y.float() for y in outputs], results[0][0], OUTPUT)
    compare_grads([None if g is None else g.float() for g in grads], results[0][1], GRADIENT)
    plain.eval()
    net.eval()
    with torch.no_grad():
        compare([y.float() for y in flat(plain(x.double()))], flat(compiled(x)), OUTPUT)
