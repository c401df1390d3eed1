"""The public ops. Each equals, in meaning to the bit, the torch composition its docstring names."""

from fastunet.ops.conv1x1 import conv1x1
from fastunet.ops.conv3x3 import (
    concat_conv3x3_batch_norm_relu,
    concat_conv3x3_bias_relu,
    concat_conv3x3_instance_norm_relu,
    conv3x3_batch_norm_relu,
    conv3x3_batch_norm_relu_pool,
    conv3x3_bias_relu,
    conv3x3_bias_relu_pool,
    conv3x3_instance_norm_relu,
    conv3x3_instance_norm_relu_pool,
    double_conv3x3_bias_relu,
)
from fastunet.ops.conv3x3_relu_conv1x1 import conv3x3_relu_conv1x1
from fastunet.ops.conv_transpose2x2 import conv_transpose2x2
from fastunet.ops.conv_transpose2x2_concat_conv3x3_relu import conv_transpose2x2_concat_conv3x3_relu
from fastunet.ops.flops import register_formulas
from fastunet.ops.max_pool2x2 import max_pool2x2
from fastunet.ops.registration import registered
from fastunet.ops.segmentation_sums import segmentation_sums
from fastunet.ops.sigmoid_dice_loss import sigmoid_dice_loss

__all__ = [
    "concat_conv3x3_batch_norm_relu",
    "concat_conv3x3_bias_relu",
    "concat_conv3x3_instance_norm_relu",
    "conv1x1",
    "conv3x3_batch_norm_relu",
    "conv3x3_batch_norm_relu_pool",
    "conv3x3_bias_relu",
    "conv3x3_bias_relu_pool",
    "conv3x3_instance_norm_relu",
    "conv3x3_instance_norm_relu_pool",
    "conv3x3_relu_conv1x1",
    "conv_transpose2x2",
    "conv_transpose2x2_concat_conv3x3_relu",
    "double_conv3x3_bias_relu",
    "max_pool2x2",
    "segmentation_sums",
    "sigmoid_dice_loss",
]

register_formulas(registered())
