"""What the kernels' launches hand to a CUDA driver, without a GPU: Triton's launcher on a driver that runs nothing.

Each of BODIES, which give how many launches they made, runs in a process of its own:

    python tests/helpers/driver_bodies.py NAME CAPABILITY FOLDER

It prints how many launches of how many reached the driver, and how many tensor maps. Tensors lie in the CPU's memory,
and what no kernel has computed is whatever lay there.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import fake_driver
import torch
from fastunet.benchmarks import launches
from fastunet.kernels import gpu

import fastunet
from fastunet.testing import parity


def net() -> int:
    """The launches of a net's training step, with channels and sizes that suit; eight_bits has the inference."""
    return _launches("batch", (64, 64), (32, 16), torch.bfloat16)


def other_nets() -> int:
    """The same with channels and sizes that suit less."""
    instance = _launches("instance", (20, 40), (17, 9), torch.bfloat16)
    return instance + _launches(None, (16, 32), (6, 10), torch.float32)


def _launches(norm: str | None, features: tuple[int, ...], size: tuple[int, int], dtype: torch.dtype) -> int:
    loss = fastunet.losses.DiceLoss(sigmoid=True)
    model = fastunet.UNet(3, 2, features=features, norm=norm).to(dtype)
    x = torch.randn(2, 3, *size, dtype=dtype)
    with fastunet.backend("triton"), gpu.recording() as launches:
        loss(model(x), (x[:, :2] > 0).to(torch.uint8)).backward()
    return len(launches)


def eight_bits() -> int:
    """The launches of a net in 8 bits, and of torch.compile's of it and of the net it is made of."""
    x = torch.randn(1, 3, 32, 16, dtype=torch.bfloat16)
    model = fastunet.UNet(3, 2, features=(32, 64, 128)).to(x.dtype).eval()
    with fastunet.backend("aten"):  # Its values count.
        quantised = fastunet.quantize(model, [x])
    counts = []
    for net in (model, quantised):
        for run in (net, torch.compile(net, backend="aot_eager", fullgraph=net is model)):
            with fastunet.backend("triton"), torch.no_grad(), gpu.recording() as steps:
                run(x)
            counts.append(len(steps))
    assert counts == [11, 11, 10, 10], counts
    return sum(counts)


def single_channels() -> int:
    """The launches of ops that have every kernel between them, forward and backward, on one channel: of a 1 Triton
    makes a constant in the kernel.
    """
    cpu = torch.device("cpu")
    same = ("conv3x3_bias_relu", "concat_conv3x3_batch_norm_relu", "sigmoid_dice_loss")
    same += ("conv3x3_batch_norm_relu", "conv3x3_instance_norm_relu_pool", "conv_transpose2x2_concat_conv3x3_relu")
    with fastunet.backend("triton"), gpu.recording() as steps:
        for case in (case for case in parity.cases_of(1, 1, 4, 4, 1) if case.op not in same):
            inputs = parity.make_inputs(case.shapes, torch.bfloat16, cpu)
            for name, t in inputs.items():
                t.requires_grad_(case.backward and name != "target")
            buffers = {} if case.buffers is None else {n: torch.ones(case.buffers) for n in ("mean", "variance")}
            outputs = parity.outputs_of(parity.run_op(case.op, inputs, buffers, case.options))
            parity.results_of(outputs, inputs, [torch.ones_like(y) for y in outputs] if case.backward else [])
    return len(steps)


def ops() -> int:
    """A launch of each kernel of `benchmarks static`, in bfloat16."""
    capability = gpu.target(torch.device("cpu")).capability
    found = [launches.launch_of(job) for job in launches.one_of_each(launches.jobs([capability], ["bfloat16"]))]
    for launch in found:
        launch.run(torch.device("cpu"))
    return len(found)


BODIES = {body.__name__: body for body in (net, other_nets, eight_bits, single_channels, ops)}

if __name__ == "__main__":
    name, capability, folder = sys.argv[1:]
    driver = fake_driver.activate(Path(folder), int(capability))
    wanted = BODIES[name]()
    taken, maps = (ctypes.c_ulong.in_dll(driver, count).value for count in ("launches", "tensor_maps"))
    print(f"{taken} of {wanted} launches, {maps} tensor maps")
