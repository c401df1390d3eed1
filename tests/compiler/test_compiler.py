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
from parity import FORCED, IN_INFERENCE, IN_TRAINING, compare, ops_run, small_image, small_unet
from torch import Tensor, nn

import fastunet
from fastunet.checks import ConfigError
from fastunet.reference import ReferenceUNet

# --- one word ---


def test_the_name_is_known_without_importing_fastunet_and_needs_no_cpp_compiler(tmp_path: Path) -> None:
    """Without one the rest runs eagerly, and it is said once."""
    script = """
import sys, warnings, torch
from torch import nn
assert "fastunet" in torch.compiler.list_backends(), torch.compiler.list_backends()
assert "fastunet" not in sys.modules
x = torch.randn(1, 1, 8, 8)
with warnings.catch_warnings(record=True) as caught, torch.no_grad():
    warnings.simplefilter("always")
    for _ in range(2):
        torch._dynamo.reset()
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 5)).eval()
        torch.testing.assert_close(torch.compile(model, backend="fastunet")(x), model(x))
assert "fastunet.compiler.backend" in sys.modules
said = [str(w.message) for w in caught if "no C++ compiler" in str(w.message)]
assert len(said) == 1, [str(w.message) for w in caught]
"""
    environment = {**os.environ, "PATH": str(tmp_path)}
    environment.pop("CXX", None)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, env=environment)


@pytest.mark.parametrize("way", ["torch.compile", "model.compile", "fastunet.compile"])
def test_three_ways_to_say_it(way: str) -> None:
    model, x = small_unet().eval(), small_image()
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
    model, x = small_unet(), small_image()
    compiled = torch.compile(model, backend="fastunet", options=FORCED)
    compiled(x)  # Compiles outside of the count.
    counts = ops_run(lambda: compiled(x).square().mean().backward())
    # The dispatcher counts an op once above autograd and once below.
    assert {name: counts[name] // 2 for name in IN_TRAINING} == IN_TRAINING
    assert {name: counts[f"{name}_backward"] for name in IN_TRAINING} == IN_TRAINING


def test_training_on_the_cpu_is_left_to_inductor_and_explain_says_so() -> None:
    model, x = small_unet(), small_image()
    compiled = torch.compile(model, backend="fastunet", options={"fallback": "eager"})
    assert ops_run(lambda: compiled(x)) == {}
    before = copy.deepcopy(model.state_dict())
    explanation = fastunet.explain(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "it changes nothing"
    assert explanation.replaced == 0
    assert {row.implementation for row in explanation.rows} == {"inductor"}
    assert all(row.reason.startswith("the op would run on ATen here") for row in explanation.rows)


def test_explain_lists_what_replaces_what() -> None:
    model, x = small_unet().eval(), small_image()
    rows = fastunet.explain(model, x).rows
    assert [(row.layer, row.op, row.replaced_by, row.implementation) for row in rows[:2]] == [
        ("inc.double_conv.0", "conv3x3 + batch_norm + relu", "conv3x3_batch_norm_relu", "onednn"),
        ("inc.double_conv.3", "conv3x3 + batch_norm + relu + max_pool", "conv3x3_batch_norm_relu", "onednn"),
    ]
    assert rows[-1].layer == "up1.conv.double_conv.3"
    on_gpu = fastunet.explain(model, x, device="cuda")
    assert on_gpu.replaced == 0
    assert on_gpu.left == 8


def test_explain_passes_on_what_a_forced_backend_cannot_run() -> None:
    with fastunet.backend("triton"), pytest.raises(fastunet.checks.BackendError, match="device is cpu"):
        fastunet.explain(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1)), small_image())


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
    compiled = torch.compile(small_unet(), backend="fastunet", options=options)
    with pytest.raises(Exception, match=message) as raised:
        compiled(small_image())
    assert isinstance(getattr(raised.value, "inner_exception", raised.value), ConfigError)


def test_mode_and_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.compile_fx as inductor

    seen: list[Any] = []

    def compile_fx(graph_module: Any, inputs: Any, config_patches: Any = None) -> Any:
        seen.append(config_patches)
        return graph_module.forward

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    torch.compile(small_unet().eval(), backend="fastunet", mode="max-autotune-no-cudagraphs")(small_image())
    torch._dynamo.reset()
    torch.compile(small_unet().eval(), backend="fastunet", options={"epilogue_fusion": False})(small_image())
    assert seen == [{"max_autotune": True, "coordinate_descent_tuning": True}, {"epilogue_fusion": False}]


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
    model, x = Flat().eval(), small_image()
    with torch.no_grad():
        expected = model(x)
        actual = torch.compile(model, backend="fastunet", options={"fallback": "eager"})(x)
        compare(list(expected), list(actual), 1e-6)
    assert [t.stride() for t in actual] == [t.stride() for t in expected]


def test_channels_last_models_stay_channels_last() -> None:
    model = small_unet().eval().to(memory_format=torch.channels_last)
    x = small_image().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        actual = torch.compile(model, backend="fastunet", options={"fallback": "eager"})(x)
        assert actual.stride() == model(x).stride()


# --- changes after compiling ---


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)


def statistics(model: nn.Module) -> None:
    for name, b in model.named_buffers():
        if name.endswith("running_var"):
            b.mul_(3)


def through_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(1.5)


@pytest.mark.parametrize("fallback", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_changes_of_the_weights_are_seen(fallback: str) -> None:
    model, x = small_unet().eval(), small_image()
    compiled = torch.compile(model, backend="fastunet", options={"fallback": fallback})
    initial = copy.deepcopy(model.state_dict())
    tolerances = {torch.float16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-5}
    with torch.no_grad():
        for change in (in_place, statistics, through_data, nn.Module.double, nn.Module.half):
            model.load_state_dict(initial)  # Else they would add up, beyond the tolerance.
            before = compiled(x.to(next(model.parameters()).dtype))
            change(model)
            dtype = next(model.parameters()).dtype
            after, expected = compiled(x.to(dtype)), copy.deepcopy(model)(x.to(dtype))
            assert after.dtype == dtype
            compare([expected], [after], tolerances[dtype])
            changed = float((after.double() - before.double()).abs().max())
            assert changed > 1e-3 or dtype != torch.float32, change.__name__
