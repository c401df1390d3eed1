"""What the kernels' launches hand to a CUDA driver, without a GPU: Triton's launcher on a driver that runs nothing.

Each of BODIES runs in a process of its own, in the environment of a `built` driver, and prints how many launches of how
many reached the driver, and how many tensor maps:

    python tests/stand_in_driver.py NAME CAPABILITY

Tensors lie in the CPU's memory, and what no kernel has computed is whatever lay there.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def built(folder: Path) -> dict[str, str]:
    """The environment for a process with the driver, which is compiled into the folder. Triton's cache lies there."""
    import triton

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("no C compiler: expected gcc or cc on PATH, or its name in CC")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library, source = folder / "libcuda.so.1", Path(__file__).with_suffix(".c")
    command = [compiler, "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, f"-I{include}", str(source), "-o", str(library)], check=True)
    own = {
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | own


class _Driver:
    """The driver of this process, as one of a capability, and what reached it."""

    def __init__(self, capability: int) -> None:
        from fastunet.kernels import gpu

        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.configure(capability, gpu.SHARED_MEMORY_LIMITS[capability])

    def print(self, wanted: int) -> None:
        """How many launches it took of those wanted, and how many tensor maps."""
        launches, maps = (ctypes.c_ulong.in_dll(self._library, name).value for name in ("launches", "tensor_maps"))
        print(f"{launches} of {wanted} launches, {maps} tensor maps")


def _activate(capability: int) -> _Driver:
    """Have Triton take the driver for a GPU's, and the launchers for one of that capability."""
    import triton
    from fastunet.kernels import gpu
    from triton.backends.nvidia.driver import CudaDriver

    from fastunet import dispatch

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda device=0: divmod(capability, 10)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

    triton.runtime.driver.set_active(Driver())
    target = gpu.known_target(capability)
    gpu.target = lambda device: target
    dispatch.interpreting = lambda: True  # So that kernels are launched on tensors of the CPU.
    return _Driver(capability)


def nets(capability: int) -> None:
    """The launches of nets' inference and of their training steps, with channels and sizes that suit, and others."""
    import torch
    from fastunet.kernels import gpu

    import fastunet

    driver, bfloat16 = _activate(capability), torch.bfloat16
    loss = fastunet.losses.DiceLoss(sigmoid=True)
    cases = (
        ("batch", (64, 128), (32, 16), bfloat16),
        ("instance", (20, 40), (17, 9), bfloat16),
        (None, (16, 32), (6, 10), torch.float32),
    )
    with fastunet.backend("triton"), gpu.recording() as steps:
        for norm, features, size, dtype in cases:
            model = fastunet.UNet(3, 2, features=features, norm=norm).to(dtype)
            x = torch.randn(2, 3, *size, dtype=dtype)
            loss(model(x), (x[:, :2] > 0).to(torch.uint8)).backward()
            with torch.no_grad():
                model.eval()(x)
    driver.print(_launches(steps))


def eight_bits(capability: int) -> None:
    """The launches of a net in 8 bits, and of torch.compile's of it and of the net it is made of."""
    import torch
    from fastunet.kernels import gpu

    import fastunet

    driver = _activate(capability)
    x = torch.randn(1, 3, 32, 16, dtype=torch.bfloat16)
    model = fastunet.UNet(3, 2, features=(32, 64, 128)).to(x.dtype).eval()
    with fastunet.backend("aten"):  # Its values count.
        quantised = fastunet.quantize(model, [x])
    counts = []
    for net in (model, quantised):
        for run in (net, torch.compile(net, backend="aot_eager", fullgraph=net is model)):
            with fastunet.backend("triton"), torch.no_grad(), gpu.recording() as steps:
                run(x)
            counts.append(_launches(steps))
    assert counts == [11, 11, 10, 10], counts
    driver.print(sum(counts))


def repeated(capability: int) -> None:
    """A net's launches, each of them made once more and then repeated."""
    import torch
    from fastunet.kernels import gpu

    import fastunet

    driver = _activate(capability)
    model = fastunet.UNet(3, 2, features=(64, 128)).to(torch.bfloat16).eval()
    with fastunet.backend("triton"), torch.no_grad(), gpu.recording() as steps:
        model(torch.randn(1, 3, 32, 16, dtype=torch.bfloat16))
        first = list(steps)
        repeats = [step.repeatable(torch.device("cpu")) for step in first]
        for repeat in repeats:
            repeat()
    assert [type(step) for step in steps] == [type(step) for step in first] * 3
    through_triton = [repeat for repeat in repeats if isinstance(repeat, functools.partial)]
    assert len(through_triton) == sum(isinstance(step, gpu.Copy) for step in first)
    driver.print(_launches(steps))


def lone_channels(capability: int) -> None:
    """The launches of every op, forward and backward, on one channel: of a 1 Triton makes a constant in the kernel."""
    import torch
    from fastunet.benchmarks import parity
    from fastunet.kernels import gpu

    import fastunet

    driver, cpu = _activate(capability), torch.device("cpu")
    with fastunet.backend("triton"), gpu.recording() as steps:
        for case in parity.cases_of(1, 1, 2, 2, 1):
            inputs = parity.make_inputs(case.shapes, torch.bfloat16, cpu)
            for name, t in inputs.items():
                t.requires_grad_(case.backward and name != "target")
            buffers = {} if case.buffers is None else {n: torch.ones(case.buffers) for n in ("mean", "variance")}
            outputs = parity.outputs_of(parity.run_op(case.op, inputs, buffers, case.options))
            parity.results_of(outputs, inputs, [torch.ones_like(y) for y in outputs] if case.backward else [])
    driver.print(_launches(steps))


def ops(capability: int) -> None:
    """A launch of each op of `benchmarks.static`, in bfloat16, on tensors without memory."""
    import torch
    from fastunet.benchmarks import jobs

    driver = _activate(capability)
    chosen = [job for job in jobs.all_jobs() if job.capability == capability and job.dtype == torch.bfloat16]
    launches = [jobs.launch_of(job) for job in {job.op: job for job in chosen}.values()]
    for launch in launches:
        launch.kernel[(launch.grid,)](**launch.arguments, **launch.options)
    driver.print(len(launches))


def _launches(steps: Sequence[object]) -> int:
    from fastunet.kernels import gpu

    return sum(isinstance(step, gpu.Launch) for step in steps)


BODIES = {body.__name__: body for body in (nets, eight_bits, repeated, lone_channels, ops)}

if __name__ == "__main__":
    BODIES[sys.argv[1]](int(sys.argv[2]))
