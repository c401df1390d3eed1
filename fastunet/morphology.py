"""Connected components and distances of label images, where these are: by CuPy on a GPU that has it, else by SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastunet.checks import ConfigError, ShapeError

EIGHT = np.ones((3, 3), bool)  # pixels that touch by a corner belong together, as skimage.measure.label has it
FAR = 6  # standard deviations beyond which a Gaussian is below 2e-8


def connected_components(mask: Tensor) -> tuple[Tensor, int]:
    """Number the connected parts (8 neighbours) of a mask [H, W], any dtype: int32 [H, W] with 0 outside, and how many.

    Equals `skimage.measure.label`. Raises ShapeError on other dimensions.
    """
    if mask.dim() != 2:
        raise ShapeError(f"connected_components: expected [H, W], got {list(mask.shape)}")
    _, ndimage, to_array, to_tensor = _arrays(mask.device)
    numbers, count = ndimage.label(to_array(mask != 0), structure=EIGHT)
    return to_tensor(numbers).to(torch.int32), int(count)


def border_weights(labels: Tensor, *, strength: float = 10.0, sigma: float = 5.0) -> Tensor:
    """Weigh the background between close objects: float32 [N, H, W] for labels [N, H, W], 0 being background.

    strength * exp(-(d1 + d2)^2 / (2 sigma^2)) with the distances in pixels to the nearest and the second nearest
    object, as equation 2 of Ronneberger et al. 2015 (arXiv:1505.04597) adds it to the weight of the class; 0 on
    objects. An object is a connected part (8 neighbours) of one label.

    Raises:
        ShapeError: other dimensions.
        ConfigError: a sigma that is not positive, or a negative strength.
    """
    if labels.dim() != 3:
        raise ShapeError(f"border_weights: expected labels [N, H, W], got {list(labels.shape)}")
    if not (sigma > 0 and strength >= 0):
        raise ConfigError(f"border_weights: expected sigma > 0 and strength >= 0, got {sigma} and {strength}")
    reach = math.ceil(FAR * sigma)
    distances = torch.stack([_two_nearest(image, reach) for image in labels])
    weights = strength * torch.exp(-distances.square() / (2 * sigma**2))
    return torch.where(labels == 0, weights, 0).float()


def _two_nearest(labels: Tensor, reach: int) -> Tensor:
    """Add up the distances of each pixel [H, W] to the two nearest objects, infinite where one is beyond `reach`."""
    from scipy.ndimage import find_objects

    xp, ndimage, to_array, to_tensor = _arrays(labels.device)
    array = to_array(labels)
    nearest, second = xp.full(array.shape, math.inf), xp.full(array.shape, math.inf)
    for label in labels.unique().tolist():
        if label == 0:
            continue
        numbers, _ = ndimage.label(array == label, structure=EIGHT)
        boxes = find_objects(to_tensor(numbers).cpu().numpy())
        for number, (rows, columns) in enumerate(boxes, 1):
            window = tuple(slice(max(0, side.start - reach), side.stop + reach) for side in (rows, columns))
            distance = ndimage.distance_transform_edt(numbers[window] != number)
            second[window] = xp.minimum(second[window], xp.maximum(nearest[window], distance))
            nearest[window] = xp.minimum(nearest[window], distance)
    return to_tensor(nearest + second)


def _arrays(device: torch.device) -> tuple[Any, Any, Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Return the array library, its ndimage, and the ways from and to tensors of the device."""
    if device.type == "cuda":
        try:
            import cupy
            from cupyx.scipy import ndimage as on_gpu
        except ImportError:  # an extra: without it the work goes through the host
            pass
        else:
            return cupy, on_gpu, lambda t: cupy.from_dlpack(t.detach().contiguous()), torch.from_dlpack
    from scipy import ndimage

    return np, ndimage, lambda t: t.detach().cpu().numpy(), lambda a: torch.from_numpy(a).to(device)
