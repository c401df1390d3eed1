"""FlopCounterMode counts an op as the torch functions it stands for.

Of a model it counts torch's own functions: it hooks all modules, which are then called one by one.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from test_ops import EACH_OP, INFERENCE, SUMMED, Case, call, grads_of, make_buffers, make_tensors
from torch.utils.flop_counter import FlopCounterMode

from fastunet import ops
from fastunet.reference import functional as reference

CONVOLUTIONS = [case for case in (*EACH_OP, *INFERENCE) if case.op not in (*SUMMED, "max_pool2x2")]


def counted(namespace: Any, case: Case, needs_grad: Any) -> int:
    """Operations of a call and of the gradients of the tensors at those places."""
    tensors = make_tensors(case, torch.float64, torch.channels_last)
    for i in needs_grad:
        tensors[i].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        outputs = call(getattr(namespace, case.op), case, tensors, make_buffers(case, torch.float64))
        if needs_grad:
            grads_of(outputs, tensors)
    return counter.get_total_flops()


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_as_the_composition(case: Case) -> None:
    image, *others, weight = (i for i, shape in enumerate(case.shapes[:3]) if shape and len(shape) == 4)
    for needs_grad in ((),) if case in INFERENCE else ((), (image,), (weight,), (image, *others, weight)):
        expected = counted(reference, case, needs_grad)
        assert expected > 0
        assert counted(ops, case, needs_grad) == expected, needs_grad


def test_also_where_the_counter_is_imported_later() -> None:
    script = """
import sys, torch
from fastunet import ops
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    ops.conv1x1(torch.zeros(1, 2, 3, 3), torch.zeros(4, 2, 1, 1))
assert counter.get_total_flops() == 2 * 4 * 2 * 9
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
