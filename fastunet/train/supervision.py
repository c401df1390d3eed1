"""Deep supervision: a U-Net that is also trained on what its lower levels tell (Lee et al. 2015, arXiv:1409.5185)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastunet.modules import OutConv
from fastunet.train.loss import TrainingLoss
from fastunet.unet import UNet


class DeeplySupervised(nn.Module):
    """A U-Net of four levels or more and, in training only, a 1x1 head for each level of its decoder below the first.

    The lowest has none, as in nnU-Net. `net` stays what it is, with its own names of weights.
    """

    def __init__(self, net: UNet) -> None:
        super().__init__()
        features, classes = net.config["features"], net.config["out_channels"]
        self.net = net
        self.heads = nn.ModuleList(OutConv(width, classes, None) for width in features[1:-2])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Give logits [N, K, H >> i, W >> i] of level i = 0, 1, ...: those of the net, then those of the heads."""
        logits, (_, *levels) = self.net.forward_levels(x)
        return [logits, *(head(y) for head, y in zip(self.heads, reversed(levels), strict=True))]


class DeepLoss(nn.Module):
    """A loss of each level's logits, weighted by 1, 1/2, 1/4, ... over their sum.

    Border weights count at the full size alone: the gaps between objects that they are about are gone below it.
    """

    def __init__(self, loss: TrainingLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Compute the loss, a scalar, of what `DeeplySupervised` gives and labels [N, H, W]."""
        logits, *lower = outputs
        losses = [self.loss(logits, labels)]
        losses += [self.loss.without_borders(y, labels_at(labels, level)) for level, y in enumerate(lower, start=1)]
        total = 2 - 2.0 ** (1 - len(losses))
        return sum((2.0**-level / total * loss for level, loss in enumerate(losses)), labels.new_zeros(()))


def labels_at(labels: Tensor, level: int) -> Tensor:
    """Reduce labels [N, H, W] to [N, H >> level, W >> level]: of each square the pixel next to its middle."""
    height, width = (size >> level for size in labels.shape[1:])
    stride = 2**level
    return labels[:, stride // 2 :: stride, stride // 2 :: stride][:, :height, :width].contiguous()
