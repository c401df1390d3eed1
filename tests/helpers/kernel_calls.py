"""Every kernel's launcher as a function of images, for what is to hold of all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fastunet.kernels import conv1x1, conv_transpose2x2, max_pool2x2, norm, norm_grad, segmentation_loss
from fastunet.kernels.conv3x3 import grad, pointer
from fastunet.kernels.epilogue import Head
from kernel_device import DEVICE
from torch import Tensor

from fastunet.testing import random_input

CHANNELS, SIDE = 16, 32


def image(n: int = 1, side: int = SIDE, seed: int = 0) -> Tensor:
    return random_input((n, CHANNELS, side, side), dtype=torch.float16, seed=seed, device=DEVICE)


def pooled(n: int = 1, side: int = SIDE) -> Tensor:
    return image(n, side // 2, seed=2)


def target(n: int = 1, side: int = SIDE) -> Tensor:
    return image(n, side, seed=1).sigmoid()


def weight(size: int = 3) -> Tensor:
    return random_input((CHANNELS, CHANNELS, size, size), dtype=torch.float16, seed=9, device=DEVICE)


def parameters() -> norm.Affine:
    shapes = (1, CHANNELS), (1, CHANNELS), (CHANNELS,), (CHANNELS,)
    return norm.Affine(*(random_input(shape, seed=i, device=DEVICE) for i, shape in enumerate(shapes)))


def outputs(result: Any) -> list[Tensor]:
    """The images among what a call has given."""
    return [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor) and t.dim() == 4]


def loss_grad(x: Tensor, t: Tensor) -> Tensor:
    sums = torch.ones(3, len(x), CHANNELS, device=DEVICE)
    return segmentation_loss.segmentation_sums_grad(sums, x, t, None, softmax=True, squared=False)


other = partial(image, seed=1)
# Each gives images from images: (call, what makes the images it takes).
CALLS: dict[str, tuple[Callable[..., Any], tuple[Callable[..., Tensor], ...]]] = {
    "conv3x3": (lambda x: pointer.conv3x3(x, weight(), pool=True, negative_slope=0.0), (image,)),
    "two_inputs": (lambda x, up: pointer.conv3x3(x, torch.cat([weight()] * 2, 1), up=up), (image, other)),
    "head": (lambda x: pointer.conv3x3_head(x, weight(), None, Head(weight(1)[:2], None, True)), (image,)),
    "input_grad": (lambda g, x: grad.conv3x3_input_grads(g, weight(), [CHANNELS], x=x)[0], (image, other)),
    "strided": (lambda x: pointer.conv3x3(x, weight(), stride=2), (image,)),
    "strided_input_grad": (
        lambda g: grad.conv3x3_input_grads(g, weight(), [CHANNELS], stride=2, size=[2 * s for s in g.shape[2:]])[0],
        (pooled,),
    ),
    "activation_grad": (lambda y, p: norm_grad.activation_grad(y, y, p, 0.0), (image, pooled)),
    "max_pool": (lambda x: max_pool2x2.max_pool2x2(x), (image,)),
    "conv1x1": (lambda x: conv1x1.conv1x1(x, weight(1), activation="softmax"), (image,)),
    "conv1x1_input_grad": (
        lambda g, y: conv1x1.conv1x1_input_grad(g, weight(1), y, activation="softmax"),
        (image, other),
    ),
    "transpose": (lambda x: conv_transpose2x2.conv_transpose2x2(x, weight(2)), (image,)),
    "transpose_input_grad": (lambda g: conv_transpose2x2.conv_transpose2x2_input_grad(g, weight(2)), (image,)),
    "normalise": (lambda x: norm.normalise(x, parameters(), 0.0, pool=True), (image,)),
    "norm_grad": (
        lambda x, p: norm_grad.norm_grad(x, x, p, parameters(), 0.0, statistics_given=True, needs_affine=False)[0],
        (image, pooled),
    ),
    "loss_grad": (loss_grad, (image, target)),
}
