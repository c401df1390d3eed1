"""Where the halo variant may run: on sm_90, with a Triton it is written for, and once it has passed a self-test there.

What it rests on is private to Triton, and it synchronises by hand: a wrong barrier hangs. So the self-test is a process
of its own with a time limit, started when the variant is first asked for. Its verdict is kept in Triton's cache, by
GPU, driver, Triton and source. Running out of time or memory is none: the next process tests again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from fastunet.kernels import gpu
from fastunet.kernels.conv3x3 import config
from fastunet.kernels.epilogue import Epilogue, Head, Normalisation
from fastunet.kernels.layout import empty_packed
from torch import Tensor

# Seconds for starting Python, compiling four kernels, and running them.
TIMEOUT = 120.0
# Exit code of a self-test that has seen wrong results. Python's own codes are lower.
WRONG = 3
_SOURCES = ("hopper.py", "hopper_epilogue.py", "hopper_self_test.py")
_PR_SET_PDEATHSIG = 1


class NoVerdict(Exception):
    """The self-test ended without telling whether results are right."""


class Problem(NamedTuple):
    """A convolution of small integers, whose sums float32 holds exactly: results are equal to the last bit, or wrong.

    shape: batch, height, width, channels of both inputs and of the output.
    """

    shape: tuple[int, int, int, int, int, int]
    chosen: config.ConvConfig
    dtype: torch.dtype


def _halo(tile_h: int, block_n: int, slots: int, weight_slots: int, *, swapped: bool) -> config.ConvConfig:
    return config.ConvConfig(
        *(tile_h, config.TILE_W, block_n, 64, 4, slots, config.HALO), weight_stages=weight_slots, swapped=swapped
    )


# Few, because each is a kernel to compile, the last one two. More tiles than multiprocessors, and edges everywhere.
PROBLEMS = (
    Problem((2, 131, 75, 64, 0, 72), _halo(32, 64, 3, 6, swapped=True), torch.bfloat16),
    Problem((2, 40, 131, 64, 64, 136), _halo(32, 128, 2, 4, swapped=True), torch.bfloat16),
    Problem((2, 75, 131, 64, 0, 40), _halo(16, 64, 4, 8, swapped=False), torch.float16),
)


@functools.cache
def unsupported_reason(device: torch.device) -> str | None:
    """Return why the halo variant may not run on a device, None where it may."""
    target = gpu.target(device)
    if target.capability != 90:
        return f"the halo variant is for sm_90, not {target.name}"
    version = gpu.unknown_triton()
    if version is not None:
        return f"the halo variant is written for Triton {' and '.join(gpu.TRITON_VERSIONS)}, not {version}"
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        return verdict(Path(triton.knobs.cache.dir) / "fastunet_hopper.json", identity(target.name), index)
    except NoVerdict as error:
        return str(error)


def identity(name: str) -> str:
    """Return what a verdict holds for: the GPU's name, the driver, Triton, and the kernel's source."""
    here = Path(__file__).parent
    source = hashlib.sha256(b"".join((here / file).read_bytes() for file in _SOURCES)).hexdigest()[:16]
    driver = driver_version()
    return f"{name}, driver {driver}, triton {triton.__version__}, torch {torch.__version__}, source {source}"


def driver_version() -> int:
    """Return the newest CUDA the driver supports, 13000 for 13.0; 0 without a driver."""
    version = ctypes.c_int()
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def verdict(cache: Path, key: str, index: int) -> str | None:
    """Return what is wrong by the verdict of that key, or None; the self-test runs where the cache has none, and may
    raise NoVerdict.
    """
    try:
        verdicts = dict(json.loads(cache.read_text()))
    except (OSError, ValueError, TypeError):
        verdicts = {}
    if key not in verdicts:
        verdicts[key] = run(index)
        _write(cache, verdicts)
    return verdicts[key]


def run(index: int, command: list[str] | None = None, timeout: float = TIMEOUT) -> str | None:
    """Return what is wrong on the GPU of that number, or None. NoVerdict where it hangs or fails otherwise. command:
    what tests, by default this module.
    """
    command = command or [
        sys.executable,
        "-m",
        "fastunet.kernels.conv3x3.hopper_self_test",
        str(index),
        str(os.getpid()),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as child:
        try:
            output, _ = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise NoVerdict(f"the halo variant did not end its self-test within {timeout:.0f} s on this GPU") from None
        finally:
            if child.returncode is None:  # With the compilers it has started, and on Ctrl-C too, which it does not get.
                os.killpg(child.pid, signal.SIGKILL)
    if child.returncode == 0:
        return None
    last = (output.strip().splitlines() or [f"exit code {child.returncode}"])[-1][:200]
    if child.returncode == WRONG:
        return f"the halo variant failed its self-test on this GPU: {last}"
    raise NoVerdict(f"the halo variant's self-test ended without a verdict on this GPU: {last}")


def _write(cache: Path, verdicts: dict[str, str | None]) -> None:
    """Whole or not at all; without a place to write, the self-test runs again next time."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache.parent, delete=False) as file:
            json.dump(verdicts, file, indent=1)
        os.replace(file.name, cache)
    except OSError:
        pass


# --- the process of its own ---


def integers(*sizes: int, device: torch.device) -> Tensor:
    return torch.randint(-2, 3, sizes, device=device).float()


def check(problem: Problem, device: torch.device) -> None:
    """AssertionError unless y and its pooled half, and a head in their place, are exact, twice over."""
    from fastunet.kernels.conv3x3 import hopper  # Late: its interface is private to some releases of Triton.

    (n, h, w, c1, c2, c_out), chosen, dtype = problem
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
    expected = {"y": exact, "pooled": F.max_pool2d(exact, 2)}
    if c_out <= chosen.block_n:
        expected["head"] = F.conv2d(exact, head.double())
    actual = {name: empty_packed(x, *each.shape[1:]) for name, each in expected.items()}
    launches = [(chosen, Epilogue(actual["y"], bias, norm, 0.0, actual["pooled"]))]
    if "head" in actual:
        given = Head(head.to(dtype), None, sigmoid=False)
        joined = Epilogue(None, bias, norm, 0.0, head=given, probabilities=actual["head"])
        launches.append((config.with_head(chosen), joined))
    for _ in range(2):
        for each in actual.values():
            each.fill_(float("nan"))
        for config_of, epilogue in launches:
            hopper.conv3x3_launch(x, up if c2 else None, weight, config_of, epilogue).run(device)
        for name, each in expected.items():
            wrong = int((actual[name] != each.to(dtype)).sum())
            if wrong:
                raise AssertionError(f"{problem}: {wrong} of {each.numel()} of {name} are wrong")


def die_with(parent: int) -> None:
    """Have Linux kill this process when that parent of it dies, or end it where it has died already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the process that asked for the self-test has died")


def main(arguments: Sequence[str]) -> int:
    """Test on the GPU of that number, for the process of that id: 0 where all results are right, else WRONG."""
    index, parent = map(int, arguments)
    die_with(parent)
    try:
        for problem in PROBLEMS:
            check(problem, torch.device("cuda", index))
    except AssertionError as error:
        print(error)
        return WRONG
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
