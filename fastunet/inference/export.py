"""A trained U-Net with everything about it, from the pixels of a file to its mask, in formats of other runtimes."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastunet.checks import ConfigError
from fastunet.data import DataSummary
from fastunet.files import SOFTWARE, written_whole
from fastunet.unet import UNet, check_is_of_images

PIXELS = {"uint8": torch.uint8, "uint16": torch.uint16, "float32": torch.float32}


class Pipeline(nn.Module):
    """From pixels as they are in a file, [N, C, H, W], to the mask, uint8 [N, H, W], and probabilities [N, K, H, W].

    As `fastunet predict` without tiles and views: each image is normalised by its own mean and deviation; the mask is
    0 and 255 for one class, else the class. In plain PyTorch.
    """

    def __init__(self, model: UNet, data: DataSummary) -> None:
        check_is_of_images("export", model)
        super().__init__()
        self.net = model.to_reference().float().cpu().eval()
        self.is_binary = data.classes == 1
        self.gives_probabilities = model.config["head"] is not None

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        exact = pixels.to(torch.float64)
        mean = exact.mean((2, 3), keepdim=True)
        deviation = (exact - mean).square().mean((2, 3), keepdim=True).sqrt()
        deviation = torch.where(deviation > 0, deviation, 1.0)
        y = self.net((pixels.float() - mean.float()) / deviation.float())
        if self.is_binary:
            p = y if self.gives_probabilities else y.sigmoid()
            return (p[:, 0] > 0.5).to(torch.uint8) * 255, p
        p = y if self.gives_probabilities else y.softmax(1)
        return p.argmax(1).to(torch.uint8), p


def export_torch(model: UNet, data: DataSummary, path: Path) -> None:
    """Write the `Pipeline` as a program of torch.export (.pt2), of any batch and size; whole or not at all."""
    with written_whole(path) as temporary:
        torch.export.save(_program(model, data), temporary, extra_files={"software": SOFTWARE})


def export_onnx(model: UNet, data: DataSummary, path: Path) -> None:
    """Write the `Pipeline` as ONNX, of any batch and size: "pixels" gives "mask" and "probabilities".

    Raises:
        ModuleNotFoundError: the extra `onnx` is not installed.
    """
    import onnx
    import onnxscript  # noqa: F401  which torch's exporter needs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(_program(model, data), (), dynamo=True, input_names=["pixels"],
                                    output_names=["mask", "probabilities"], verbose=False)  # fmt: skip
    assert program is not None
    proto = program.model_proto
    proto.producer_name = SOFTWARE
    with written_whole(path) as temporary:
        onnx.save(proto, temporary)


def _program(model: UNet, data: DataSummary) -> Any:
    """Trace the pipeline with free batch, height and width."""
    if data.dtype not in PIXELS:
        raise ConfigError(f"dtype: expected one of {', '.join(PIXELS)}, got {data.dtype}")
    side = 3 * 2**model.depth + 1
    example = torch.zeros(2, data.channels, side, side + 2, dtype=PIXELS[data.dtype])
    free = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        return torch.export.export(Pipeline(model, data), (example,), dynamic_shapes=({0: free, 2: free, 3: free},))


def export_bioimageio(model: UNet, data: DataSummary, path: Path, name: str, description: str) -> None:
    """Write a package for bioimage.io (.zip): the pipeline as ONNX with its description and test tensors, checked.

    `name` and `description` are those of the run; authors and licence are to be filled in before it is published.

    Raises:
        ModuleNotFoundError: the extra `bioimageio` is not installed.
    """
    from bioimageio.spec import save_bioimageio_package
    from bioimageio.spec.model import v0_5 as spec

    least, multiple = 2 ** (model.depth + 1), 2**model.depth
    classes = model.config["out_channels"]
    pixels = np.random.default_rng(0).normal(size=(1, data.channels, 4 * least, 3 * least))
    pixels = ((pixels - pixels.min()) / np.ptp(pixels) * 255).astype(data.dtype)
    with torch.no_grad():
        mask, probabilities = Pipeline(model, data)(torch.from_numpy(pixels))

    def axes(kind: Any, size: Any, channels: list[str] | None) -> list[Any]:
        space = [kind(id=side, size=size(side)) for side in "yx"]
        return [spec.BatchAxis(), *([spec.ChannelAxis(channel_names=channels)] if channels else []), *space]

    def like_pixels(side: str) -> Any:
        return spec.SizeReference(tensor_id="pixels", axis_id=side)

    with tempfile.TemporaryDirectory() as folder:
        files = {
            file: Path(folder) / file
            for file in ("model.onnx", "pixels.npy", "mask.npy", "probabilities.npy", "README.md")
        }
        export_onnx(model, data, files["model.onnx"])
        for tensor, values in (("pixels", pixels), ("mask", mask.numpy()), ("probabilities", probabilities.numpy())):
            np.save(files[f"{tensor}.npy"], values)
        files["README.md"].write_text(f"# {name}\n\n{description}\n\n## Validation\n\nSee `metrics.json` of the run.\n")
        free = spec.ParameterizedSize(min=least, step=1)
        channels = [f"channel{index}" for index in range(data.channels)]
        outputs = [
            ("mask", "uint8", None, "0 and 255 for one class, else the class of each pixel"),
            ("probabilities", "float32", [f"class{index}" for index in range(classes)], "of foreground, or each class"),
        ]
        descr = spec.ModelDescr(
            name=name,
            description=description,
            authors=[spec.Author(name="unknown")],
            cite=[spec.CiteEntry(text="Ronneberger et al. 2015, U-Net", url="https://arxiv.org/abs/1505.04597")],
            license="CC-BY-4.0",
            documentation=spec.FileDescr(source=files["README.md"]),
            tags=["unet", "segmentation", SOFTWARE],
            inputs=[
                spec.InputTensorDescr(
                    id=spec.TensorId("pixels"),
                    description=f"as in the file; sizes that are multiples of {multiple} lose nothing at the edge",
                    axes=axes(spec.SpaceInputAxis, lambda side: free, channels),
                    test_tensor=spec.FileDescr(source=files["pixels.npy"]),
                    data=spec.IntervalOrRatioDataDescr(type=data.dtype),
                )
            ],
            outputs=[
                spec.OutputTensorDescr(
                    id=spec.TensorId(tensor),
                    description=text,
                    axes=axes(spec.SpaceOutputAxis, like_pixels, names),
                    test_tensor=spec.FileDescr(source=files[f"{tensor}.npy"]),
                    data=spec.IntervalOrRatioDataDescr(type=dtype),
                )
                for tensor, dtype, names, text in outputs
            ],
            weights=spec.WeightsDescr(onnx=spec.OnnxWeightsDescr(source=files["model.onnx"], opset_version=18)),
        )
        with written_whole(path) as temporary:
            temporary.unlink()
            save_bioimageio_package(descr, output_path=temporary)
