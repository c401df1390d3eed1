"""A small net for inference on the device of kernel tests."""

from __future__ import annotations

from typing import Any

import torch
from kernel_device import DEVICE
from torch import nn

import fastunet


def net(**options: Any) -> fastunet.UNet:
    """Always the same weights, and statistics as if it had been trained."""
    torch.manual_seed(0)
    model = fastunet.UNet(2, 3, features=(4, 8), **options).to(DEVICE).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.bias, 0, 0.5)
    return model
