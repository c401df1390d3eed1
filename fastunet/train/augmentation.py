"""Random changes to a batch of images and labels on its own device, by kornia."""

from __future__ import annotations

import math

import kornia.augmentation as K
import torch
from kornia.geometry import create_meshgrid, remap, resize
from torch import Tensor, nn

from fastunet.checks import ConfigError, DtypeError, ShapeError

WARP_SPACING = 48  # pixels between the warp's control points
WARP_STRENGTH = 4.0  # standard deviation of a control point's shift along each axis, in pixels
BRIGHTNESS = 0.3  # largest shift, in standard deviations of the data
CONTRAST = 0.25  # largest change of the factor
NOISE = 0.15  # standard deviation, in those of the data
BLUR = (0.3, 1.2)  # range of the Gaussian's sigma in pixels
BLUR_KERNEL = 5  # pixels: 2 sigma to either side at the most
# As in nnU-Net (Isensee et al. 2021).
SCALE = (0.7, 1.4)  # range of the zoom
GAMMA = (0.7, 1.5)  # range of the exponent
UPRIGHT = 15.0  # degrees: the largest angle where orientation means something

_GEOMETRY = ("flip", "rotate", "elastic", "affine")
_LIGHTING = ("brightness", "contrast", "gamma", "noise", "blur")
# What differs from the usual chances of `Augmentation`.
LEVELS: dict[str, dict[str, float]] = {
    "none": dict.fromkeys((*_GEOMETRY, *_LIGHTING), 0.0),
    "light": dict.fromkeys(("elastic", *_LIGHTING), 0.0),
    "default": {},
    "strong": {"affine": 0.5, "gamma": 0.3},
}


def augmentation_of(level: str, *, flip: bool) -> Augmentation:
    """Return the augmentation of a level; without `flip` nothing is mirrored or turned by more than 15 degrees."""
    chances = LEVELS[level] | ({} if flip else {"flip": 0.0, "rotate": 0.0})
    return Augmentation(largest_angle=180.0 if flip else UPRIGHT, **chances)


class Augmentation(nn.Module):
    """Flip, turn, warp and re-light each image of a batch by itself; labels follow the geometry, by nearest neighbour.

    Images are expected normalised to mean 0 and standard deviation 1: nothing is clamped, and contrast stretches about
    the data's mean. All draws come from torch's global CPU generator, on every device.

    Args:
        flip: probability of a left-right flip, and by itself of an up-down flip.
        rotate: probability of turning by 90, 180 or 270 degrees; images that are not square turn by 180 only.
        elastic: probability of a smooth random warp.
        affine: probability of turning by any angle up to `largest_angle` degrees, and zooming by 0.7 to 1.4, about the
            image's centre.
        brightness, contrast: probability of a shift by up to 0.3 and of a factor within 1 +- 0.25.
        gamma: probability of raising an image, brought to 0..1, to a power of 0.7 to 1.5; its mean and standard
            deviation stay.
        noise, blur: probability of Gaussian noise of standard deviation 0.15, and of a blur of sigma 0.3 to 1.2 pixels.

    Raises:
        ConfigError: a probability outside [0, 1], or an angle outside [0, 180].
    """

    def __init__(
        self,
        *,
        flip: float = 0.5,
        rotate: float = 0.75,
        elastic: float = 0.3,
        affine: float = 0.0,
        brightness: float = 0.3,
        contrast: float = 0.3,
        gamma: float = 0.0,
        noise: float = 0.1,
        blur: float = 0.1,
        largest_angle: float = 180.0,
    ) -> None:
        super().__init__()
        chances = {"flip": flip, "rotate": rotate, "elastic": elastic, "affine": affine, "gamma": gamma}
        chances |= {"brightness": brightness, "contrast": contrast, "noise": noise, "blur": blur}
        for name, chance in chances.items():
            if not 0 <= chance <= 1:
                raise ConfigError(f"{name}: expected a probability from 0 to 1, got {chance}")
        if not 0 <= largest_angle <= 180:
            raise ConfigError(f"largest_angle: expected 0 to 180 degrees, got {largest_angle}")
        self.rotate = rotate
        self.elastic = elastic
        self.affine = affine
        self.gamma = gamma
        self.largest_angle = largest_angle
        flips = (K.RandomHorizontalFlip(p=flip), K.RandomVerticalFlip(p=flip))
        self.flips = K.AugmentationSequential(*flips, data_keys=["input", "mask"]) if flip else None
        lighting = (
            (contrast, K.RandomContrast((1 - CONTRAST, 1 + CONTRAST), clip_output=False, p=contrast)),
            (brightness, K.RandomBrightness((1 - BRIGHTNESS, 1 + BRIGHTNESS), clip_output=False, p=brightness)),
            (blur, K.RandomGaussianBlur(BLUR_KERNEL, BLUR, p=blur)),
            (noise, K.RandomGaussianNoise(std=NOISE, p=noise)),
        )
        # One that never happens would still cost its call.
        self.lighting = nn.Sequential(*(step for chance, step in lighting if chance))

    @torch.no_grad()
    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Change a batch: images [B, C, H, W] and labels [B, H, W] give the same shapes and dtypes.

        The images are of any float dtype; those of 16 bits are computed in float32. Labels are integers up to 2**24.

        Raises:
            ShapeError: the labels do not lie over the images.
            DtypeError: the images are not floating point.
        """
        if not images.is_floating_point():
            raise DtypeError(f"images: expected a floating-point dtype, got {images.dtype}")
        expected = (len(images), *images.shape[-2:])
        if images.dim() != 4 or labels.shape != expected:
            raise ShapeError(
                f"labels: expected shape {expected} for images {tuple(images.shape)}, got {tuple(labels.shape)}"
            )
        dtype = images.dtype
        images = images.to(torch.promote_types(dtype, torch.float32))
        mask = labels.unsqueeze(1).to(images.dtype)  # exact up to 2**24
        if self.flips is not None:
            images, mask = self.flips(images, mask)
        if self.rotate:
            images, mask = self._turn(images, mask)
        images, mask = self._warp(images, mask)
        images = self._bend(images) if self.gamma else images
        return self.lighting(images).to(dtype), mask.squeeze(1).to(labels.dtype)

    def _turn(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Turn by quarters: exact, where kornia's RandomRotation90 interpolates."""
        count = len(images)
        turned = torch.rand(count, dtype=torch.float32) < self.rotate
        square = images.shape[-1] == images.shape[-2]
        quarters = torch.randint(1, 4, (count,)) if square else torch.full((count,), 2)
        chosen = torch.where(turned, quarters, 0).tolist()

        def turn(batch: Tensor) -> Tensor:
            return torch.stack([item.rot90(times, (1, 2)) for item, times in zip(batch, chosen, strict=True)])

        return turn(images), turn(mask)

    def _warp(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Turn and zoom images, and shift pixels by a smooth field: both by one interpolation."""
        count = len(images)
        warped = torch.rand(count, dtype=torch.float32) < self.elastic
        turned = torch.rand(count, dtype=torch.float32) < self.affine if self.affine else torch.zeros_like(warped)
        chosen = (warped | turned).nonzero().squeeze(1)
        if not len(chosen):
            return images, mask
        shifts = self._field(warped[chosen], images)
        mesh = self._turned_mesh(turned[chosen], images)
        chosen = chosen.to(images.device)
        map_x, map_y = mesh[..., 0] + shifts[:, 0], mesh[..., 1] + shifts[:, 1]

        def warp(batch: Tensor, mode: str) -> Tensor:
            moved = remap(batch[chosen], map_x, map_y, mode=mode, padding_mode="reflection", align_corners=True)
            return batch.index_copy(0, chosen, moved)

        return warp(images, "bilinear"), warp(mask, "nearest")

    def _field(self, warped: Tensor, images: Tensor) -> Tensor:
        """Span shifts [N, 2, H, W] in pixels between few control points by bicubic interpolation; 0 where not warped.

        kornia's RandomElasticTransform smooths noise of full resolution instead, which costs more.
        """
        height, width = images.shape[-2:]
        points = (1 + max(1, height // WARP_SPACING), 1 + max(1, width // WARP_SPACING))
        shifts = torch.randn(len(warped), 2, *points, dtype=torch.float32) * WARP_STRENGTH
        shifts = torch.where(warped[:, None, None, None], shifts, 0)
        return resize(shifts.to(images), (height, width), interpolation="bicubic", align_corners=True)

    def _turned_mesh(self, turned: Tensor, images: Tensor) -> Tensor:
        """Return where each pixel comes from, (x, y) as [N, H, W, 2], or [1, H, W, 2] where no image is turned."""
        height, width = images.shape[-2:]
        mesh = create_meshgrid(height, width, normalized_coordinates=False, device=images.device, dtype=images.dtype)
        if not turned.any():
            return mesh
        angles, zooms = torch.rand(2, len(turned), dtype=torch.float32)
        angles = torch.where(turned, (2 * angles - 1) * math.radians(self.largest_angle), 0)
        # Evenly in the logarithm: as often half as large as twice.
        low, high = map(math.log, SCALE)
        zooms = torch.where(turned, torch.exp(low + (high - low) * zooms), 1)
        cos, sin = torch.cos(angles) / zooms, torch.sin(angles) / zooms
        matrix = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1).to(images)
        centre = torch.tensor([(width - 1) / 2, (height - 1) / 2]).to(images)
        return (mesh - centre) @ matrix[:, None] + centre

    def _bend(self, images: Tensor) -> Tensor:
        """Raise some images, brought to 0..1, to a power; their mean and standard deviation stay."""
        chosen = (torch.rand(len(images), dtype=torch.float32) < self.gamma)[:, None, None, None].to(images.device)
        low, high = GAMMA
        powers = (low + (high - low) * torch.rand(len(images), dtype=torch.float32)).to(images)[:, None, None, None]
        least, most = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        bent = ((images - least) / (most - least).clamp_min(1e-8)).pow(powers)
        std, mean = torch.std_mean(images, (1, 2, 3), keepdim=True)
        bent_std, bent_mean = torch.std_mean(bent, (1, 2, 3), keepdim=True)
        return torch.where(chosen, (bent - bent_mean) * (std / bent_std.clamp_min(1e-8)) + mean, images)
