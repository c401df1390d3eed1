"""Images of discs with their masks, for the examples."""

import torch
from torch import Tensor


def discs(count: int, size: int, *, seed: int, channels: int = 1, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Noisy images [count, channels, size, size] of one disc each, and masks [count, 1, size, size] of 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centers = torch.rand(count, 2, 1, 1, generator=generator) * size / 2 + size / 4
    radii = torch.rand(count, 1, 1, generator=generator) * size / 8 + size / 8
    masks = (((y - centers[:, 0]) ** 2 + (x - centers[:, 1]) ** 2) < radii**2).float()[:, None]
    images = masks + 0.3 * torch.randn(count, channels, size, size, generator=generator)
    return images.to(device), masks.to(device)
