"""Training with torch.compile(model, backend="fastunet"): as without, under every habit of training."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import IN_INFERENCE, compare, compare_grads, ops_run, small_image, small_unet, step
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from unet_pair import moved

import fastunet
from fastunet.compiler import backend
from fastunet.cpu import onednn
from fastunet.reference import ReferenceUNet
from fastunet.testing import cpu_accumulates_in_float32


def trained(model: nn.Module, forward: Any) -> list[Tensor]:
    """Parameters and buffers after three steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    generator = torch.Generator().manual_seed(2)
    dtype = next(model.parameters()).dtype
    for _ in range(3):
        x = torch.randn(2, 1, 16, 18, generator=generator).to(dtype)
        target = torch.randn(2, 2, 16, 18, generator=generator).to(dtype)
        F.mse_loss(forward(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*model.parameters(), *model.buffers()]


def test_wide_layers_train_by_the_ops() -> None:
    """Gradients as near to float64's as direct convolutions' in float32 are, but for a few times."""
    torch.manual_seed(0)
    wide = (nn.Conv2d(128, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
    wide += (nn.Conv2d(128, 128, 3, padding=1), nn.ReLU())  # Wide enough for Winograd's algorithm, unlike the next.
    plain, x = nn.Sequential(*wide, nn.Conv2d(128, 2, 3, padding=1)).train(), torch.randn(2, 128, 48, 46)
    assert [row.implementation for row in fastunet.explain(plain, x).rows][:2] == ["winograd", "winograd"]
    grad = torch.randn(2, 2, 48, 46)
    model, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    compiled = torch.compile(model, backend="fastunet", options={"fallback": "eager"})
    assert set(ops_run(lambda: compiled(x))) == {"conv3x3"}
    model.load_state_dict(plain.state_dict())
    for forward in (compiled, plain):
        forward(x).backward(grad)
    exact(x.double()).backward(grad.double())
    for a, b, c in zip(model.parameters(), plain.parameters(), exact.parameters(), strict=True):
        error, direct = (float((p.grad - c.grad).norm() / c.grad.norm()) for p in (a, b))
        # A value next to 0 may fall on either side of ReLU's bend: one in some hundred thousand.
        assert error <= 10 * direct + 1e-3, (error, direct)


class Checkpointed(nn.Module):
    """A U-Net whose first two blocks are computed again in backward."""

    def __init__(self, net: ReferenceUNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        net: Any = self.net
        skip = checkpoint(net.inc, x, use_reentrant=False)
        low = checkpoint(net.down1, skip, use_reentrant=False)
        return net.outc(net.up1(low, skip))


@pytest.mark.parametrize("fallback", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_gradient_checkpointing(fallback: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns within the checkpointed regions are replaced too, and the running statistics move once."""
    plain = Checkpointed(small_unet()).double()
    model = copy.deepcopy(plain)
    find, found = backend.find_patterns, list[Any]()

    def recorded(graph_module: Any, **options: Any) -> Any:
        found.append(find(graph_module, **options))
        return found[-1]

    monkeypatch.setattr(backend, "find_patterns", recorded)
    compiled = torch.compile(model, backend="fastunet", options={"fallback": fallback, "force": True})
    actual = trained(model, compiled)
    assert [len(patterns) for _, patterns in found[-1]] == [2, 3, 4]
    uncompiled = trained(plain.net, plain.net)  # Eager checkpointing moves the statistics twice.
    compare(uncompiled, actual, 1e-10)


@pytest.mark.parametrize(("dtype", "fallback"), [(torch.bfloat16, "aot_eager"), (torch.float16, "eager")])
def test_autocast_with_a_scaler(dtype: torch.dtype, fallback: str) -> None:
    """A step under autocast: loss, gradients and statistics as far from float32's as the plain model's, or near it."""
    exact = small_unet()
    plain, model = copy.deepcopy(exact), copy.deepcopy(exact)
    compiled = torch.compile(model, backend="fastunet", options={"fallback": fallback, "force": True})
    x, target = small_image(), torch.randn(2, 2, 16, 18)
    F.mse_loss(exact(x), target).backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=dtype == torch.float16)
    for m, forward in ((plain, plain), (model, compiled)):
        with torch.autocast("cpu", dtype=dtype):
            y = forward(x)
            assert y.dtype == dtype
            loss = F.mse_loss(y.float(), target)
        scaler.scale(loss).backward()
        optimizer = torch.optim.SGD(m.parameters(), lr=0.0)
        scaler.unscale_(optimizer)
    largest = max(float(p.grad.abs().max()) for p in exact.parameters())
    for a, b, c in zip(exact.parameters(), plain.parameters(), model.parameters(), strict=True):
        assert c.grad.dtype == torch.float32
        error, allowed = (float((t - a.grad).abs().max()) for t in (c.grad, b.grad))
        assert error <= 2 * allowed + 2.0**-8 * largest
    for b, c in zip(plain.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(c, b, rtol=2.0**-6, atol=2.0**-6)


@pytest.mark.skipif(not cpu_accumulates_in_float32(torch.bfloat16), reason="oneDNN has no bfloat16 on this processor")
def test_autocast_in_inference_runs_the_ops() -> None:
    """In bfloat16 the up-convolution is not composed, so its two steps are ops of their own."""
    model, x = small_unet().eval(), small_image()
    compiled = torch.compile(model, backend="fastunet", options={"fallback": "eager"})
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        compiled(x)
        counts = ops_run(lambda: compiled(x))
        actual, expected = compiled(x), model(x)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
    assert actual.dtype == torch.bfloat16
    error, allowed = (float((t.double() - exact).abs().max()) for t in (actual, expected))
    assert error <= 2 * allowed
    expected_ops = {"conv3x3": 5, "conv_transpose2x2": 1, "conv3x3_relu_conv1x1": 1}
    # The dispatcher counts an op once where autocast casts, and once below.
    assert {name: counts[name] // 2 for name in expected_ops} == expected_ops


class Padded(nn.Module):
    """A step up whose image is padded by copies of its edge, as in MONAI's BasicUNet."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 2, 2)
        self.last = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.down(x))
        up = F.pad(self.up(F.max_pool2d(skip, 2)), [0, 1, 0, 1], "replicate")
        return self.last(torch.cat([skip, up], dim=1))


@pytest.mark.parametrize("force", [False, True])
def test_inductor_trains_with_replicated_edges(force: bool) -> None:
    """By itself inductor raises at run time: wrong strides of replication_pad2d_backward."""
    torch.manual_seed(0)
    plain, x = Padded().double(), small_image(2, 17, 19).double()
    compiled: Any = torch.compile(copy.deepcopy(plain), backend="fastunet", options={"force": force})
    (outputs, grads), (actual, actual_grads) = step(plain, x), step(compiled, x)
    compare(outputs, actual, 1e-11)
    compare_grads(grads, actual_grads, 1e-12)


def test_a_bias_that_moves_to_the_norm_prepares_the_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI's convolutions have one before a batch norm: gamma and beta are made at each call."""
    model = moved(nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()).eval())
    x, made, prepare = torch.randn(1, 16, 64, 64), [], onednn.prepare_conv3x3
    monkeypatch.setattr(onednn, "prepare_conv3x3", lambda *a: made.append(1) or prepare(*a))
    compiled = torch.compile(model, backend="fastunet")
    with torch.no_grad():
        for _ in range(3):
            compare([model(x)], [compiled(x)], 1e-5)
        assert len(made) == 1
        model[0].bias.mul_(2)
        compare([model(x)], [compiled(x)], 1e-5)
    assert len(made) == 2


def test_inductor_runs_the_ops_in_inference() -> None:
    """With the default fallback; the weights are prepared at the first call and found again at the next."""
    model, x = small_unet().eval(), small_image()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="fastunet")
    with torch.no_grad():
        compare([plain(x)], [compiled(x)], 1e-5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastunet.cpu.folding.fold_batch_norm", None)
            counts = ops_run(lambda: compiled(x))
    assert {name: counts[name] for name in IN_INFERENCE} == IN_INFERENCE


RANK = """
import copy, os, sys, torch, torch.distributed as dist
from pathlib import Path
from torch.nn.parallel import DistributedDataParallel
sys.path[:0] = os.environ["TESTS"].split(os.pathsep)
from test_compiled_training import trained
from parity import FORCED, IN_TRAINING, compare, ops_run, small_unet
dist.init_process_group("gloo")
dist._DEFAULT_FIRST_BUCKET_BYTES = 1000  # Of at most what the other buckets have.
rank = dist.get_rank()
plain = small_unet().double()
model = copy.deepcopy(plain)
results = []
for net, options in ((plain, None), (model, FORCED)):
    wrapped = DistributedDataParallel(net, bucket_cap_mb=0.002)  # So small that the graph is split between buckets.
    forward = wrapped if options is None else torch.compile(wrapped, backend="fastunet", options=options)
    results.append(trained(net, lambda x: forward(x + rank)))
compare(*results, 1e-10)
assert max(float((a - b).abs().max()) for a, b in zip(results[0], small_unet().double().parameters())) > 1e-3
counts = ops_run(lambda: forward(torch.randn(2, 1, 16, 18).double()))
assert {name: counts[name] // 2 for name in IN_TRAINING} == IN_TRAINING, counts
dist.destroy_process_group()
(Path(__file__).parent / f"same_on_rank_{rank}").touch()
"""


def test_distributed_training_of_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    environment = {**os.environ, "TESTS": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    # Files, since the lines that two processes print may run into each other.
    assert sorted(path.name for path in tmp_path.glob("same_*")) == ["same_on_rank_0", "same_on_rank_1"]


# --- sizes ---


def compiles(backend: Any, *, training: bool, sizes: list[tuple[int, int]]) -> list[int]:
    """How often Dynamo calls the backend in a first and a second pass over batches and sizes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    model = small_unet().train(training)
    compiled = torch.compile(model, backend=counter)
    counts = []
    with torch.set_grad_enabled(training), torch._dynamo.config.patch(recompile_limit=64):
        for _ in range(2):
            for batch, size in sizes:
                compiled(torch.randn(batch, 1, size, size))
            counts.append(counter.frame_count)
    return counts


SIZES = [(batch, size) for batch in (1, 2, 4, 7, 9) for size in range(16, 65, 4)]


@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_more_compiles_than_aot_eager(training: bool, every: int) -> None:
    sizes = SIZES[::every]
    expected = compiles("aot_eager", training=training, sizes=sizes)

    def forced(graph_module: Any, inputs: Any) -> Any:
        return backend.fastunet_backend(graph_module, inputs, options={"fallback": "aot_eager", "force": True})

    actual = compiles(forced, training=training, sizes=sizes)
    assert actual[0] <= expected[0]
    assert actual[1] == actual[0]
