"""The losses on their Triton kernels: what dispatch and autograd make of the launchers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastunet.kernels import gpu
from kernel_device import DEVICE, MARK, kernel_names
from torch import Tensor

import fastunet
from fastunet import ops
from fastunet.losses import BCEDiceLoss, CEDiceLoss, DiceLoss
from fastunet.testing import random_cotangent, random_input

pytestmark = MARK


def make_logits(channels: int) -> Tensor:
    return random_input((3, channels, 7, 5), layout="contiguous", device=DEVICE)


def make_target(channels: int) -> Tensor:
    return random_input((3, channels, 7, 5), layout="contiguous", seed=1, device=DEVICE).sigmoid()


def make_labels(classes: int) -> Tensor:
    labels = torch.randint(0, classes, (3, 1, 7, 5), generator=torch.Generator().manual_seed(2))
    labels[0, 0, 2:4] = 255
    return labels.to(DEVICE)


def run(backend: str, loss: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The value and, under one random cotangent, the logits' gradient."""
    loss = loss.to(DEVICE) if isinstance(loss, torch.nn.Module) else loss
    leaf = logits.detach().clone().requires_grad_()
    with fastunet.backend(backend):
        value = loss(leaf, target)
        return value.detach(), *torch.autograd.grad(value, leaf, random_cotangent(value))


TARGET, BYTES = make_target(3), make_target(1).round().to(torch.uint8)
BYTES[:, :, :3] = 255
VOLUMES = make_target(2)[..., None].repeat(1, 1, 1, 1, 4).round()
LABELLED = {"softmax": True, "to_onehot_y": True, "include_background": False, "ignore_index": 255}


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (BCEDiceLoss(pos_weight=[1.0, 2.0, 4.0], squared_pred=True), TARGET),
        (BCEDiceLoss(reduction="sum", soft_label=True, batch=True), TARGET),
        (BCEDiceLoss(ignore_index=255), BYTES),
        (CEDiceLoss(ignore_index=255), make_labels(3)),
        (CEDiceLoss(weight=[0.5, 2.0, 1.0], include_background=False, reduction="sum"), TARGET),
        (ops.sigmoid_dice_loss, TARGET),
        (DiceLoss(sigmoid=True, squared_pred=True, jaccard=True, reduction="none"), TARGET),
        (DiceLoss(**LABELLED, batch=True, reduction="none"), make_labels(3)),
        (BCEDiceLoss(), VOLUMES),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_losses(loss: Any, target: Tensor) -> None:
    """Triton's float32 against ATen's float64."""
    channels = 1 if target is BYTES else 3 if target.shape[1] == 1 else target.shape[1]
    layout = "channels_last" if target is TARGET else "contiguous"
    logits = random_input((3, channels, *target.shape[2:]), layout=layout, device=DEVICE)
    actual, exact = run("triton", loss, logits, target), run("aten", loss, logits.double(), target)
    for a, b in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)
    assert actual[1].stride() == logits.stride()


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64],
    ids=str,
)
def test_labels_of_every_type(dtype: torch.dtype) -> None:
    """The largest of each type is an ignored one, and no class that it would be in int64 or cut to fewer bits."""
    labels = make_labels(2)
    ignored = 1 if dtype == torch.bool else min(torch.iinfo(dtype).max, torch.iinfo(torch.int64).max)
    labels = labels.masked_fill(labels == 255, ignored)
    for loss in (CEDiceLoss(ignore_index=ignored), DiceLoss(sigmoid=True, to_onehot_y=True, ignore_index=ignored)):
        narrow, wide = (run("triton", loss, make_logits(2), t) for t in (labels.to(dtype), labels))
        assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))
        assert wide[0].isfinite()


def test_more_channels_than_a_program_holds_run_on_aten() -> None:
    logits = torch.randn(1, 1025, 2, 1, device=DEVICE)
    with fastunet.backend("triton"), gpu.recording() as launches:
        ops.segmentation_sums(logits, logits.sigmoid())
        assert launches == []
        ops.segmentation_sums(logits[:, :1024], logits[:, :1024].sigmoid())
    assert kernel_names(launches) == ["segmentation_sums_kernel", "sum_rows_kernel"]


def test_the_logits_are_read_once_each_way() -> None:
    with gpu.recording() as launches:
        run("triton", CEDiceLoss(), make_logits(2), make_target(2))
    assert kernel_names(launches) == ["segmentation_sums_kernel", "sum_rows_kernel", "segmentation_sums_grad_kernel"]
