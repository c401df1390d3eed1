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


X, W, P, LOW, UP_WEIGHT = (torch.zeros(s) for s in ((1, 2, 4, 4), (3, 2, 3, 3), (3,), (1, 5, 2, 2), (5, 1, 2, 2)))
W_CAT, HEAD = torch.zeros(3, 3, 3, 3), torch.zeros(2, 3, 1, 1)
STATISTICS = (P, P, P, P)


@pytest.mark.parametrize(
    ("op", "arguments", "options", "error", "message"),
    [
        ("conv3x3_bias_relu_pool", (X[:, :, :1], W), {}, checks.ShapeError, "2 for 2x2 pooling, got 1x4"),
        (
            "concat_conv3x3_bias_relu",
            (X, LOW[:, :1], W_CAT),
            {},
            checks.ShapeError,
            r"up: expected shape \[1, 1, 4, 4\]",
        ),
        (
            "conv3x3_batch_norm_relu",
            (X[:, :, :1, :1], W, *STATISTICS),
            {"training": True},
            ValueError,
            "than 1 value per",
        ),
        # By stride 2 what counts is the output.
        ("conv3x3_bias_relu_pool", (X[:, :, :2], W), {"stride": 2}, checks.ShapeError, "2 for 2x2 pooling, got 1x2"),
        (
            *("conv3x3_batch_norm_relu", (X[:, :, :2, :2], W, *STATISTICS), {"training": True, "stride": 2}),
            *(ValueError, "more than 1 value per channel"),
        ),
        ("conv3x3_instance_norm_relu", (X[:, :, :2, :1], W), {"stride": 2}, ValueError, "more than 1 pixel"),
        ("conv3x3_instance_norm_relu", (X[:, :, :1, :1], W), {}, ValueError, "more than 1 pixel"),
        (
            "conv3x3_batch_norm_relu",
            (X, W, P, P, None, None),
            {"training": False},
            checks.ConfigError,
            "when not training",
        ),
        ("conv3x3_instance_norm_relu", (X, W, P), {}, checks.ConfigError, "both gamma and beta"),
        ("conv_transpose2x2", (X, UP_WEIGHT), {}, checks.ShapeError, r"weight: expected shape \[2, 1, 2, 2\]"),
        ("conv1x1", (X, HEAD), {"activation": "tanh"}, checks.ConfigError, "None, 'sigmoid' or 'softmax', got 'tanh'"),
        ("sigmoid_dice_loss", (X, X[:, :1]), {}, checks.ShapeError, "target: expected shape"),
        ("segmentation_sums", (X, X[:, :1, :, 1:]), {}, checks.ShapeError, r"\[1, 2, 4, 4\], got \[1, 1, 4, 3\]"),
        ("segmentation_sums", (X, X, X), {}, checks.ShapeError, r"mask: .* \[1, 1, 4, 4\], got \[1, 2, 4, 4\]"),
        (
            "segmentation_sums",
            (X, X),
            {"activation": "tanh"},
            checks.ConfigError,
            "one of sigmoid, softmax, got 'tanh'",
        ),
        (
            "segmentation_sums",
            (X, X, X[:, :1].to("meta")),
            {},
            checks.DeviceError,
            "mask: expected device cpu .* got meta",
        ),
        (
            *("segmentation_sums", (X, torch.full((1, 1, 4, 4), 2)), {"activation": "softmax"}),
            *(RuntimeError, "index 2 is out of bounds"),
        ),
        ("conv3x3_relu_conv1x1", (X, W, None, HEAD[:, :2]), {}, checks.ShapeError, "expected shape"),
        ("conv3x3_relu_conv1x1", (X, W, None, HEAD.double()), {}, checks.DtypeError, "head_weight"),
        *(
            ("conv_transpose2x2_concat_conv3x3_relu", (*images, UP_WEIGHT, None, W_CAT), {}, error, message)
            for images, error, message in (
                ((X, LOW[..., :1]), checks.ShapeError, "low: expected shape"),
                ((X[..., :1], LOW[..., :0]), checks.ShapeError, "at least 2x2 pixels"),
                ((X, LOW.double()), checks.DtypeError, "low"),
            )
        ),
        (
            *("conv_transpose2x2_concat_conv3x3_relu", (X, LOW, None, UP_WEIGHT[0, :, 0, 0], W_CAT), {}),
            *(checks.ConfigError, "up_bias: expected None without up_weight"),
        ),
    ],
)
def test_more_bad_arguments(op: str, arguments: tuple, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(ops, op)(*arguments, **options)
