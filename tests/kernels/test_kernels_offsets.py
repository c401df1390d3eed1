"""Tensors of more than 2^31 elements: the far end is computed as it is alone.

They are zeros but for the last image. In the interpreter they are sparse files, and of each launch only the last
programs run, so that the test costs as much as one image. A GPU runs them all, and needs the memory.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fastunet.kernels import config_passes, gpu, norm_grad, reduction
from fastunet.kernels.conv3x3 import config_grad, grad
from kernel_calls import CALLS, CHANNELS, SIDE, outputs, parameters
from kernel_device import DEVICE, INTERPRETED, MARK
from torch import Tensor

from fastunet.testing import random_integers

pytestmark = MARK
interpreted = pytest.mark.skipif(not INTERPRETED, reason="looks at what the last programs alone have left")

IMAGES = 2**31 // (SIDE * SIDE * CHANNELS) + 2
LAST_PROGRAMS = 8
# Of a GPU's memory, for the images of a call, with room for what torch itself keeps.
BYTES = 10 * 2 * 2**31


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[gpu.Launch]]:
    """The launches made; of those with many programs only the last ran in the interpreter."""
    if not INTERPRETED:
        with gpu.recording() as launches:
            yield launches
        return
    from triton.runtime import interpreter

    launches = []
    builder = interpreter.interpreter_builder
    set_index, set_dim = builder.set_grid_idx, builder.set_grid_dim

    def run(self: gpu.Launch, device: torch.device) -> None:
        launches.append(self)
        if self.kernel is reduction.sum_rows_kernel:  # Of parts that were not summed.
            return
        count = min(self.grid, LAST_PROGRAMS)
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: set_index(self.grid - count + x, y, z))
        monkeypatch.setattr(builder, "set_grid_dim", lambda x, y, z: set_dim(self.grid, y, z))
        self.kernel[(count,)](**self.arguments, **self.options)

    monkeypatch.setattr(gpu.Launch, "run", run)
    # Arguments are on the CPU already: copying each onto itself would fill the sparse files.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    yield launches


@pytest.fixture
def many(tmp_path: Path) -> Iterator[Callable[[Tensor], Tensor]]:
    """Many images, of which the last is the one given and all others are zero, packed."""
    files: list[Path] = []
    if not INTERPRETED and torch.cuda.mem_get_info()[0] < BYTES:
        pytest.skip(f"needs {BYTES >> 30} GiB of free GPU memory")

    def make(image: Tensor) -> Tensor:
        _, c, h, w = image.shape
        size = IMAGES * c * h * w
        if INTERPRETED:
            files.append(tmp_path / str(len(files)))
            flat = torch.from_file(str(files[-1]), shared=True, size=size, dtype=image.dtype)
        else:
            flat = torch.zeros(size, dtype=image.dtype, device=DEVICE)
        batch = flat.view(IMAGES, h, w, c).permute(0, 3, 1, 2)
        batch[-1] = image[0]
        return batch

    yield make
    for file in files:
        file.unlink()


@pytest.mark.parametrize("call", CALLS)
def test_last_image_is_as_alone(call: str, launched: list[gpu.Launch], many: Callable[[Tensor], Tensor]) -> None:
    function, inputs = CALLS[call]
    images = [make() for make in inputs]
    alone = outputs(function(*images))
    together = outputs(function(*map(many, images)))
    smaller = {"head": 8, "max_pool": 4, "strided": 4, "transpose_input_grad": 4}.get(call, 1)
    assert max(t.numel() for t in together) * smaller > 2**31
    assert max(launch.grid for launch in launched) > LAST_PROGRAMS
    for a, b in zip(alone, together, strict=True):
        rows = min(b.shape[2], 8)  # The last programs cover the last rows of the image.
        assert torch.equal(a[0, :, -rows:], b[-1, :, -rows:])


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of an image or two: the last is a short loop."""
    monkeypatch.setattr(config_grad, "weight_grad_splits", lambda programs, tiles, target: max(1, tiles // 64))
    monkeypatch.setattr(config_passes, "norm_grad_splits", lambda windows, channels, target: max(1, windows // 512))


def norm_sums(g: Tensor, x: Tensor) -> None:
    norm_grad.norm_grad(x, g, None, parameters(), None, statistics_given=False, needs_raw=False)


@interpreted
@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("sums", [grad.conv3x3_weight_grad, norm_sums])
def test_partial_sums_of_the_last_images(
    sums: Callable[..., object], launched: list[gpu.Launch], many: Callable[[Tensor], Tensor]
) -> None:
    g, x = (random_integers((1, CHANNELS, SIDE, SIDE), dtype=torch.float16, seed=i) for i in (1, 2))
    partials = []
    for images in ((g, x), (many(g), many(x))):
        launched.clear()
        sums(*images)
        partial = launched[0].arguments["partial_ptr"][-1]
        # The last programs of a weight's gradient hold the last tap.
        partials.append(partial if sums is norm_sums else partial.view(CHANNELS, 9, CHANNELS)[:, 8])
    assert partials[0].count_nonzero() > partials[0].numel() / 2
    assert torch.equal(*partials)


# A file of the kernels package, the widening to 64 bits in it, and the call that needs it.
WIDENINGS: dict[str | None, tuple[str, str]] = {
    "tiles": ("(tile // (tiles_w * tiles_h)).to(tl.int64)", "conv3x3"),
    "norm_grad": ("(tl.program_id(0) // blocks_c).to(tl.int64)", "activation_grad"),
    "norm": ("(tl.program_id(0) // blocks_c).to(tl.int64)", "normalise"),
}


@pytest.mark.skipif(INTERPRETED, reason="there only the last programs run")
def test_sums_over_all_images(many: Callable[[Tensor], Tensor]) -> None:
    """Of integers, which are exact in any order; all but the last image's are zeros."""
    g, x = (random_integers((1, CHANNELS, SIDE, SIDE), dtype=torch.float16, seed=i, device=DEVICE) for i in (1, 2))
    alone, together = (
        grad.conv3x3_weight_grad(g, x, with_bias=True),
        grad.conv3x3_weight_grad(many(g), many(x), with_bias=True),
    )
    assert all(map(torch.equal, alone, together))


@interpreted
@pytest.mark.parametrize(
    "module", ["tiles", *(pytest.param(m, marks=pytest.mark.slow) for m in ("norm_grad", "norm", None))]
)
def test_offsets_of_32_bits_would_be_caught(module: str | None, tmp_path: Path) -> None:
    """In a process of its own, since a wrong offset may also end it. None: the kernels as they are pass."""
    folder = tmp_path / "kernels"
    shutil.copytree(Path(gpu.__file__).parent, folder)
    widening, call = WIDENINGS.get(module, ("", "conv3x3"))
    if widening:
        file = folder / f"{module}.py"
        assert widening in file.read_text()
        file.write_text(file.read_text().replace(widening, widening.removesuffix(".to(tl.int64)")))
    script = (
        f"import sys, pytest, fastunet.kernels; fastunet.kernels.__path__[:] = [{str(folder)!r}]; "
        f"sys.exit(pytest.main([{__file__!r}, '-qx', '-p', 'no:cacheprovider', '-k', 'alone and {call}']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == (module is None), done.stdout + done.stderr
