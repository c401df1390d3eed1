"""What a parity test needs: inputs in every memory layout, random cotangents, float64 references, error budgets.

A tolerance here is never a figure that happened to pass. With u_acc the unit roundoff of the accumulation, u_in of
rounding the inputs (TF32 only), u_out of the output's dtype, K the number of terms of a sum and S the sum of their
absolute values, an element of a convolution may be off by

    E = (6 sqrt(K) u_acc + 2 u_in + u_in^2) S        before it is rounded to the output's dtype, and by
    E + u_out (|reference| + E)  (+ 2^-25 for float16, whose smallest numbers are spaced 2^-24)        after.

The first term is the random-walk growth of K rounding errors with a margin of six; a worst case would have K where
it has 6 sqrt(K). References are computed in float64 from the inputs as they are, already rounded to their dtype.
"""

from .bounds import Expected as Expected
from .bounds import pool_grad as pool_grad
from .budget import LAYOUTS as LAYOUTS
from .budget import UNIT_ROUNDOFF as UNIT_ROUNDOFF
from .budget import assert_within as assert_within
from .budget import conv_tolerance as conv_tolerance
from .budget import cpu_accumulates_in_float32 as cpu_accumulates_in_float32
from .budget import float32_precision as float32_precision
from .budget import in_layout as in_layout
from .budget import random_cotangent as random_cotangent
from .budget import random_input as random_input
from .budget import random_integers as random_integers
from .budget import stored as stored
from .convolutions import bias_grad_expected as bias_grad_expected
from .convolutions import composed_sums_expected as composed_sums_expected
from .convolutions import conv1x1_bias_grad_expected as conv1x1_bias_grad_expected
from .convolutions import conv1x1_expected as conv1x1_expected
from .convolutions import conv1x1_input_grad_expected as conv1x1_input_grad_expected
from .convolutions import conv1x1_weight_grad_expected as conv1x1_weight_grad_expected
from .convolutions import conv3x3_activation_grad_expected as conv3x3_activation_grad_expected
from .convolutions import conv3x3_expected as conv3x3_expected
from .convolutions import conv3x3_input_grad_expected as conv3x3_input_grad_expected
from .convolutions import conv3x3_weight_grad_expected as conv3x3_weight_grad_expected
from .convolutions import conv_transpose2x2_expected as conv_transpose2x2_expected
from .convolutions import conv_transpose2x2_input_grad_expected as conv_transpose2x2_input_grad_expected
from .convolutions import conv_transpose2x2_weight_grad_expected as conv_transpose2x2_weight_grad_expected
from .convolutions import e4m3_sums_expected as e4m3_sums_expected
from .losses import segmentation_sums_expected as segmentation_sums_expected
from .losses import segmentation_sums_grad_expected as segmentation_sums_grad_expected
