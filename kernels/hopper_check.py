"""`python -m fastunet.kernels.hopper_check GPU`: are the halo form's results right on that GPU? The exit code says so.

Inputs are small integers, whose sums float32 holds exactly: results are equal to the last bit, or wrong.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fastunet.kernels import config, conv3x3_hopper, gpu
from fastunet.kernels.config import ConvConfig, ConvShape
from fastunet.kernels.epilogue import Epilogue, Normalisation
from fastunet.kernels.layout import empty_packed
from torch import Tensor

# Batch, height, width, channels of both inputs and of the output: more tiles than multiprocessors, and edges.
PROBLEMS = (
    (5, 131, 75, 64, 0, 64),
    (2, 33, 65, 64, 64, 128),
    (3, 16, 24, 128, 0, 72),
)


def blocks(shape: ConvShape) -> list[ConvConfig]:
    """Both orders of the product, small tiles and large."""
    wide = 128 if shape.c_out > 64 else 64
    sizes = ((32, 64, 3, 6), (16, 64, 4, 8), (16, wide, 2, 4))
    return [
        ConvConfig(tile_h, config.TILE_W, block_n, 64, 4, slots, config.HALO, weight_stages=weights, swapped=swapped)
        for (tile_h, block_n, slots, weights), swapped in itertools.product(sizes, (False, True))
    ]


def integers(*sizes: int, device: torch.device) -> Tensor:
    return torch.randint(-2, 3, sizes, device=device).float()


def check(problem: Sequence[int], chosen: ConvConfig, dtype: torch.dtype, device: torch.device) -> None:
    """AssertionError unless y and its pooled half are exact, twice over, in the same memory."""
    n, h, w, c1, c2, c_out = problem
    images = [integers(n, c, h, w, device=device) for c in (c1, c2) if c]
    weight = integers(c_out, c1 + c2, 3, 3, device=device)
    bias, mean = integers(c_out, device=device), integers(c_out, device=device)
    # With eps a variance of 1, whose root is exact.
    norm = Normalisation(mean, torch.full_like(mean, 0.75), None, 0.25)
    half = [t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (*images, weight)]
    *inputs, half_weight = half
    expected = F.conv2d(torch.cat(images, 1).double(), weight.double(), padding=1) - mean.double()[:, None, None]
    expected = (expected + bias.double()[:, None, None]).relu()
    y = empty_packed(inputs[0], c_out, h, w)
    pooled = empty_packed(inputs[0], c_out, h // 2, w // 2)
    up = inputs[1] if c2 else None
    launch = conv3x3_hopper.conv3x3_launch(inputs[0], up, half_weight, chosen, Epilogue(y, bias, norm, 0.0, pooled))
    for _ in range(2):
        y.fill_(float("nan"))
        pooled.fill_(float("nan"))
        launch.run(device)
        for name, actual, exact in (("y", y, expected), ("pooled", pooled, F.max_pool2d(expected, 2))):
            wrong = int((actual != exact.to(dtype)).sum())
            if wrong:
                raise AssertionError(
                    f"{chosen} on {problem} in {dtype}: {wrong} of {actual.numel()} of {name} are wrong"
                )


def main(arguments: Sequence[str]) -> int:
    """Check every problem, blocks and dtype on the GPU of that number."""
    device = torch.device("cuda", int(arguments[0]))
    for problem, dtype in itertools.product(PROBLEMS, (torch.bfloat16, torch.float16)):
        _, h, w, c1, c2, c_out = problem
        for chosen in blocks(ConvShape(c1, c2, c_out, h, w)):
            if config.halo_shared_memory(chosen) + 512 <= gpu.target(device).shared_memory:
                check(problem, chosen, dtype, device)
    torch.cuda.synchronize(device)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
