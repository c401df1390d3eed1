"""A trained U-Net with everything about it, from the pixels of a file to its mask, in formats of other runtimes."""

from __future__ import annotations

import io
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastunet.checks import ConfigError, DataError
from fastunet.data import DataSummary
from fastunet.files import SOFTWARE, written_whole
from fastunet.unet import UNet, check_is_of_images

TITLE = r"[A-Za-z0-9_+\- ()]{5,128}"  # of a package for bioimage.io
GRAINS = (0, 1, 2, 4, 8)  # of the noise that it is tested on, in pixels
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
    content = io.BytesIO()  # torch's own writer ends the process on a full disk, or a name that is not UTF-8
    torch.export.save(_program(model, data), content, extra_files={"software": SOFTWARE})
    with written_whole(path) as temporary:
        temporary.write_bytes(content.getbuffer())


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


def check_title(name: str) -> None:
    """Raise ConfigError on a name that no package for bioimage.io may have."""
    if not re.fullmatch(TITLE, name):
        raise ConfigError(f"name: expected 5 to 128 of the letters a to z, digits, spaces and _+-(), got {name!r}")


def export_bioimageio(model: UNet, data: DataSummary, path: Path, name: str, description: str) -> None:
    """Write a package for bioimage.io (.zip): the pipeline as ONNX with its description and test tensors, checked.

    `name` and `description` are those of the run; authors and licence are to be filled in before it is published.

    Raises:
        ConfigError: a name that the format does not allow.
        DataError: the model finds nothing in any test image, which the format does not allow either.
        ModuleNotFoundError: the extra `bioimageio` is not installed.
    """
    check_title(name)
    from bioimageio.spec import save_bioimageio_package
    from bioimageio.spec.model import v0_5 as spec

    least, multiple = 2 ** (model.depth + 1), 2**model.depth
    pixels, mask, probabilities = _tested(Pipeline(model, data), (1, data.channels, 4 * least, 3 * least), data.dtype)

    free = spec.ParameterizedSize(min=least, step=1)

    def described(name: str, values: np.ndarray, text: str, channel: str = "") -> Any:
        """Describe a tensor [N, C, H, W] or [N, H, W], and write it into the folder as the test tensor."""
        np.save(folder / f"{name}.npy", values)
        kind, axis = spec.OutputTensorDescr, spec.SpaceOutputAxis
        sizes = {side: spec.SizeReference(tensor_id="pixels", axis_id=side) for side in "yx"}
        if name == "pixels":
            kind, axis, sizes = spec.InputTensorDescr, spec.SpaceInputAxis, dict.fromkeys("yx", free)
        axes = [axis(id=side, size=size) for side, size in sizes.items()]
        if channel:
            axes.insert(0, spec.ChannelAxis(channel_names=[f"{channel}{n}" for n in range(values.shape[1])]))
        return kind(
            id=spec.TensorId(name),
            description=text,
            axes=[spec.BatchAxis(), *axes],
            test_tensor=spec.FileDescr(source=folder / f"{name}.npy"),
            data=spec.IntervalOrRatioDataDescr(type=values.dtype.name),
        )

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        export_onnx(model, data, folder / "model.onnx")
        (folder / "README.md").write_text(
            f"# {name}\n\n{description}\n\n## Validation\n\nSee `metrics.json` of the run.\n"
        )
        text = f"as in the file; sizes that are multiples of {multiple} lose nothing at the edge"
        descr = spec.ModelDescr(
            name=name,
            description=description,
            authors=[spec.Author(name="unknown")],
            cite=[spec.CiteEntry(text="Ronneberger et al. 2015, U-Net", url="https://arxiv.org/abs/1505.04597")],
            license="CC-BY-4.0",
            documentation=spec.FileDescr(source=folder / "README.md"),
            tags=["unet", "segmentation", SOFTWARE],
            inputs=[described("pixels", pixels, text, "channel")],
            outputs=[
                described("mask", mask.numpy(), "0 and 255 for one class, else the class of each pixel"),
                described("probabilities", probabilities.numpy(), "of foreground, or each class", "class"),
            ],
            weights=spec.WeightsDescr(
                onnx=spec.OnnxWeightsDescr(source=folder / "model.onnx", opset_version=_opset_of(folder / "model.onnx"))
            ),
        )
        with written_whole(path) as temporary:
            temporary.unlink()
            save_bioimageio_package(descr, output_path=temporary)


def _opset_of(path: Path) -> int:
    """Return the version of the standard operators that a model is written in: torch's choice."""
    import onnx

    return next(opset.version for opset in onnx.load(path).opset_import if not opset.domain)


def _tested(pipeline: Pipeline, shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, Tensor, Tensor]:
    """Return an image [1, C, H, W] with its mask and probabilities: noise, as coarse as it takes to find something."""
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(0).normal(size=shape)
    for grain in GRAINS:
        pixels = gaussian_filter(noise, grain, axes=(2, 3))
        pixels = ((pixels - pixels.min()) / np.ptp(pixels) * 255).astype(dtype)
        with torch.no_grad():
            mask, probabilities = pipeline(torch.from_numpy(pixels))
        if mask.any():
            return pixels, mask, probabilities
    raise DataError(
        f"model: expected one that finds something in one of {len(GRAINS)} test images, got only background"
    )
