"""Dice losses: values and gradients against MONAI itself, fp32 sums, empty masks, errors."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

pytest.importorskip("monai", reason="needs the extra train")

import monai.losses
import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.checks import ConfigError, DtypeError, ShapeError
from fastunet.losses import BCEDiceLoss, CEDiceLoss, DiceLoss
from fastunet.testing import random_cotangent

TOLERANCE = {"rtol": 1e-12, "atol": 1e-13}  # float64 on both sides: only the order of the additions differs


def make_input(channels: int, seed: int = 0, spatial: tuple[int, ...] = (7, 5)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, channels, *spatial, generator=generator, dtype=torch.float64)


def make_labels(classes: int, spatial: tuple[int, ...] = (7, 5)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, classes, (3, 1, *spatial), generator=generator)


def make_target(channels: int, soft: bool, spatial: tuple[int, ...] = (7, 5)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    target = torch.rand(3, channels, *spatial, generator=generator, dtype=torch.float64)
    return target if soft else target.round()


def assert_same_loss(ours: torch.nn.Module, monais: torch.nn.Module, input: Tensor, target: Tensor) -> None:
    """Compare the values and, under one random cotangent, the gradients."""
    results = []
    for loss in (ours, monais):
        leaf = input.clone().requires_grad_()
        value = loss(leaf, target)
        (gradient,) = torch.autograd.grad(value, leaf, random_cotangent(value))
        results.append((value.detach(), gradient))
    torch.testing.assert_close(*results, **TOLERANCE)


ACTIVATIONS: list[dict[str, Any]] = [{}, {"sigmoid": True}, {"softmax": True}, {"other_act": torch.tanh}]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda options: next(iter(options), "no_act"))
@pytest.mark.parametrize("channels", [1, 3])
def test_dice_equals_monai_over_the_grid(channels: int, activation: dict[str, Any], reduction: str) -> None:
    flags = ("squared_pred", "jaccard", "batch", "soft_label")
    input = make_input(channels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one channel and softmax: both sides warn
        for values in itertools.product([False, True], repeat=len(flags)):
            options = {**dict(zip(flags, values, strict=True)), **activation, "reduction": reduction}
            target = make_target(channels, soft=options["soft_label"])
            assert_same_loss(DiceLoss(**options), monai.losses.DiceLoss(**options), input, target)


@pytest.mark.parametrize(
    "options",
    [
        {"to_onehot_y": True, "softmax": True},
        {"to_onehot_y": True, "softmax": True, "include_background": False, "reduction": "none"},
        {"to_onehot_y": True, "softmax": True, "weight": [0.5, 2.0, 1.25, 0.0]},
        {"to_onehot_y": True, "softmax": True, "weight": 0.25, "batch": True, "reduction": "none"},
        {"to_onehot_y": True, "softmax": True, "weight": [3.0, 1.0, 2.0], "include_background": False},
        {"to_onehot_y": True, "softmax": True, "ignore_index": 2},
        {"to_onehot_y": True, "softmax": True, "ignore_index": 255, "reduction": "none"},
        {"to_onehot_y": True, "other_act": torch.sigmoid, "ignore_index": 2},
        {"to_onehot_y": True, "softmax": True, "smooth_nr": 0.0, "smooth_dr": 1.0},
        {"to_onehot_y": True, "sigmoid": True, "smooth_nr": 0.5, "smooth_dr": 0.25, "jaccard": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_dice_of_class_indices_equals_monai(options: dict[str, Any]) -> None:
    labels = make_labels(4)
    labels[:, :, :2] = options.get("ignore_index", 0)
    assert_same_loss(DiceLoss(**options), monai.losses.DiceLoss(**options), make_input(4), labels)


def types_of_labels() -> Iterator[tuple[torch.dtype, int]]:
    """Types of labels, each with an index to ignore that it has, and ones that are this plus or minus its range."""
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32):
        span = 2 if dtype == torch.bool else 1 << torch.iinfo(dtype).bits
        yield from ((dtype, ignored) for ignored in (1, 1 - span, 1 + span))
    yield from ((torch.uint64, ignored) for ignored in (1, -1))
    yield torch.bfloat16, 257  # Which it rounds to 256.


@pytest.mark.parametrize(
    "loss",
    [
        partial(CEDiceLoss),
        partial(DiceLoss, softmax=True, to_onehot_y=True),
        partial(DiceLoss, to_onehot_y=True, other_act=torch.sigmoid),
        partial(BCEDiceLoss),
    ],
    ids=["CEDice", "Dice", "Dice of probabilities", "BCEDice"],
)
def test_an_ignored_label_is_itself_in_every_type(loss: Any) -> None:
    """And not what is left of it in the labels' type: as with labels in int64."""
    for dtype, ignored in types_of_labels():
        labels, channels = make_labels(2), 1 if loss.func is BCEDiceLoss else 2
        if dtype == torch.bfloat16 and loss.func is not BCEDiceLoss:
            channels, labels = 257, labels * 256
        values = [loss(ignore_index=ignored)(make_input(channels), t) for t in (labels.to(dtype), labels)]
        assert torch.equal(*values), (dtype, ignored)
        assert torch.equal(values[1], loss()(make_input(channels), labels)) is (ignored != 1), (dtype, ignored)


@pytest.mark.parametrize("ignore_index", [1, -1])
def test_dice_ignores_pixels_of_a_one_hot_target_as_monai_does(ignore_index: int) -> None:
    one_hot = F.one_hot(make_labels(4)[:, 0], 4).movedim(-1, 1).double()
    one_hot[:, :, :2] = 0  # no class at all: what a negative index stands for
    options: dict[str, Any] = {"softmax": True, "ignore_index": ignore_index}
    assert_same_loss(DiceLoss(**options), monai.losses.DiceLoss(**options), make_input(4), one_hot)


@pytest.mark.parametrize("spatial", [(11,), (4, 3, 5)])
def test_losses_take_any_number_of_spatial_dimensions(spatial: tuple[int, ...]) -> None:
    input, target = make_input(2, spatial=spatial), make_target(2, soft=False, spatial=spatial)
    for batch in (False, True):
        ours, monais = (cls(reduction="none", batch=batch) for cls in (DiceLoss, monai.losses.DiceLoss))
        assert_same_loss(ours, monais, input, target)
    labels = make_labels(2, spatial=spatial)
    assert_same_loss(CEDiceLoss(), monai.losses.DiceCELoss(softmax=True, to_onehot_y=True), input, labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_summed_in_fp32(dtype: torch.dtype) -> None:
    logits = torch.full((1, 1, 512, 512), 4.0, dtype=dtype, requires_grad=True)
    ones = torch.ones(1, 1, 512, 512, dtype=dtype)
    assert ones.sum() == 262144 if dtype == torch.bfloat16 else ones.sum().isinf()  # fp16 does overflow here
    loss = DiceLoss(sigmoid=True)(logits, ones)
    p = torch.tensor(4.0, dtype=torch.float64).sigmoid()
    torch.testing.assert_close(loss.double(), 1 - 2 * p / (p + 1), rtol=1e-4, atol=0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("fill", [-100.0, 0.0, 100.0])
@pytest.mark.parametrize("loss", [DiceLoss(sigmoid=True), DiceLoss(sigmoid=True, jaccard=True), BCEDiceLoss()])
def test_empty_masks_stay_finite(loss: torch.nn.Module, fill: float) -> None:
    logits = torch.full((2, 1, 8, 8), fill, requires_grad=True)
    value = loss(logits, torch.zeros(2, 1, 8, 8))
    value.backward()
    assert value.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_an_empty_mask_found_empty_costs_nothing() -> None:
    assert DiceLoss()(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)) == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"squared_pred": True, "batch": True}, {"jaccard": True}])
def test_bce_dice_equals_monai_on_one_channel(options: dict[str, bool], reduction: str) -> None:
    ours = BCEDiceLoss(dice_weight=0.7, bce_weight=1.3, pos_weight=2.5, reduction=reduction, **options)
    monais = monai.losses.DiceCELoss(
        sigmoid=True, lambda_dice=0.7, lambda_ce=1.3, weight=torch.tensor([2.5]), reduction=reduction, **options
    )
    assert_same_loss(ours, monais, make_input(1), make_target(1, soft=False))


def test_bce_dice_is_the_sum_of_its_terms_for_channels_of_their_own_and_soft_targets() -> None:
    input, target = make_input(3), make_target(3, soft=True)
    pos_weight = [1.0, 2.0, 4.0]
    ours = BCEDiceLoss(dice_weight=2.0, bce_weight=0.5, pos_weight=pos_weight, soft_label=True)(input, target)
    dice = monai.losses.DiceLoss(sigmoid=True, soft_label=True)(input, target)
    bce = F.binary_cross_entropy_with_logits(
        input, target, pos_weight=torch.tensor(pos_weight, dtype=torch.float64).reshape(3, 1, 1)
    )
    torch.testing.assert_close(ours, 2.0 * dice + 0.5 * bce, **TOLERANCE)


def test_bce_dice_leaves_ignored_pixels_out_of_both_terms() -> None:
    input, target = make_input(1), make_target(1, soft=False)
    kept = BCEDiceLoss()(input[:, :, :4], target[:, :, :4])
    target[:, :, 4:] = 255
    torch.testing.assert_close(BCEDiceLoss(ignore_index=255)(input, target), kept, **TOLERANCE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "options", [{}, {"include_background": False}, {"jaccard": True, "batch": True}, {"squared_pred": True}]
)
@pytest.mark.parametrize("weight", [None, [0.5, 2.0, 1.0, 3.0]])
def test_ce_dice_equals_monai(weight: list[float] | None, options: dict[str, bool], reduction: str) -> None:
    shared = {"lambda_dice": 0.7, "lambda_ce": 1.3, "reduction": reduction, **options}
    tensor = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    input, labels, soft = make_input(4), make_labels(4), make_input(4, seed=5).softmax(1)
    ours = CEDiceLoss(weight=weight, **shared)
    assert_same_loss(ours, monai.losses.DiceCELoss(softmax=True, weight=tensor, **shared), input, soft)
    if "squared_pred" not in options:  # MONAI squares the fp32 root of the truth's sum there, good to 1e-7 only
        monais = monai.losses.DiceCELoss(softmax=True, to_onehot_y=True, weight=tensor, **shared)
        assert_same_loss(ours, monais, input, labels)
    torch.testing.assert_close(ours(input, labels[:, 0]), ours(input, labels), rtol=0, atol=0)


@pytest.mark.parametrize("weight", [None, [0.5, 2.0, 1.0, 3.0]])
@pytest.mark.parametrize("ignore_index", [-100, 255])
def test_ce_dice_leaves_ignored_pixels_out_of_both_terms(ignore_index: int, weight: list[float] | None) -> None:
    input, labels = make_input(4), make_labels(4)
    kept = CEDiceLoss(weight=weight)(input[:, :, :4], labels[:, :, :4])
    labels[:, :, 4:] = ignore_index
    torch.testing.assert_close(CEDiceLoss(weight=weight, ignore_index=ignore_index)(input, labels), kept, **TOLERANCE)
    assert CEDiceLoss(ignore_index=ignore_index)(input, torch.full_like(labels, ignore_index)) == 0


@pytest.mark.parametrize("loss", [BCEDiceLoss(), CEDiceLoss()])
def test_combined_losses_of_half_inputs_are_fp32(loss: torch.nn.Module) -> None:
    input = make_input(2)
    target = F.one_hot(make_labels(2)[:, 0], 2).movedim(-1, 1)
    value = loss(input.half(), target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), loss(input, target), rtol=1e-3, atol=0)


@pytest.mark.parametrize("loss", [DiceLoss(), BCEDiceLoss(), CEDiceLoss()])
def test_shapes_that_differ_are_named(loss: torch.nn.Module) -> None:
    with pytest.raises(ShapeError, match=r"expected shape \(2, 3, 8, 8\).*got \(2, 3, 8, 7\)"):
        loss(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 7))
    with pytest.raises(ShapeError, match=r"expected.*got shape \(8, 8\)"):
        loss(torch.zeros(2, 3, 8, 8), torch.zeros(8, 8))
    with pytest.raises(ShapeError, match=r"\[N, C, \*spatial\], got \(3, 8\)"):
        loss(torch.zeros(3, 8), torch.zeros(3, 8))
    with pytest.raises(DtypeError, match=r"torch\.int64"):
        loss(torch.zeros(2, 3, 8, 8, dtype=torch.int64), torch.zeros(2, 3, 8, 8))


def test_options_that_contradict_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most one"):
        DiceLoss(sigmoid=True, softmax=True)
    with pytest.raises(ConfigError, match="expected one of mean, sum, none, got 'max'"):
        DiceLoss(reduction="max")
    with pytest.raises(ConfigError, match="expected one of mean, sum, got 'none'"):
        CEDiceLoss(reduction="none")
    with pytest.raises(ConfigError, match=r"weight: .*>= 0.*got \[1.0, -1.0\]"):
        DiceLoss(weight=[1.0, -1.0])
    with pytest.raises(ConfigError, match=r"expected 3 values.*got 2"):
        DiceLoss(weight=[1.0, 1.0])(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ConfigError, match="one value per class"):
        CEDiceLoss(weight=0.5)
    with pytest.raises(ConfigError, match="class indices"):
        CEDiceLoss(ignore_index=1)(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ShapeError, match=r"at least 2 channels.*got 1"):
        CEDiceLoss()(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))
    with pytest.raises(ConfigError, match=r"pos_weight: expected 2 values.*got 3"):
        BCEDiceLoss(pos_weight=[1.0, 2.0, 3.0])(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))
    with pytest.raises(TypeError, match="callable, got str"):
        DiceLoss(other_act="relu")


@pytest.mark.parametrize("option", ["softmax", "to_onehot_y"])
def test_options_without_meaning_for_one_channel_warn(option: str) -> None:
    input, target = torch.rand(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    with pytest.warns(UserWarning, match=f"{option}=True has no meaning"):
        value = DiceLoss(**{option: True})(input, target)
    assert value == DiceLoss()(input, target)


def test_a_class_without_probability_costs_nothing_where_it_is_not_the_label() -> None:
    input, labels = make_input(4), make_labels(3)
    input[:, 3] = -torch.inf
    input.requires_grad_()
    loss = CEDiceLoss(lambda_dice=0.0)(input, labels)
    torch.testing.assert_close(loss, F.cross_entropy(input, labels[:, 0]), **TOLERANCE)
    (gradient,) = torch.autograd.grad(loss, input)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", [BCEDiceLoss(), CEDiceLoss(), DiceLoss(sigmoid=True)], ids=lambda m: type(m).__name__)
def test_no_images_have_no_mean(loss: torch.nn.Module) -> None:
    input = torch.zeros(0, 2, 4, 4, requires_grad=True)
    value = loss(input, torch.zeros(0, 2, 4, 4))
    value.backward()
    assert value.isnan()
    assert input.grad is not None
    assert input.grad.shape == input.shape
