"""A run as a training leaves it, of a net that was not trained but has every class somewhere."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastunet
from fastunet.data import DataSummary, normalize
from fastunet.files import write_json
from fastunet.pretrained import CONFIG, WEIGHTS, write_weights
from fastunet.train.checkpoint import RunConfig


def smooth_image(height: int = 300, width: int = 421) -> np.ndarray:
    """Noise, smooth enough that objects are more than pixels: uint8 [H, W]."""
    noise = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(3))
    smooth = torch.nn.functional.avg_pool2d(noise, 9, 1, 4)[0, 0]
    return ((smooth - smooth.min()) / (smooth.max() - smooth.min()) * 255).byte().numpy()


def untrained_run(folder: Path, classes: int = 1, channels: int = 1, dtype: str = "uint8", **model: Any) -> Path:
    torch.manual_seed(1)
    net = fastunet.UNet(channels, classes, features=(2, 4), **{"activation": "leaky_relu"} | model).eval()
    torch.nn.init.normal_(net.outc.conv.weight, std=1.0 if model.get("norm") == "instance" else 4.0)
    with torch.no_grad():
        logits = net(normalize(smooth_image()[..., None].repeat(channels, 2))[None])
        net.outc.conv.bias.sub_(logits.flatten(2).median(2).values[0])
    folder.mkdir()
    data = DataSummary(1, channels, classes, (0, 1), dtype, (16, 16), (16, 16))
    write_json(folder / CONFIG, asdict(RunConfig(model=net.config, data=data, training={})))
    write_weights(folder / WEIGHTS, net.state_dict())
    return folder
