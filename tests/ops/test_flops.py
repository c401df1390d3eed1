"""FlopCounterMode counts a UNet as it counts its reference."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastunet

OPTIONS: dict[str, dict[str, Any]] = {
    "batch": {},
    "instance": {"norm": "instance", "head": "softmax"},
    "none": {"norm": None, "head": "sigmoid"},
    "bilinear": {"upsample": "bilinear"},
}


def counted(model: torch.nn.Module, shape: tuple[int, ...], step: str) -> int:
    x = torch.randn(shape)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(step != "inference"):
        y = model(x)
        if step == "training":
            y.backward(torch.randn_like(y))
    return counter.get_total_flops()


@pytest.mark.parametrize("step", ["inference", "forward", "training", "frozen"])
@pytest.mark.parametrize("options", OPTIONS)
def test_as_the_reference(options: str, step: str) -> None:
    shape = (2, 3, 21, 18)
    model = fastunet.UNet(3, 2, features=(4, 8, 16), **OPTIONS[options]).train(step != "inference")
    reference = model.to_reference()
    if step == "frozen":
        step = "training"
        for part in (net.get_submodule(name) for net in (model, reference) for name in ("inc", "down2", "up1.conv")):
            part.requires_grad_(False)
    expected = counted(reference, shape, step)
    assert expected > 0
    assert counted(model, shape, step) == expected


def test_also_where_the_counter_is_imported_later() -> None:
    lines = (
        "import sys, torch, fastunet",
        "model = fastunet.UNet(1, 1, features=(2, 4)).eval()",
        "assert 'torch.utils.flop_counter' not in sys.modules",
        "from torch.utils.flop_counter import FlopCounterMode",
        "with FlopCounterMode(display=False) as counter, torch.no_grad(): model(torch.zeros(1, 1, 4, 4))",
        "print(counter.get_total_flops())",
    )
    found = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert int(found.stdout) == counted(fastunet.UNet(1, 1, features=(2, 4)).eval(), (1, 1, 4, 4), "inference")
