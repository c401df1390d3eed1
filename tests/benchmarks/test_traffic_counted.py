"""The bytes that inference is said to move, beside the tensors of the launches that it makes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from fastunet.benchmarks.cases import Settings, fused_pass, joined_layers
from fastunet.kernels import gpu
from kernel_device import INTERPRETED
from torch import Tensor

import fastunet
from fastunet import dispatch

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytestmark = pytest.mark.interpreter

SETTINGS = Settings(batch=2, size=8, features=(64, 128))


def tensor_of(argument: Any) -> Tensor | None:
    """The tensor of a kernel's argument, pointer or descriptor; None where it is none."""
    found = getattr(argument, "base", argument)
    return found if isinstance(found, Tensor) else None


def moved(launch: gpu.Launch) -> int:
    """Bytes of its tensors of 16 bits, each once: what is of float32 are the few vectors at an image's border."""
    found = [t for t in map(tensor_of, launch.arguments.values()) if t is not None and t.element_size() == 2]
    return sum(t.untyped_storage().nbytes() for t in {t.untyped_storage()._cdata: t for t in found}.values())


def test_a_launch_moves_what_its_layer_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """On sm_90: the upsampling composed with the convolution after it, the head in the last convolution."""
    monkeypatch.setattr(gpu, "INTERPRETER", dataclasses.replace(gpu.known_target(90), multiprocessors=4))
    dispatch._choices.clear()
    model = fastunet.UNet(3, 2, features=SETTINGS.features, norm=None).eval().to(torch.bfloat16)
    model = model.to(memory_format=torch.channels_last)
    x = torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), fastunet.backend("triton"):
        model(x)  # Prepares the weights, by launches of its own.
        with gpu.recording() as launches:
            model(x)
    layers = joined_layers(SETTINGS.net_layers())
    said = {layer.name: fused_pass(layer, 2).bytes for layer in layers}
    assert dict(zip(said, map(moved, launches), strict=True)) == said
