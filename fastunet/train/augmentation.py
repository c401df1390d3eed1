"""Random changes to a batch of images and labels on its own device, by kornia."""

from __future__ import annotations

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


class Augmentation(nn.Module):
    """Flip, turn, warp and re-light each image of a batch by itself; labels follow the geometry, by nearest neighbour.

    Images are expected normalised to mean 0 and standard deviation 1: nothing is clamped, and contrast stretches about
    the data's mean. All draws come from torch's global CPU generator, on every device.

    Args:
        flip: probability of a left-right flip, and by itself of an up-down flip.
        rotate: probability of turning by 90, 180 or 270 degrees; images that are not square turn by 180 only.
        elastic: probability of a smooth random warp.
        brightness, contrast: probability of a shift by up to 0.3 and of a factor within 1 +- 0.25.
        noise, blur: probability of Gaussian noise of standard deviation 0.15, and of a blur of sigma 0.3 to 1.2 pixels.

    Raises:
        ConfigError: a probability outside [0, 1].
    """

    def __init__(
        self,
        *,
        flip: float = 0.5,
        rotate: float = 0.75,
        elastic: float = 0.3,
        brightness: float = 0.3,
        contrast: float = 0.3,
        noise: float = 0.1,
        blur: float = 0.1,
    ) -> None:
        super().__init__()
        chances = {"flip": flip, "rotate": rotate, "elastic": elastic}
        chances |= {"brightness": brightness, "contrast": contrast, "noise": noise, "blur": blur}
        for name, chance in chances.items():
            if not 0 <= chance <= 1:
                raise ConfigError(f"{name}: expected a probability from 0 to 1, got {chance}")
        self.rotate = rotate
        self.elastic = elastic
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
        images, mask = self._turn(images, mask)
        images, mask = self._warp(images, mask)
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
        """Shift pixels by a field that bicubic interpolation spans between few control points.

        kornia's RandomElasticTransform smooths noise of full resolution instead, which costs more.
        """
        chosen = (torch.rand(len(images), dtype=torch.float32) < self.elastic).nonzero().squeeze(1)
        if not len(chosen):
            return images, mask
        height, width = images.shape[-2:]
        points = (1 + max(1, height // WARP_SPACING), 1 + max(1, width // WARP_SPACING))
        shifts = torch.randn(len(chosen), 2, *points, dtype=torch.float32) * WARP_STRENGTH
        chosen = chosen.to(images.device)
        field = resize(shifts.to(images), (height, width), interpolation="bicubic", align_corners=True)
        mesh = create_meshgrid(height, width, normalized_coordinates=False, device=images.device, dtype=images.dtype)
        map_x, map_y = mesh[..., 0] + field[:, 0], mesh[..., 1] + field[:, 1]

        def warp(batch: Tensor, mode: str) -> Tensor:
            moved = remap(batch[chosen], map_x, map_y, mode=mode, padding_mode="reflection", align_corners=True)
            return batch.index_copy(0, chosen, moved)

        return warp(images, "bilinear"), warp(mask, "nearest")
