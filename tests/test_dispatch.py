"""Which implementation runs, and that it says why."""

from __future__ import annotations

import runpy
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from explained import narrow_and_whole
from fastunet.kernels import autotune, gpu
from torch import nn

import fastunet
from fastunet import dispatch
from fastunet.checks import BackendError, ConfigError
from fastunet.explanation import Explanation, Row

CPU = torch.zeros(1)
not_interpreting = pytest.mark.skipif(dispatch.interpreting(), reason="TRITON_INTERPRET=1 lets kernels run on the CPU")


def test_backend_is_restored_and_process_wide() -> None:
    before = dispatch.selected_backend()
    seen: list[str] = []
    with fastunet.backend("aten"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.selected_backend()))
        thread.start()
        thread.join()
        with pytest.raises(ZeroDivisionError), fastunet.backend("auto"):
            raise ZeroDivisionError
        assert dispatch.selected_backend() == "aten"
    assert seen == ["aten"]
    assert dispatch.selected_backend() == before


def test_unknown_backend_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="expected one of auto, triton, aten, got 'cudnn'"), fastunet.backend("cudnn"):
        pass
    monkeypatch.setenv("FASTUNET_BACKEND", "fast")
    with pytest.raises(ConfigError, match="FASTUNET_BACKEND: expected one of auto, triton, aten, got 'fast'"):
        runpy.run_path(dispatch.__file__)
    monkeypatch.setenv("FASTUNET_BACKEND", "auto")
    monkeypatch.setenv("FASTUNET_TUNE", "2")
    with pytest.raises(ConfigError, match="FASTUNET_TUNE: expected one of 0, 1, force, got '2'"):
        runpy.run_path(dispatch.__file__)


@not_interpreting
def test_auto_on_cpu_is_aten_with_the_reason() -> None:
    with fastunet.backend("auto"):
        assert dispatch.choose("conv3x3_bias_relu", CPU).implementation == "aten"
        assert "cpu, not cuda" in dispatch.choose("conv3x3_bias_relu", CPU).reason
        assert "no Triton kernel" in dispatch.choose("conv5x5", CPU).reason


@not_interpreting
def test_forced_triton_raises_where_it_cannot_run() -> None:
    x, w = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3)
    with fastunet.backend("triton"), pytest.raises(BackendError, match=r"'triton' was asked for, but .*cpu, not cuda"):
        fastunet.ops.conv3x3_bias_relu(x, w)


def test_float64_has_no_kernel() -> None:
    assert "not torch.float64" in (dispatch.triton_unsupported(torch.device("cuda"), torch.float64) or "")


@pytest.mark.parametrize(
    ("conv", "cudnn", "everywhere", "allowed"),
    [
        ("tf32", "ieee", "ieee", True),
        ("ieee", "tf32", "tf32", False),
        ("none", "tf32", "ieee", True),
        ("none", "none", "tf32", True),
        ("none", "none", "none", False),
        ("none", "ieee", "tf32", False),
    ],
)
def test_tf32_follows_torchs_setting(
    monkeypatch: pytest.MonkeyPatch, conv: str, cudnn: str, everywhere: str, allowed: bool
) -> None:
    of_cudnn = SimpleNamespace(fp32_precision=cudnn, conv=SimpleNamespace(fp32_precision=conv))
    monkeypatch.setattr(torch, "backends", SimpleNamespace(fp32_precision=everywhere, cudnn=of_cudnn))
    assert dispatch.tf32_allowed() is allowed


def test_explain_names_each_layer_without_running_or_changing_it() -> None:
    model = fastunet.UNet(1, 2, features=(2, 4), norm=None)
    with fastunet.backend("triton"):
        table = fastunet.explain(model, torch.zeros(1, 1, 9, 9), device="cuda")
    chosen = {row.layer: row.implementation for row in table.rows}
    assert chosen["inc.double_conv.3"] == "triton"
    assert chosen["up1.up"] == "triton"
    assert "backend is set to triton" in str(table)
    batch_norm = fastunet.UNet(1, 2, features=(2, 4))
    fastunet.explain(batch_norm, torch.zeros(2, 1, 9, 9))
    assert batch_norm.inc.double_conv[1].num_batches_tracked == 0
    assert torch.equal(batch_norm.inc.double_conv[1].running_mean, torch.zeros(2))


@pytest.mark.parametrize(
    ("norm", "training", "count"),
    [("batch", True, 23), ("batch", False, 22), ("instance", False, 23), (None, True, 23)],
)
def test_every_layer_of_the_unet_has_a_kernel(norm: str | None, training: bool, count: int) -> None:
    """In inference the last convolution has the head in it, but for instance norm."""
    model = fastunet.UNet(1, 2, norm=norm).train(training)
    with fastunet.backend("triton"):
        rows = fastunet.explain(model, torch.zeros(1, 1, 64, 64), device="cuda").rows
    assert {row.implementation for row in rows} == {"triton"}
    assert (rows[-1].op == "conv1x1", len(rows)) == (count == 23, count)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("options", [{}, {"norm": "instance", "features": (4, 8)}, {"features": (64,) * 9}], ids=str)
def test_a_printed_explanation_is_narrow_and_keeps_layers_apart(
    options: dict[str, Any], device: str, training: bool
) -> None:
    with torch.device("meta"):
        model = fastunet.UNet(3, 2, **options).train(training)
    narrow_and_whole(fastunet.explain(model, torch.empty(1, 3, 512, 512, device="meta"), device=device))


def test_a_printed_explanation_of_long_names_several_dtypes_or_nothing() -> None:
    long = "blocks.".join([""] * 12)
    row = Row(f"encoder.1.{long}conv1", "conv" * 20, "[1, 2048, 1024, 1024] bfloat16", "onednn", "why " * 60)
    other = replace(row, layer=f"encoder.2.{long}conv1", input="[1, 3, 8, 8] float32", replaced_by="conv1x1")
    narrow_and_whole(Explanation((row, other, replace(other, layer=f"encoder.2.{long}conv2"))))
    assert "layer" in str(Explanation(()))


def test_explain_shows_what_is_not_fastunets() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 5), fastunet.UNet(2, 1, features=(2, 4)))
    rows = fastunet.explain(net, torch.zeros(1, 1, 16, 16)).rows
    assert (rows[0].layer, rows[0].op, rows[0].reason) == ("0", "convolution", "not one of fastunet's ops")
    assert all(row.op in ("conv3x3_batch_norm_relu", "conv_transpose2x2", "conv1x1") for row in rows[1:])


HOPPER = gpu.known_target(90)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A GPU where a convolution of 8 channels to 16 on images of 32x24 passed its check, with what is known of it."""
    monkeypatch.setattr(dispatch, "triton_unsupported", lambda *_: None)
    monkeypatch.setattr(gpu, "target", lambda _: HOPPER)

    def put(failed: str | None = "", **known: float | str) -> None:
        layer = autotune.layer("conv3x3_bias_relu", torch.empty(1, 8, 32, 24), torch.empty(16, 8, 3, 3), training=True)
        row = {"op": layer.op, "dtype": autotune.format_of(torch.float32, dispatch.tf32_allowed())}
        check = [] if failed is None else [row | {"shape": {}, "failed": failed}]
        autotune.put(HOPPER.name, [*check, row | {"shape": layer.shape} | known], keep=False)

    with fastunet.backend("auto"):
        yield put


@pytest.mark.usefixtures("layers_of_any_size")
def test_auto_takes_what_was_measured_faster_and_nothing_else(measured: Callable[..., None]) -> None:
    x, weight = torch.empty(5, 8, 32, 24), torch.empty(16, 8, 3, 3)

    def choose(x: torch.Tensor = x, *, training: bool = True) -> dispatch.Choice:
        return dispatch.choose("conv3x3_bias_relu", x, weight, training=training)

    measured(failed=None, speedup=1.25)
    assert choose().unmeasured is not None, "its check comes first"
    measured(speedup=1.25)
    assert choose() == dispatch.Choice("triton", "measured on sm_90: 1.25 times as fast as ATen", speedup=1.25)
    assert choose(x[:1]).implementation == "triton", "in any batch"
    for other in (choose(x[:, :, 1:]), choose(x.half())):
        assert (other.implementation, other.unmeasured is None) == ("aten", False)
        assert other.reason == "the Triton kernel is not measured for this layer on sm_90"
    assert choose(training=False).implementation == "onednn", "on this CPU"
    assert "size of the layer" in choose(torch.empty(0)).reason
    measured(speedup=1.02)
    assert choose().reason == "measured on sm_90: 1.02 times as fast as ATen, too little"
    for known in ({"failed": "y is off"}, {"speedup": 1.25, "failed": "y is off"}):
        measured(**known)
        assert (choose().implementation, choose().unmeasured) == ("aten", None)
        assert choose().reason == "on sm_90 the Triton kernel is not used: y is off"
    measured(skipped="no time was left")
    assert (choose().unmeasured, "not measured for this layer on sm_90: no time" in choose().reason) == (None, True)


@not_interpreting
def test_a_choice_is_made_once_and_seen_to_depend_on_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that decides is part of the key: the answer is each time that of asking anew."""
    decided: list[tuple] = []
    decide = dispatch._decide
    monkeypatch.setattr(dispatch, "_decide", lambda *given: decided.append(given) or decide(*given))
    monkeypatch.setattr(dispatch, "_MOST_CHOICES", 8)
    x, weight = torch.empty(2, 128, 64, 64), torch.empty(128, 128, 3, 3)
    op = "conv3x3_bias_relu"
    calls: list[Callable[[], dispatch.Choice]] = [
        lambda: dispatch.choose(op, x, weight),
        lambda: dispatch.choose(op, x, weight, training=True),
        lambda: dispatch.choose(op, x.double(), weight.double()),
        lambda: dispatch.choose(op, x[:0], weight),
        lambda: dispatch.choose(op, x[:, :64], weight[:, :64]),
        lambda: dispatch.choose("max_pool2x2", x),
    ]
    names = [call().implementation for call in calls]
    assert names == ["onednn", "winograd", "aten", "aten", "onednn", "aten"]
    assert [call().implementation for call in calls] == names
    assert len(decided) == len(calls), "each once"
    with fastunet.backend("aten"):
        assert calls[0]().reason == "backend is set to aten"
    with torch.backends.mkldnn.flags(enabled=False):
        assert calls[0]().implementation == "aten"
    assert calls[0]().implementation == "onednn"
    for side in range(16, 40):
        dispatch.choose(op, torch.empty(1, 1, side, side), weight)
        assert len(dispatch._choices) <= 8


def test_explain_and_a_compiled_graph_choose_by_the_table(measured: Callable[..., None]) -> None:
    first, second = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
    # The last keeps what leaves the graph from being an activation, which on a CPU would be the op's.
    net, x = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AvgPool2d(2)), torch.zeros(5, 8, 32, 24)
    measured(speedup=1.5)
    assert [(row.layer, row.implementation, row.replaced_by) for row in fastunet.explain(net, x).rows] == [
        ("0", "triton", "conv3x3_bias_relu"),
        ("2", "inductor", ""),
    ]
    measured(speedup=1.05)
    assert fastunet.explain(net, x).replaced == 0, "inductor gains as much over ATen"
