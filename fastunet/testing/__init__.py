"""What a parity test needs: inputs in every memory layout, random cotangents, float64 references, error budgets.

A tolerance here is never a figure that happened to pass. With u_acc the unit roundoff of the accumulation, u_in of
rounding the inputs (TF32 only), u_out of the output's dtype, K the number of terms of a sum and S the sum of their
absolute values, an element of a convolution may be off by

    E = (6 sqrt(K) u_acc + 2 u_in + u_in^2) S        before it is rounded to the output's dtype, and by
    E + u_out (|reference| + E)  (+ 2^-25 for float16, whose smallest numbers are spaced 2^-24)        after.

The first term is the random-walk growth of K rounding errors with a margin of six; a worst case would have K where
it has 6 sqrt(K). References are computed in float64 from the inputs as they are, already rounded to their dtype.
"""

from .bounds import Expected
from .budget import (
    LAYOUTS,
    UNIT_ROUNDOFF,
    assert_within,
    conv_tolerance,
    cpu_accumulates_in_float32,
    float32_precision,
    in_layout,
    random_cotangent,
    random_input,
    random_integers,
    stored,
)
from .convolutions import (
    bias_grad_expected,
    composed_sums_expected,
    conv1x1_bias_grad_expected,
    conv1x1_expected,
    conv1x1_input_grad_expected,
    conv1x1_weight_grad_expected,
    conv3x3_activation_grad_expected,
    conv3x3_expected,
    conv3x3_input_grad_expected,
    conv3x3_weight_grad_expected,
    conv_transpose2x2_expected,
    conv_transpose2x2_input_grad_expected,
    conv_transpose2x2_weight_grad_expected,
    e4m3_sums_expected,
    max_pool2x2_grad_expected,
    pooled_expected,
)
from .losses import segmentation_sums_expected, segmentation_sums_grad_expected

__all__ = [
    "LAYOUTS",
    "UNIT_ROUNDOFF",
    "Expected",
    "assert_within",
    "bias_grad_expected",
    "composed_sums_expected",
    "conv1x1_bias_grad_expected",
    "conv1x1_expected",
    "conv1x1_input_grad_expected",
    "conv1x1_weight_grad_expected",
    "conv3x3_activation_grad_expected",
    "conv3x3_expected",
    "conv3x3_input_grad_expected",
    "conv3x3_weight_grad_expected",
    "conv_tolerance",
    "conv_transpose2x2_expected",
    "conv_transpose2x2_input_grad_expected",
    "conv_transpose2x2_weight_grad_expected",
    "cpu_accumulates_in_float32",
    "e4m3_sums_expected",
    "float32_precision",
    "in_layout",
    "max_pool2x2_grad_expected",
    "pooled_expected",
    "random_cotangent",
    "random_input",
    "random_integers",
    "segmentation_sums_expected",
    "segmentation_sums_grad_expected",
    "stored",
]
