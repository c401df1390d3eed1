"""The oracle: every op and the U-Net in plain PyTorch, in any float dtype. What the rest of fastunet computes is
defined here.
"""

from fastunet.reference import functional
from fastunet.reference.unet import DoubleConv, Down, OutConv, ReferenceUNet, Up

__all__ = ["DoubleConv", "Down", "OutConv", "ReferenceUNet", "Up", "functional"]
