"""What the kernels' launches hand to a CUDA driver, without a GPU: Triton's launcher on a driver that runs nothing.

Each of BODIES, which give how many launches they made, runs in a process of its own:

    python tests/driver_bodies.py NAME CAPABILITY FOLDER

It prints how many launches of how many reached the driver, and how many tensor maps. Tensors lie in the CPU's memory,
and what no kernel has computed is whatever lay there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from fastunet.benchmarks import jobs, parity, stand_in_driver
from fastunet.benchmarks.stand_in_driver import StandIn
from fastunet.kernels import gpu
from torch import Tensor
from triton import knobs

import fastunet


def nets(driver: StandIn) -> int:
    """The launches of nets' inference and of their training steps, with channels and sizes that suit, and others."""
    loss = fastunet.losses.DiceLoss(sigmoid=True)
    cases = (
        ("batch", (64, 128), (32, 16), torch.bfloat16),
        ("instance", (20, 40), (17, 9), torch.bfloat16),
        (None, (16, 32), (6, 10), torch.float32),
    )
    with fastunet.backend("triton"), gpu.recording() as steps:
        for norm, features, size, dtype in cases:
            model = fastunet.UNet(3, 2, features=features, norm=norm).to(dtype)
            x = torch.randn(2, 3, *size, dtype=dtype)
            loss(model(x), (x[:, :2] > 0).to(torch.uint8)).backward()
            with torch.no_grad():
                model.eval()(x)
    return _launches(steps)


def eight_bits(driver: StandIn) -> int:
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
            counts.append(_launches(steps))
    assert counts == [11, 11, 10, 10], counts
    for net in (model, quantised):
        for _ in range(4):  # The last one is repeated from a list.
            before = driver.launches
            with fastunet.backend("triton"), torch.no_grad():
                net(x)
            counts.append(driver.launches - before)
    assert counts[4:] == [11] * 4 + [10] * 4, counts
    return sum(counts)


def repeated(driver: StandIn) -> int:
    """A net's launches, each of them repeated: with the same arguments, and maps that are encoded once for each address
    of a tensor.
    """
    model = fastunet.UNet(3, 2, features=(64, 128)).to(torch.bfloat16).eval()
    cpu, digests = torch.device("cpu"), []
    with fastunet.backend("triton"), torch.no_grad(), gpu.recording() as steps:
        model(torch.randn(1, 3, 32, 16, dtype=torch.bfloat16))
        first = [step for step in steps if isinstance(step, gpu.Launch)]
        for step in first:
            ptx, repeat = step.compiled(cpu).asm["ptx"], step.repeatable(cpu)
            digests.append(driver.digest_of(ptx, functools.partial(step.run, cpu)))
            maps = driver.tensor_maps
            assert driver.digest_of(ptx, repeat) == digests[-1]
            assert driver.tensor_maps == maps
            assert _heard(repeat) == [("enter", step.kernel.__name__), ("exit", step.kernel.__name__)]
            _check_on_addresses(driver, ptx, step, digests[-1])
    assert len(set(digests)) == len(first)
    return _launches(steps) + _UNNOTED * len(first)


def _heard(launch: Callable[[], None]) -> list[tuple[str, str]]:
    """What hooks are told at a launch, as profilers' are."""
    heard: list[tuple[str, str]] = []
    hooks = {name: getattr(knobs.runtime, f"launch_{name}_hook") for name in ("enter", "exit")}
    told = {name: lambda data, name=name: heard.append((name, data.get()["name"])) for name in hooks}
    for name, hook in hooks.items():
        hook.add(told[name])
    launch()
    for name, hook in hooks.items():
        hook.remove(told[name])
    return heard


# Launches of `_check_on_addresses` that nothing notes down.
_UNNOTED = 5


def _check_on_addresses(driver: StandIn, ptx: str, step: gpu.Launch, digest: int) -> None:
    """As launched on these tensors, on others, and on these again, whose maps are known then."""
    cpu = torch.device("cpu")
    start = step.on_addresses(cpu)
    others = step.on([torch.empty_like(t) for t in step.tensors])
    for launch in (step, others, step):
        expected = driver.digest_of(ptx, functools.partial(launch.run, cpu))
        assert (expected == digest) == (launch is step)
        maps = driver.tensor_maps
        assert driver.digest_of(ptx, functools.partial(start, [t.data_ptr() for t in launch.tensors])) == expected
        if launch is step:
            known = driver.tensor_maps
            assert driver.digest_of(ptx, functools.partial(start, [t.data_ptr() for t in step.tensors])) == digest
            assert driver.tensor_maps == known
        else:
            assert driver.tensor_maps - maps == sum(not isinstance(v, Tensor) for v in _with_tensors(step))


def _with_tensors(step: gpu.Launch) -> list[object]:
    """Its arguments that are tensors, or descriptors of some."""
    values = step.arguments.values()
    return [v for v in values if isinstance(v, Tensor) or isinstance(getattr(v, "base", None), Tensor)]


def lists(driver: StandIn) -> int:
    """A net's training and inference, of which later steps are repeated from lists: each has as many launches."""
    model = fastunet.UNet(3, 2, features=(64, 128)).to(torch.bfloat16)
    loss = fastunet.losses.DiceLoss(sigmoid=True)
    x = torch.randn(2, 3, 32, 16, dtype=torch.bfloat16)
    target = (x[:, :2] > 0).to(torch.uint8)
    launches = []
    with fastunet.backend("triton"):
        for _ in range(5):
            before = driver.launches
            loss(model(x), target).backward()
            launches.append(driver.launches - before)
    assert len({*launches}) == 1, launches
    net, image = fastunet.UNet(3, 2, features=(64, 128, 256)).to(torch.bfloat16).eval(), torch.randn(1, 3, 33, 16)
    inference = []
    with fastunet.backend("triton"), torch.no_grad():
        for _ in range(5):
            before = driver.launches
            net(image.to(torch.bfloat16))
            inference.append(driver.launches - before)
    assert len({*inference}) == 1, inference
    return sum(launches + inference)


def lone_channels(driver: StandIn) -> int:
    """The launches of every op, forward and backward, on one channel: of a 1 Triton makes a constant in the kernel."""
    cpu = torch.device("cpu")
    with fastunet.backend("triton"), gpu.recording() as steps:
        for case in parity.cases_of(1, 1, 2, 2, 1):
            inputs = parity.make_inputs(case.shapes, torch.bfloat16, cpu)
            for name, t in inputs.items():
                t.requires_grad_(case.backward and name != "target")
            buffers = {} if case.buffers is None else {n: torch.ones(case.buffers) for n in ("mean", "variance")}
            outputs = parity.outputs_of(parity.run_op(case.op, inputs, buffers, case.options))
            parity.results_of(outputs, inputs, [torch.ones_like(y) for y in outputs] if case.backward else [])
    return _launches(steps)


def ops(driver: StandIn) -> int:
    """A launch of each op of `benchmarks.static`, in bfloat16, on tensors without memory."""
    capability = gpu.target(torch.device("cpu")).capability
    chosen = [job for job in jobs.all_jobs() if job.capability == capability and job.dtype == torch.bfloat16]
    launches = [jobs.launch_of(job) for job in {job.op: job for job in chosen}.values()]
    for launch in launches:
        launch.kernel[(launch.grid,)](**launch.arguments, **launch.options)
    return len(launches)


def _launches(steps: Sequence[object]) -> int:
    return sum(isinstance(step, gpu.Launch) for step in steps)


BODIES = {body.__name__: body for body in (nets, eight_bits, repeated, lists, lone_channels, ops)}

if __name__ == "__main__":
    name, capability, folder = sys.argv[1:]
    driver = stand_in_driver.activate(Path(folder), int(capability))
    wanted = BODIES[name](driver)
    print(f"{driver.launches} of {wanted} launches, {driver.tensor_maps} tensor maps")
