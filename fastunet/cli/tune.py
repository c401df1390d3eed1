"""`fastunet tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastunet.checks import check_choice
from fastunet.train.config import is_faster_in_bf16

from .shared import bar, chosen_device, console, option, parse_features


def tune(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="Folder that `fastunet train` wrote [a new net].")
    ] = None,
    size: Annotated[int | None, option("model", "Side of the images in pixels [as trained; 512].", min=1)] = None,
    batch: Annotated[int | None, option("model", "Images at once [as trained; 16].", min=1)] = None,
    features: Annotated[str, option("model", "Channels of each level of a new net.")] = "64,128,256,512,1024",
    training: Annotated[
        bool, option("model", "For training, forward and backward, instead of inference.", "--train")
    ] = False,
    precision: Annotated[
        str, option("hardware", "auto (bf16 where the GPU multiplies it natively), fp32, bf16 or fp16.")
    ] = "auto",
    seconds: Annotated[
        float, option("hardware", "Limit in seconds, compiling included; what is left over runs on ATen.", min=1)
    ] = 300.0,
) -> None:
    """Measure on this GPU which layers are faster on the Triton kernels, and keep that for later runs."""
    check_choice("precision", precision, ("auto", "fp32", "bf16", "fp16"))
    import torch

    import fastunet

    device = chosen_device("cuda")
    if run is None:
        model = fastunet.UNet(3, 2, features=parse_features(features))
        size, batch = size or 512, batch or 16
    else:
        from fastunet.train.checkpoint import load_run

        model, config = load_run(run)
        size, batch = size or config.training["crop"], batch or config.training["batch_size"]
    if precision == "auto":
        precision = "bf16" if is_faster_in_bf16(cpu=False) else "fp32"
    x = torch.zeros(batch, model.config["in_channels"], size, size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    autocast = torch.autocast(device, dtype, enabled=dtype is not None)
    with bar("checking the kernels") as show, autocast:
        found = fastunet.tune(model.to(device).train(training), x, seconds=seconds, on_layer=show)
    console.print(f"{'training' if training else 'inference'}, {precision}")
    console.print(str(found), soft_wrap=True)
