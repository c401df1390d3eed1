"""From a model and an image to probabilities and labels: whole, in tiles, or over the eight views of a square."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastunet.checks import ConfigError, ShapeError
from fastunet.inference.tiling import VIEWS, Field, Window, field_of, parts_of, result_of_part, stitched
from fastunet.inference.wrappers import as_probabilities, in_eval_mode
from fastunet.unet import check_is_of_images

WHOLE = Field(0, 1)  # of an image that goes through whole


def predict(
    model: nn.Module,
    image: Tensor,
    *,
    tile: int | None = None,
    overlap: float = 0.25,
    tta: bool = False,
    from_logits: bool | None = None,
) -> Tensor:
    """Return probabilities, float32 [N, K, H, W] (or [K, H, W]), of images [N, C, H, W] (or an image [C, H, W]).

    The image is on the model's device and normalised as the model was trained. One output channel gives sigmoid, more
    give softmax over them, unless the model has done so. The model runs in eval mode, and each of its modules is left
    in the mode it was in, also where several threads predict by one model.

    Args:
        tile: edge in pixels of square tiles, for images too large to go through at once. A U-Net of local layers (batch
            norm or none, transposed convolutions) gives in tiles what it gives of the whole image: each tile has all
            pixels around it that its result depends on. Tiles of any other net are blended with Gaussian weights where
            they overlap (MONAI's sliding window). None, or an image that fits into one tile, goes through whole.
        overlap: of neighbouring tiles that are blended, as a fraction of the edge, 0 <= overlap < 1.
        tta: average over the eight flips and quarter turns, for eight times the work: better where a turned image is to
            give a turned mask to the pixel, worse where masks are drawn to one side.
        from_logits: whether the model gives logits, rather than probabilities. None finds out, for a fastunet.UNet in
            DataParallel, DistributedDataParallel, AveragedModel, torch.compile, `fastunet.graphed`, nn.Sequential with
            or without an activation at its end, or code of your own that returns the U-Net's result; models of other
            kinds are taken to give logits.

    Raises:
        ShapeError: the image is neither 3-D nor 4-D, or what the model itself refuses.
        ConfigError: tile or overlap out of range; a UNet of volumes; a model that gives something else than a tensor
            [N, K, H, W], or of which it cannot be told whether that is logits: a traced or exported one, or other code
            around a U-Net.
    """
    check_is_of_images("predict", model)
    if image.dim() not in (3, 4):
        raise ShapeError(f"predict: image: expected [C, H, W] or [N, C, H, W], got {list(image.shape)}")
    batch = image if image.dim() == 4 else image[None]
    size = (batch.shape[-2], batch.shape[-1])
    prediction = Prediction(model, size, tile=tile, overlap=overlap, tta=tta, from_logits=from_logits)
    result = stitched(((part, prediction.of(part, lambda window: window.of(batch))) for part in prediction.parts), size)
    return result if image.dim() == 4 else result[0]


class Prediction:
    """The prediction of one image, part by part: each gives what the whole image would give.

    `parts` are in rows; there is one, the whole image, where it fits into a tile or where tiles have to be blended.
    Arguments and errors are those of `predict`. `grid`: the parts' edge is a multiple of it, where there is room.
    """

    def __init__(
        self,
        model: nn.Module,
        size: tuple[int, int],
        *,
        tile: int | None = None,
        overlap: float = 0.25,
        tta: bool = False,
        from_logits: bool | None = None,
        grid: int = 1,
    ) -> None:
        if tile is not None and tile < 1:
            raise ConfigError(f"predict: tile: expected at least 1 pixel or None, got {tile}")
        if not 0 <= overlap < 1:
            raise ConfigError(f"predict: overlap: expected 0 <= overlap < 1, got {overlap}")
        self.model, self.size, self.tile, self.overlap = model, size, tile, overlap
        self.views = VIEWS if tta else 1
        self.run = as_probabilities(model, from_logits)
        field = field_of(model) if tile is not None and max(size) > tile else WHOLE
        self.blended = field is None
        self.field = field or WHOLE
        self.parts = parts_of(*size, max(size) if tile is None or self.blended else tile, self.field, grid)

    @torch.no_grad()
    def of(self, part: Window, read: Callable[[Window], Tensor]) -> Tensor:
        """Return the probabilities [N, K, h, w] of a part. read: gives a window [N, C, h, w] of the image."""
        run = self._blend if self.blended else self.run
        room = 0 if self.blended or self.tile is None else self.tile**2
        with in_eval_mode(self.model):
            return result_of_part(run, read, self.size, part, self.field, self.views, room)

    def _blend(self, batch: Tensor) -> Tensor:
        from monai.inferers import sliding_window_inference

        assert self.tile is not None
        window = tuple(min(self.tile, length) for length in batch.shape[-2:])
        return sliding_window_inference(batch, window, 1, self.run, overlap=self.overlap, mode="gaussian")


def labels_of(probabilities: Tensor) -> Tensor:
    """Return labels [..., H, W] of probabilities [..., K, H, W]: above one half for one channel, else the largest;
    uint8, or int32 for more than 256 classes.
    """
    if probabilities.shape[-3] == 1:
        return (probabilities.squeeze(-3) > 0.5).to(torch.uint8)
    return probabilities.argmax(dim=-3).to(torch.uint8 if probabilities.shape[-3] <= 256 else torch.int32)
