"""Launches as a CUDA driver gets them, on a fake driver that runs nothing: arguments, tensor maps, shared memory."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="launches Triton's kernels")
import driver_bodies
import fake_driver

from fastunet.checks import MissingPackageError

# Seconds for a process that compiles some fifty kernels: a few times the usual.
TIMEOUT = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where processes keep the driver, and what Triton has made to go with it."""
    return tmp_path_factory.mktemp("driver")


@pytest.fixture(scope="module")
def driver(folder: Path) -> ctypes.CDLL:
    try:
        return fake_driver.load(folder)
    except MissingPackageError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("net", 90),
        ("eight_bits", 90),
        ("single_channels", 90),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("other_nets", 90), ("net", 80), ("net", 100), ("eight_bits", 100), ("ops", 90), ("ops", 100))
        ),
    ],
)
@pytest.mark.usefixtures("driver")  # Skips where there is none.
def test_every_launch_reaches_the_driver(folder: Path, name: str, capability: int) -> None:
    command = [sys.executable, driver_bodies.__file__, name, str(capability), str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-4000:]
    found = re.search(r"(\d+) of (\d+) launches, (\d+) tensor maps", done.stdout)
    assert found is not None, done.stdout
    taken, wanted, maps = map(int, found.groups())
    assert taken == wanted > 0
    # A map wants eight neighbours in 16 bits, and other_nets have channels that suit none.
    assert bool(maps) == (capability >= 90 and name not in ("single_channels", "other_nets"))


@dataclass
class Map:
    """What a tensor map is encoded of, the innermost dimension first, in CUDA's numbers: 9 is bfloat16, 3 is 128 B."""

    address: int = 1 << 20
    sizes: tuple[int, ...] = (128, 256, 2, 256, 4)
    strides: tuple[int, ...] = (256, 65536, 131072, 33554432)
    box: tuple[int, ...] = (64, 8, 1, 8, 1)
    dtype: int = 9
    swizzle: int = 3


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (Map(), ""),
        (Map(address=(1 << 20) + 8), "address % 16"),
        (Map(sizes=(128, 256, 2, 256, 0)), "sizes[i] < 1"),
        (Map(strides=(256, 65536, 131072, 33554440)), "strides[i] % 16"),
        (Map(strides=(256, 65536, 131072, 1 << 40)), "strides[i] >="),
        (Map(box=(64, 512, 1, 8, 1)), "box[i] > 256"),
        (Map(box=(4, 8, 1, 8, 1)), "% 16"),
        (Map(box=(128, 8, 1, 8, 1)), "16u << swizzle"),
        (Map(dtype=99), "element_size"),
        (Map(sizes=(2,) * 6, strides=(16,) * 5, box=(1,) * 6), "rank > 5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_driver_refuses_what_the_real_one_would(driver: ctypes.CDLL, given: Map, why: str) -> None:
    memory = ctypes.create_string_buffer(256)
    aligned = ctypes.c_void_p(-(-ctypes.addressof(memory) // 64) * 64)
    rank = len(given.sizes)
    sizes, strides = ((ctypes.c_uint64 * len(t))(*t) for t in (given.sizes, given.strides))
    box, steps = (ctypes.c_uint32 * rank)(*given.box), (ctypes.c_uint32 * rank)(*[1] * rank)
    error = driver.cuTensorMapEncodeTiled(
        aligned, given.dtype, rank, ctypes.c_void_p(given.address), sizes, strides, box, steps, 0, given.swizzle, 2, 0
    )
    assert bool(error) == bool(why)
    if why:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(error, ctypes.byref(text))
        assert why in (text.value or b"").decode()
