"""Inference from a milesial/Pytorch-UNet checkpoint by the model it came from, compiled: what is replaced, and times.

Or without that model: fastunet.UNet.from_pretrained("checkpoint.pth").

pip install fastunet; python milesial_checkpoint.py checkpoint.pth (without a file, one of random weights)
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from shapes import discs

import fastunet
from fastunet.reference import ReferenceUNet  # Stands for the class in milesial's repository, whose keys it has.


def main(checkpoint: Path | None = None, size: int = 256, rounds: int = 5, **options: object) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint is None:
            torch.manual_seed(0)
            checkpoint = Path(folder) / "checkpoint.pth"
            torch.save({**ReferenceUNet(1, 2).state_dict(), "mask_values": [0, 255]}, checkpoint)
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    state.pop("mask_values", None)
    model = ReferenceUNet(state["inc.double_conv.0.weight"].shape[1], state["outc.conv.bias"].shape[0]).eval()
    model.load_state_dict(state)
    images, _ = discs(1, size, seed=0, channels=model.config["in_channels"])

    compiled = torch.compile(model, backend="fastunet", **options)  # the one changed line

    print(fastunet.explain(model, images))
    seconds: dict[str, list[float]] = {"plain": [], "compiled": []}
    with torch.no_grad():
        result, expected = compiled(images), model(images)
        for _ in range(rounds):
            for name, forward in (("plain", model), ("compiled", compiled)):
                begin = time.perf_counter()
                forward(images)
                seconds[name].append(time.perf_counter() - begin)
    for name, times in seconds.items():
        print(f"{name}: {1000 * statistics.median(times):.0f} ms")
    return {"result": result, "expected": expected}


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
