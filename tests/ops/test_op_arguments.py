"""What an op cannot take is one error, with expected and actual, before any work."""

from __future__ import annotations

import inspect

import pytest
import torch

from fastunet import checks, ops

GOOD = {"x": torch.zeros(1, 2, 4, 4), "weight": torch.zeros(3, 2, 3, 3), "bias": torch.zeros(3)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 4, 4)}, checks.ShapeError, r"x: expected a 4-D tensor .* got \[2, 4, 4\]"),
        ({"x": torch.zeros(1, 2, 4, 4, dtype=torch.int32)}, checks.DtypeError, "floating-point.*int32"),
        ({"weight": torch.zeros(3, 5, 3, 3)}, checks.ShapeError, r"\[3, 2, 3, 3\], got \[3, 5, 3, 3\]"),
        ({"weight": torch.zeros(3, 2, 5, 5)}, checks.ShapeError, r"\[3, 2, 3, 3\], got \[3, 2, 5, 5\]"),
        ({"weight": torch.zeros(3, 2)}, checks.ShapeError, r"4-D tensor, got \[3, 2\]"),
        ({"weight": torch.zeros(3, 2, 3, 3).half()}, checks.DtypeError, "weight: expected dtype torch.float32"),
        ({"weight": torch.zeros(3, 2, 3, 3, device="meta")}, checks.DeviceError, "expected device cpu .* got meta"),
        ({"bias": torch.zeros(4)}, checks.ShapeError, r"bias: expected shape \[3\], got \[4\]"),
        ({"bias": torch.zeros(3).double()}, checks.DtypeError, "bias: expected dtype torch.float32"),
        ({"stride": 3}, checks.ConfigError, "stride: expected 1 or 2, got 3"),
        ({"negative_slope": -0.1}, checks.ConfigError, r"negative_slope: expected .* got -0.1"),
    ],
)
def test_bad_arguments_raise_before_any_work(change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ops.conv3x3_bias_relu(**{**GOOD, **change})


@pytest.mark.parametrize("norm", ["bias", "batch_norm", "instance_norm"])
def test_ops_made_of_another_show_its_arguments(norm: str) -> None:
    plain, pooled, concatenated = (
        inspect.signature(getattr(ops, name.format(norm)))
        for name in ("conv3x3_{}_relu", "conv3x3_{}_relu_pool", "concat_conv3x3_{}_relu")
    )
    assert [*pooled.parameters.values()] == [*plain.parameters.values()]
    assert [*concatenated.parameters] == ["skip", "up", *[*plain.parameters][1:]]
    assert (plain.return_annotation, pooled.return_annotation) == ("Tensor", "tuple[Tensor, Tensor]")


def test_more_bad_arguments() -> None:
    x, w, p = torch.zeros(1, 2, 4, 4), torch.zeros(3, 2, 3, 3), torch.zeros(3)
    with pytest.raises(checks.ShapeError, match="height and width >= 2 for 2x2 pooling, got 1x4"):
        ops.conv3x3_bias_relu_pool(x[:, :, :1], w)
    with pytest.raises(checks.ShapeError, match=r"up: expected shape \[1, 1, 4, 4\], got \[1, 1, 2, 4\]"):
        ops.concat_conv3x3_bias_relu(x, torch.zeros(1, 1, 2, 4), torch.zeros(3, 3, 3, 3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.conv3x3_batch_norm_relu(x[:, :, :1, :1], w, p, p, p, p, training=True)
    # By stride 2 what counts is the output.
    with pytest.raises(checks.ShapeError, match="height and width >= 2 for 2x2 pooling, got 1x2"):
        ops.conv3x3_bias_relu_pool(x[:, :, :2], w, stride=2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.conv3x3_batch_norm_relu(x[:, :, :2, :2], w, p, p, p, p, training=True, stride=2)
    with pytest.raises(ValueError, match="more than 1 pixel"):
        ops.conv3x3_instance_norm_relu(x[:, :, :2, :1], w, stride=2)
    with pytest.raises(checks.ConfigError, match="running_mean and running_var when not training"):
        ops.conv3x3_batch_norm_relu(x, w, p, p, None, None, training=False)
    with pytest.raises(checks.ConfigError, match="both gamma and beta"):
        ops.conv3x3_instance_norm_relu(x, w, p)
    with pytest.raises(ValueError, match="more than 1 pixel"):
        ops.conv3x3_instance_norm_relu(x[:, :, :1, :1], w)
    with pytest.raises(checks.ShapeError, match=r"weight: expected shape \[2, 3, 2, 2\]"):
        ops.conv_transpose2x2(x, torch.zeros(4, 3, 2, 2))
    with pytest.raises(checks.ConfigError, match="activation: expected None, 'sigmoid' or 'softmax', got 'tanh'"):
        ops.conv1x1(x, torch.zeros(3, 2, 1, 1), activation="tanh")
    with pytest.raises(checks.ShapeError, match="target: expected shape"):
        ops.sigmoid_dice_loss(x, x[:, :1])
    with pytest.raises(checks.ShapeError, match=r"target: expected shape \[1, 2, 4, 4\], got \[1, 1, 4, 3\]"):
        ops.segmentation_sums(x, x[:, :1, :, 1:])
    with pytest.raises(checks.ShapeError, match=r"mask: expected shape \[1, 1, 4, 4\], got \[1, 2, 4, 4\]"):
        ops.segmentation_sums(x, x, x)
    with pytest.raises(checks.ConfigError, match="activation: expected one of sigmoid, softmax, got 'tanh'"):
        ops.segmentation_sums(x, x, activation="tanh")
    with pytest.raises(checks.DeviceError, match=r"mask: expected device cpu .* got meta"):
        ops.segmentation_sums(x, x, x[:, :1].to("meta"))
    with pytest.raises(RuntimeError, match="index 2 is out of bounds"):
        ops.segmentation_sums(x, torch.full((1, 1, 4, 4), 2), activation="softmax")
