"""What tests/kernels/test_gpu.py checks in a process of its own.

`python tests/helpers/gpu_bodies.py NAME` runs one in a process of its own, where it may hang, or lose its GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import fastunet
from fastunet import ops
from fastunet.testing import random_input


def make(device: str, *shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Random tensors, channels_last where they have four dimensions."""
    return [random_input(shape, dtype=dtype, seed=i, device=device) for i, shape in enumerate(shapes)]


def graph_of_a_net() -> None:
    torch.manual_seed(0)
    model = fastunet.UNet(3, 2, features=(16, 32, 64)).cuda().bfloat16().eval()
    x, other = (t.contiguous() for t in make("cuda", (2, 3, 64, 48), (2, 3, 64, 48)))
    with torch.no_grad():
        expected = model(other)
        _warm_up(lambda: model(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        x.copy_(other)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def graphed_model() -> None:
    torch.manual_seed(0)
    model = fastunet.UNet(3, 2, features=(16, 32, 64)).cuda().eval()
    fast = fastunet.graphed(model)
    x, other = (t.contiguous() for t in make("cuda", (2, 3, 64, 48), (2, 3, 64, 48), dtype=torch.float32))
    for _ in range(2):
        for image in (x, other, x[:1]):
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                assert torch.equal(fast(image), model(image))
        with torch.no_grad():
            model.outc.conv.bias.add_(1.0)
    assert len(fast._graphs) == 2


def composed_weights() -> None:
    """They are made once, nobody waits for the GPU to know that they hold, and a graph is recorded anew with them."""
    torch.manual_seed(0)
    model = fastunet.UNet(3, 2, features=(64, 128)).to("cuda", torch.bfloat16).eval()
    fast = fastunet.graphed(model)
    (x,) = make("cuda", (2, 3, 64, 48))
    with torch.no_grad():
        before = model(x)
        torch.cuda.set_sync_debug_mode("error")
        again = model(x)
        torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(again, before)
        assert torch.equal(fast(x), before)
        model.up1.up.weight.mul_(1.5)
        assert torch.equal(fast(x), model(x))
        assert not torch.equal(fast(x), before)


def graph_of_a_step() -> None:
    x, weight, bias, grad, other = make(
        "cuda", (2, 32, 24, 16), (64, 32, 3, 3), (64,), (2, 64, 24, 16), (2, 32, 24, 16)
    )
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def step() -> tuple[Tensor, ...]:
        y = ops.conv3x3_bias_relu(*leaves)
        return (y, *torch.autograd.grad(y, leaves, grad))

    _warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


def _warm_up(run: Callable[[], object]) -> None:
    """As torch asks before a capture: a few runs on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)


def side_stream() -> None:
    """A launch on the default stream would overtake the wait and read zeros."""
    x, weight = make("cuda", (2, 32, 24, 16), (64, 32, 3, 3))
    expected = ops.conv3x3_bias_relu(x, weight)
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        y = ops.conv3x3_bias_relu(late, weight)
    stream.synchronize()
    assert torch.equal(y, expected)


def out_of_memory() -> None:
    x, weight = make("cuda", (8, 64, 256, 256), (64, 64, 3, 3))
    expected = ops.conv3x3_bias_relu(x, weight)
    held = []
    size = 1 << 33
    while size >= 1 << 20:  # Until not even a megabyte is left: the result needs 64.
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    try:
        ops.conv3x3_bias_relu(x, weight)
    except torch.OutOfMemoryError:
        pass
    else:
        raise AssertionError("there was memory for the result")
    held.clear()
    assert torch.equal(ops.conv3x3_bias_relu(x, weight), expected)


CUDA_BODIES = {
    body.__name__: body
    for body in (graph_of_a_net, graphed_model, composed_weights, graph_of_a_step, side_stream, out_of_memory)
}


if __name__ == "__main__":
    with fastunet.backend("triton"):
        CUDA_BODIES[sys.argv[1]]()
