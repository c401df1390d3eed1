"""The U-Nets people already have, from the real packages: the same numbers with every pattern replaced, and how many.

On ATen in float64; `test_models_triton.py` runs the Triton kernels.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from explained import narrow_and_whole
from fastunet.benchmarks.dropin_models import MODELS, DropInModel
from parity import (
    ALL,
    assert_same,
    built,
    compare,
    compare_grads,
    flat,
    image,
    large_image,
    step,
)
from torch import nn

import fastunet
from fastunet.compiler import rewriting

# float64's rounding, through some thirty layers of sums of up to a few thousand terms, is a few 1e-12 of the largest
# value; what is wrong is off by more than its square root.
ATOL = 1e-9
# By model: patterns found and those that are ops, in training and in eval; of what auto finds in eval, where it joins
# whole steps, those it replaces on a CPU with oneDNN. (In training it leaves all to inductor, which is faster there.)
COUNTS = {
    "U-Net, padded": ((18, 18), (17, 17), (14, 14)),
    "U-Net, bilinear": ((15, 15), (14, 14), (14, 14)),
    "U-Net, sigmoid": ((18, 18), (17, 17), (14, 14)),
    "U-Net, residual": ((28, 25), (28, 25), (28, 22)),
    "MONAI BasicUNet": ((23, 23), (23, 23), (27, 22)),
    "MONAI UNet": ((18, 15), (18, 15), (18, 14)),
    "MONAI DynUNet": ((18, 18), (18, 18), (15, 14)),
    "MONAI AttentionUnet": ((24, 21), (24, 21), (24, 11)),
    "nnU-Net PlainConvUNet": ((17, 17), (17, 17), (14, 11)),
    "nnU-Net ResidualEncoderUNet": ((27, 27), (27, 27), (24, 18)),
    "smp Unet": ((33, 27), (33, 27), (33, 27)),
    "smp UnetPlusPlus": ((45, 39), (45, 39), (45, 39)),
    "smp FPN": ((43, 28), (43, 28), (43, 23)),
}
# Others are large, and their patterns those of another in the list, or in test_patterns.py.
QUICK = ("U-Net, padded", "U-Net, bilinear", "U-Net, sigmoid", "U-Net, residual", "MONAI UNet")
QUICK += ("nnU-Net ResidualEncoderUNet", "smp Unet")
QUICK_TO_EXPLAIN = ("U-Net, padded", "U-Net, residual", "nnU-Net ResidualEncoderUNet")


def each_model(quick: tuple[str, ...]) -> pytest.MarkDecorator:
    marked = [pytest.param(model, marks=[pytest.mark.slow] * (model.name not in quick)) for model in MODELS]
    return pytest.mark.parametrize("model", marked, ids=lambda model: model.name)


@each_model(QUICK)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_same_numbers_by_so_many_patterns(model: DropInModel, training: bool) -> None:
    sides = (37, 35) if model.any_size else (32, 32)
    patterns = assert_same(built(model).train(training), image(model, *sides), atol=ATOL)
    assert (len(patterns.found), len(patterns.ops)) == COUNTS[model.name][0 if training else 1]


@each_model(QUICK_TO_EXPLAIN)
def test_explain_names_every_layer(model: DropInModel) -> None:
    """Each pattern once, by the layer that holds its weight, with a reason where it is left."""
    net = built(model).eval()
    explanation = fastunet.explain(net, image(model))
    assert (len(explanation.rows), explanation.replaced) == COUNTS[model.name][2]
    names = {name for name, _ in net.named_modules()}
    with_weight = [row for row in explanation.rows if "conv" in row.op]
    assert {row.layer for row in with_weight} <= names
    assert len({row.layer for row in with_weight}) == len(with_weight)
    assert all(row.reason for row in explanation.rows)
    narrow_and_whole(explanation)


# --- the comparison itself ---

INJECTED = {
    "a slope lost": ("slope_of", lambda activation: None),
    "a running mean not shifted": ("_shift_running_mean", lambda graph, pattern: None),
    "a bias without gradient": ("_with_idle_bias", lambda graph, norm, bias: (norm["weight"], norm["bias"])),
}


@pytest.mark.parametrize("fault", INJECTED)
def test_an_injected_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).train()
    x = torch.randn(2, 1, 8, 8)
    assert_same(net, x)
    monkeypatch.setattr(rewriting, *INJECTED[fault])
    with pytest.raises(AssertionError):
        assert_same(net, x)


@pytest.mark.slow
@ALL
def test_inductor_by_default(model: DropInModel) -> None:
    """As people call it, in float32. Training, all of which auto leaves to inductor, to its very bits; inference to
    the rounding of some thirty layers.

    Not to eager's gradients: in float32 UnetPlusPlus's own are 4e-3 off, for a ReLU beside zero flips.
    """
    plain, x = built(model), large_image(model)
    for module in plain.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0  # Inductor draws its own.
    torch._dynamo.reset()
    net, other = copy.deepcopy(plain), copy.deepcopy(plain)
    compiled: Any = torch.compile(net, backend="fastunet")
    # Inductor's backward of replication padding fails, which BasicUNet has.
    bound = 2e-4 if model.name == "MONAI BasicUNet" else 0.0
    expected: Any = other if bound else torch.compile(other)
    outputs, grads = step(expected, x)
    actual, actual_grads = step(compiled, x)
    compare(outputs, actual, bound)
    compare_grads(grads, actual_grads, 10 * bound)
    net.eval()
    other.eval()
    with torch.no_grad():
        compare(flat(other(x)), flat(compiled(x)), 2e-4)
