"""`python -m fastunet.kernels.hopper_check GPU`: is the halo variant right on that GPU? The exit code says so.

Inputs are small integers, whose sums float32 holds exactly: results are equal to the last bit, or wrong.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fastunet.kernels import config, config_hopper, conv3x3_hopper, gpu
from fastunet.kernels.config import ConvConfig
from fastunet.kernels.epilogue import Epilogue, Head, Normalisation
from fastunet.kernels.layout import empty_packed
from torch import Tensor

# Batch, height, width, channels of both inputs and of the output: more tiles than multiprocessors, and edges.
PROBLEMS = (
    (5, 131, 75, 64, 0, 64),
    (3, 20, 50, 64, 0, 40),
    (2, 33, 65, 64, 64, 128),
    (2, 75, 131, 64, 64, 48),
    (3, 16, 24, 128, 0, 72),
)


def blocks(c_out: int) -> list[ConvConfig]:
    """Both orders of the product, small tiles and large."""
    sizes = ((32, 64, 3, 6), (16, 64, 4, 8), (16, 128 if c_out > 64 else 64, 2, 4))
    return [
        ConvConfig(*(tile_h, config.TILE_W, block_n, 64, 4, slots, config.HALO), weight_stages=weights, swapped=swapped)
        for (tile_h, block_n, slots, weights), swapped in itertools.product(sizes, (False, True))
    ]


def integers(*sizes: int, device: torch.device) -> Tensor:
    return torch.randint(-2, 3, sizes, device=device).float()


def check(problem: Sequence[int], chosen: ConvConfig, dtype: torch.dtype, device: torch.device) -> None:
    """AssertionError unless y and its pooled half, and a head in their place, are exact, twice over."""
    n, h, w, c1, c2, c_out = problem
    x, up, weight = (
        integers(*sizes, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        for sizes in ((n, c1, h, w), (n, c2, h, w), (c_out, c1 + c2, 3, 3))
    )
    bias, mean = integers(c_out, device=device), integers(c_out, device=device)
    # With eps a variance of 1, whose root is exact.
    norm = Normalisation(mean, torch.full_like(mean, 0.75), None, 0.25)
    head = integers(2, c_out, 1, 1, device=device) * (torch.arange(c_out, device=device) % 8 == 0)[:, None, None]
    exact = F.conv2d(torch.cat([x, up], 1).double(), weight.double(), padding=1)
    exact = (exact - mean.double()[:, None, None] + bias.double()[:, None, None]).relu()
    expected = {"y": exact, "pooled": F.max_pool2d(exact, 2), "head": F.conv2d(exact, head.double())}
    actual = {name: empty_packed(x, *each.shape[1:]) for name, each in expected.items()}
    launches = [(chosen, Epilogue(actual["y"], bias, norm, 0.0, actual["pooled"]))]
    if c_out <= chosen.block_n:
        given = Head(head.to(dtype), None, sigmoid=False)
        joined = Epilogue(None, bias, norm, 0.0, head=given, probabilities=actual["head"])
        launches.append((config.with_head(chosen), joined))
    else:
        del expected["head"]
    for _ in range(2):
        for each in actual.values():
            each.fill_(float("nan"))
        for config_of, epilogue in launches:
            conv3x3_hopper.conv3x3_launch(x, up if c2 else None, weight, config_of, epilogue).run(device)
        for name, each in expected.items():
            wrong = int((actual[name] != each.to(dtype)).sum())
            if wrong:
                raise AssertionError(f"{chosen} on {problem} in {dtype}: {wrong} of {each.numel()} of {name} are wrong")


def main(arguments: Sequence[str]) -> int:
    """Check every problem, blocks and dtype on the GPU of that number."""
    device = torch.device("cuda", int(arguments[0]))
    target = gpu.target(device)
    for problem, dtype in itertools.product(PROBLEMS, (torch.bfloat16, torch.float16)):
        for chosen in blocks(problem[-1]):
            if config_hopper.shared_memory(chosen) + 512 <= target.shared_memory:
                check(problem, chosen, dtype, device)
    torch.cuda.synchronize(device)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
