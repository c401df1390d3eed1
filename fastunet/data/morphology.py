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


def connected_components(labels: Tensor) -> tuple[Tensor, int]:
    """Number the connected parts (8 neighbours) of each label but 0 in [H, W]: int32 [H, W] from 1, and how many.

    The parts are those of `skimage.measure.label`. Raises ShapeError on other dimensions.
    """
    if labels.dim() != 2:
        raise ShapeError(f"connected_components: expected [H, W], got {list(labels.shape)}")
    xp, ndimage, to_array, to_tensor = _arrays(labels.device)
    array = to_array(labels)
    numbers, total = xp.zeros(array.shape, "int32"), 0
    for label in labels.unique().tolist():
        if label == 0:
            continue
        parts, count = ndimage.label(array == label, structure=xp.asarray(EIGHT))
        numbers = xp.where(parts > 0, parts + total, numbers)
        total += int(count)
    return to_tensor(numbers).to(torch.int32), total


def split_objects(labels: Tensor) -> tuple[Tensor, int]:
    """Number objects as `connected_components`, and cut those that touch, by watershed of the distance to their edge.

    Two parts are two where the neck between them is narrower by a pixel. Beucher and Lantuejoul 1979; scikit-image's
    `h_maxima` and `watershed`, on the CPU.
    """
    from scipy import ndimage
    from skimage.morphology import h_maxima
    from skimage.segmentation import watershed

    components = connected_components(labels)[0].cpu().numpy()
    padded = np.pad(components, 1)  # what lies beyond the image is background
    depth = np.zeros(padded.shape)
    for number, box in enumerate(ndimage.find_objects(padded), 1):
        window = tuple(slice(side.start - 1, side.stop + 1) for side in box)
        depth[window] += ndimage.distance_transform_edt(padded[window] == number)
    depth = depth[1:-1, 1:-1]
    classes = labels.cpu().numpy()
    objects, total = np.zeros(components.shape, np.int32), 0
    for label in np.unique(classes[classes != 0]):  # each by itself, so that none grows into another
        own = classes == label
        markers, count = ndimage.label(h_maxima(np.where(own, depth, 0), 1.0), EIGHT)
        # One that is too thin to stand out by so much is one object.
        missing = np.setdiff1d(components[own], components[markers > 0])
        for number, peak in enumerate(ndimage.maximum_position(depth, components, missing), count + 1):
            markers[peak] = number
        count += len(missing)
        cut = watershed(-depth, markers, connectivity=2, mask=own)
        objects += np.where(cut > 0, cut + total, 0).astype(np.int32)
        total += count
    return torch.from_numpy(objects).to(labels.device), total


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
    components, _ = connected_components(labels)
    numbers = to_array(components)
    nearest, second = xp.full(numbers.shape, math.inf), xp.full(numbers.shape, math.inf)
    for number, box in enumerate(find_objects(components.cpu().numpy()), 1):
        window = tuple(slice(max(0, side.start - reach), side.stop + reach) for side in box)
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
