"""torch.compile(model, backend="fastunet"): what goes in, what stays, and that later changes of a model are seen."""

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
from drop_in import FORCED, compare, ops_run
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastunet
from fastunet import compiler
from fastunet.checks import ConfigError
from fastunet.reference import ReferenceUNet

LEVELS = (4, 8)
# The ops of such a U-Net in training, and in inference on the CPU.
IN_TRAINING = {"conv3x3_batch_norm_relu": 6, "conv_transpose2x2": 1, "conv1x1": 1}
IN_INFERENCE = {
    "conv3x3_batch_norm_relu": 4,
    "conv_transpose2x2_concat_conv3x3_relu": 1,
    "conv3x3_relu_conv1x1": 1,
}


@pytest.fixture(autouse=True)
def _no_caches() -> None:
    torch._dynamo.reset()


def unet(**options: Any) -> ReferenceUNet:
    torch.manual_seed(0)
    model = ReferenceUNet(1, 2, **{"features": LEVELS, **options})
    with torch.no_grad():
        model(torch.randn(2, 1, 16, 16))  # Moves the running statistics.
    return model


def image(batch: int = 2, height: int = 16, width: int = 18) -> Tensor:
    return torch.randn(batch, 1, height, width, generator=torch.Generator().manual_seed(1))


# --- one word ---


def test_the_name_is_known_without_importing_fastunet() -> None:
    script = """
import sys, torch
assert "fastunet" in torch.compiler.list_backends(), torch.compiler.list_backends()
assert "fastunet" not in sys.modules
net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU()).eval()
x = torch.randn(1, 1, 8, 8)
compiled = torch.compile(net, backend="fastunet", options={"fallback": "eager", "force": True})
with torch.no_grad():
    torch.testing.assert_close(compiled(x), net(x))
assert "fastunet.compiler" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


@pytest.mark.parametrize("way", ["torch.compile", "model.compile", "fastunet.compile"])
def test_three_ways_to_say_it(way: str) -> None:
    model, x = unet().eval(), image()
    plain = copy.deepcopy(model)
    before = {name: id(p) for name, p in model.named_parameters()}
    compiled: Any = model
    if way == "torch.compile":
        compiled = torch.compile(model, backend="fastunet", options={"fallback": "eager"})
    elif way == "model.compile":
        model.compile(backend="fastunet", options={"fallback": "eager"})
    else:
        compiled = fastunet.compile(model, options={"fallback": "eager"})
        assert model.inc.double_conv[3].weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        counts = ops_run(lambda: compare([plain(x)], [compiled(x)], 1e-5))
    assert {name: counts[name] for name in IN_INFERENCE} == IN_INFERENCE
    assert before == {name: id(p) for name, p in model.named_parameters()}
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert type(model) is ReferenceUNet


def test_training_forced_runs_each_op_forward_and_backward() -> None:
    model, x = unet(), image()
    compiled = torch.compile(model, backend="fastunet", options=FORCED)
    compiled(x)  # Compiles outside of the count.
    counts = ops_run(lambda: compiled(x).square().mean().backward())
    # The dispatcher counts an op once above autograd and once below.
    assert {name: counts[name] // 2 for name in IN_TRAINING} == IN_TRAINING
    assert {name: counts[f"{name}_backward"] for name in IN_TRAINING} == IN_TRAINING


def test_training_on_the_cpu_is_left_to_inductor_and_explain_says_so() -> None:
    model, x = unet(), image()
    compiled = torch.compile(model, backend="fastunet", options={"fallback": "eager"})
    assert ops_run(lambda: compiled(x)) == {}
    explanation = fastunet.explain(model, x)
    assert explanation.replaced == 0
    assert {row.implementation for row in explanation.rows} == {"inductor"}
    assert all(row.reason.startswith("the op would run on ATen here") for row in explanation.rows)


def test_explain_lists_what_replaces_what() -> None:
    model, x = unet().eval(), image()
    rows = fastunet.explain(model, x).rows
    assert [(row.layer, row.op, row.replaced_by, row.implementation) for row in rows[:2]] == [
        ("inc.double_conv.0", "conv3x3 + batch_norm + relu", "conv3x3_batch_norm_relu", "onednn"),
        ("inc.double_conv.3", "conv3x3 + batch_norm + relu + max_pool", "conv3x3_batch_norm_relu", "onednn"),
    ]
    assert rows[-1].layer == "up1.conv.double_conv.3"
    on_gpu = fastunet.explain(model, x, device="cuda")
    assert on_gpu.replaced == 0
    assert on_gpu.left == 8


def test_explain_changes_nothing() -> None:
    model, x = unet(), image()
    before = copy.deepcopy(model.state_dict())
    fastunet.explain(model, x)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_explain_passes_on_what_a_forced_backend_cannot_run() -> None:
    with fastunet.backend("triton"), pytest.raises(fastunet.checks.BackendError, match="device is cpu"):
        fastunet.explain(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1)), image())


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fallback": "xla"}, "'fallback': expected one of inductor, aot_eager, eager, got 'xla'"),
        ({"force": 1}, "'force': expected True or False, got 1"),
        ({"fallback": "eager", "max_autotune": True}, "max_autotune: expected the fallback 'inductor'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    compiled = torch.compile(unet(), backend="fastunet", options=options)
    with pytest.raises(Exception, match=message) as raised:
        compiled(image())
    assert isinstance(getattr(raised.value, "inner_exception", raised.value), ConfigError)


def test_mode_and_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.compile_fx as inductor

    seen: list[Any] = []

    def compile_fx(graph_module: Any, inputs: Any, config_patches: Any = None) -> Any:
        seen.append(config_patches)
        return graph_module.forward

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    torch.compile(unet().eval(), backend="fastunet", mode="max-autotune-no-cudagraphs")(image())
    torch._dynamo.reset()
    torch.compile(unet().eval(), backend="fastunet", options={"epilogue_fusion": False})(image())
    assert seen == [{"max_autotune": True, "coordinate_descent_tuning": True}, {"epilogue_fusion": False}]


def test_without_a_cpp_compiler_the_rest_runs_eagerly_and_it_is_said_once(tmp_path: Path) -> None:
    script = """
import warnings, torch
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 5)).eval()
x = torch.randn(1, 1, 8, 8)
with warnings.catch_warnings(record=True) as caught, torch.no_grad():
    warnings.simplefilter("always")
    for _ in range(2):
        torch._dynamo.reset()
        model = net()
        torch.testing.assert_close(torch.compile(model, backend="fastunet")(x), model(x))
said = [str(w.message) for w in caught if "no C++ compiler" in str(w.message)]
assert len(said) == 1, [str(w.message) for w in caught]
"""
    environment = {**os.environ, "PATH": str(tmp_path)}
    environment.pop("CXX", None)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, env=environment)


# --- memory format ---


def test_the_results_have_the_strides_they_had() -> None:
    """`view` works on what leaves the graph and on what is viewed within it."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Any:
            y = F.relu(self.conv(x))
            return y, y + 1, y.view(y.shape[0], -1), F.max_pool2d(y, 2).flatten(2)

    torch.manual_seed(0)
    model, x = Flat().eval(), image()
    with torch.no_grad():
        expected = model(x)
        actual = torch.compile(model, backend="fastunet", options={"fallback": "eager"})(x)
        compare(list(expected), list(actual), 1e-6)
    assert [t.stride() for t in actual] == [t.stride() for t in expected]


def test_channels_last_models_stay_channels_last() -> None:
    model = unet().eval().to(memory_format=torch.channels_last)
    x = image().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        actual = torch.compile(model, backend="fastunet", options={"fallback": "eager"})(x)
        assert actual.stride() == model(x).stride()


# --- changes after compiling ---


def swap(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 1.5


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)


def load(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.load_state_dict(ReferenceUNet(1, 2, features=LEVELS).state_dict())


def statistics(model: nn.Module) -> None:
    for name, b in model.named_buffers():
        if name.endswith("running_var"):
            b.mul_(3)


def through_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(1.5)


def average(model: nn.Module) -> None:
    """An exponential moving average's copy_ into the model."""
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    in_place(model)
    ema.update_parameters(model)
    with torch.no_grad():
        for p, q in zip(model.parameters(), ema.parameters(), strict=True):
            p.copy_(q)


@pytest.mark.parametrize("change", [swap, in_place, load, statistics, through_data, average, nn.Module.double])
@pytest.mark.parametrize("fallback", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_changes_of_the_weights_are_seen(change: Any, fallback: str) -> None:
    model, x = unet().eval(), image()
    compiled = torch.compile(model, backend="fastunet", options={"fallback": fallback})
    with torch.no_grad():
        before = compiled(x)
        change(model)
        x = x.to(next(model.parameters()).dtype)
        after = compiled(x)
        assert not torch.allclose(
            before.to(x.dtype), after, rtol=0, atol=1e-7 if change is nn.Module.double else 1e-3
        ) or (change is nn.Module.double)
        compare([copy.deepcopy(model)(x)], [after], 1e-5)


def test_half_precision_after_compiling() -> None:
    model, x = unet().eval(), image()
    compiled = torch.compile(model, backend="fastunet", options={"fallback": "eager"})
    with torch.no_grad():
        compiled(x)
        model.half()
        half = compiled(x.half())
        assert half.dtype == torch.float16
        compare([copy.deepcopy(model)(x.half())], [half], 2e-2)


def test_switching_between_training_and_inference() -> None:
    model, x = unet(), image()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="fastunet", options={"fallback": "eager"})
    for _ in range(2):
        for m in (model, plain):
            m.train()
        compare([plain(x)], [compiled(x)], 1e-5)
        for m in (model, plain):
            m.eval()
        with torch.inference_mode():
            compare([plain(x)], [compiled(x)], 1e-5)


# --- training ---


def trained(model: nn.Module, forward: Any, *, steps: int = 3, accumulate: int = 1) -> list[Tensor]:
    """Parameters and buffers after some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    generator = torch.Generator().manual_seed(2)
    dtype = next(model.parameters()).dtype
    for step in range(steps * accumulate):
        x = torch.randn(2, 1, 16, 18, generator=generator).to(dtype)
        target = torch.randn(2, 2, 16, 18, generator=generator).to(dtype)
        (F.mse_loss(forward(x), target) / accumulate).backward()
        if step % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad()
    return [*model.parameters(), *model.buffers()]


def compiled_and_plain(**options: Any) -> tuple[nn.Module, nn.Module, Any]:
    plain = unet(**options).double()
    model = copy.deepcopy(plain)
    return plain, model, torch.compile(model, backend="fastunet", options=FORCED)


def test_gradient_accumulation() -> None:
    plain, model, compiled = compiled_and_plain()
    compare(trained(plain, plain, accumulate=3), trained(model, compiled, accumulate=3), 1e-11)


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
def test_gradient_checkpointing(fallback: str) -> None:
    """Ops within the checkpointed regions are ours too, and the running statistics move once."""
    plain = Checkpointed(unet()).double()
    model = copy.deepcopy(plain)
    counter = compiler.find_patterns
    found: list[Any] = []

    def counting(graph_module: Any, **options: Any) -> Any:
        result = counter(graph_module, **options)
        found.append(result)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "find_patterns", counting)
        compiled = torch.compile(model, backend="fastunet", options={"fallback": fallback, "force": True})
        actual = trained(model, compiled)
    inner = [len(patterns) for _, patterns in found[-1]]
    assert inner == [2, 3, 4]
    uncompiled = trained(plain.net, plain.net)  # Eager checkpointing moves the statistics twice.
    compare(uncompiled, actual, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fallback", ["eager", "aot_eager"])
def test_autocast_with_a_scaler(dtype: torch.dtype, fallback: str) -> None:
    """A step under autocast: loss, gradients and statistics as far from float32's as the plain model's, or near it."""
    exact = unet()
    plain, model = copy.deepcopy(exact), copy.deepcopy(exact)
    compiled = torch.compile(model, backend="fastunet", options={"fallback": fallback, "force": True})
    x, target = image(), torch.randn(2, 2, 16, 18)
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


def test_autocast_in_inference_runs_the_ops() -> None:
    """In bfloat16 the up-convolution is not composed, so its two steps are ops of their own."""
    model, x = unet().eval(), image()
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
    expected_ops = {"conv3x3_batch_norm_relu": 5, "conv_transpose2x2": 1, "conv3x3_relu_conv1x1": 1}
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
    plain, x = Padded().double(), image(2, 17, 19).double()
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, backend="fastunet", options={"force": force})
    expected, actual = plain(x), compiled(x)
    compare([expected], [actual], 1e-11)
    cotangent = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected.backward(cotangent)
    actual.backward(cotangent)
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-11, atol=1e-10)


def test_inductor_runs_the_ops_in_inference() -> None:
    """With the default fallback; the weights are prepared at the first call and found again at the next."""
    model, x = unet().eval(), image()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="fastunet")
    with torch.no_grad():
        compare([plain(x)], [compiled(x)], 1e-5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastunet.folding.fold_batch_norm", None)
            counts = ops_run(lambda: compiled(x))
    assert {name: counts[name] for name in IN_INFERENCE} == IN_INFERENCE


RANK = """
import copy, os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, os.environ["TESTS"])
from test_compiler import FORCED, IN_TRAINING, compare, ops_run, trained, unet
dist.init_process_group("gloo")
dist._DEFAULT_FIRST_BUCKET_BYTES = 1000  # Of at most what the other buckets have.
rank = dist.get_rank()
plain = unet().double()
model = copy.deepcopy(plain)
results = []
for net, options in ((plain, None), (model, FORCED)):
    wrapped = DistributedDataParallel(net, bucket_cap_mb=0.002)  # So small that the graph is split between buckets.
    forward = wrapped if options is None else torch.compile(wrapped, backend="fastunet", options=options)
    results.append(trained(net, lambda x: forward(x + rank)))
compare(*results, 1e-10)
assert max(float((a - b).abs().max()) for a, b in zip(results[0], unet().double().parameters())) > 1e-3
counts = ops_run(lambda: forward(torch.randn(2, 1, 16, 18).double()))
assert {name: counts[name] // 2 for name in IN_TRAINING} == IN_TRAINING, counts
dist.destroy_process_group()
print("same on rank", rank)
"""


def test_distributed_training_of_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    environment = {**os.environ, "TESTS": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("same")) == [
        "same on rank 0",
        "same on rank 1",
    ]


# --- sizes ---


def compiles(backend: Any, *, training: bool, sizes: list[tuple[int, int]]) -> list[int]:
    """How often Dynamo calls the backend in a first and a second pass over batches and sizes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    model = unet().train(training)
    compiled = torch.compile(model, backend=counter)
    counts = []
    with torch.set_grad_enabled(training), torch._dynamo.config.patch(recompile_limit=64):
        for _ in range(2):
            for batch, size in sizes:
                compiled(torch.randn(batch, 1, size, size))
            counts.append(counter.frame_count)
    return counts


SIZES = [(batch, size) for batch in (1, 2, 4, 7, 9) for size in range(64, 257, 16)]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_more_compiles_than_aot_eager(training: bool) -> None:
    sizes = SIZES[:: 7 if training else 4]
    expected = compiles("aot_eager", training=training, sizes=sizes)

    def forced(graph_module: Any, inputs: Any) -> Any:
        return compiler.fastunet_backend(graph_module, inputs, options={"fallback": "aot_eager", "force": True})

    actual = compiles(forced, training=training, sizes=sizes)
    assert actual[0] <= expected[0]
    assert actual[1] == actual[0]
