"""The benchmarks' providers: each computes what float64 does, within derived bounds, or says why it cannot run."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest
import torch
from fastunet.benchmarks import providers, runtimes
from fastunet.benchmarks.cases import unet_layers
from fastunet.benchmarks.providers import OURS, OURS_FROZEN, OURS_TRITON, Provider, layer_providers, net_providers
from fastunet.benchmarks.results import Unavailable
from fastunet.benchmarks.runs import check_layer, device_inputs, net_check

import fastunet
from fastunet import dispatch
from fastunet.testing import cpu_accumulates_in_float32

CPU = torch.device("cpu")
LAYERS = {layer.name: layer for layer in unet_layers(3, 2, (8, 16), 2, 12, 20)}
BFLOAT16 = pytest.mark.skipif(
    not cpu_accumulates_in_float32(torch.bfloat16), reason="this processor sums products of bfloat16 in bfloat16"
)
DTYPES = (torch.float32, pytest.param(torch.bfloat16, marks=BFLOAT16))


def by_name(found: list[Provider]) -> dict[str, Provider]:
    assert len({provider.name for provider in found}) == len(found)
    return {provider.name: provider for provider in found}


def problem(norm: str | None = "batch") -> tuple[fastunet.UNet, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = fastunet.UNet(3, 2, features=(4, 8), norm=norm)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model, torch.randn(2, 3, 12, 20), torch.randint(0, 2, (2, 2, 12, 20)).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_eager_baselines_of_a_layer_are_right_and_wrong_ones_caught(name: str, dtype: torch.dtype) -> None:
    layer = LAYERS[name]
    inputs = device_inputs(layer, CPU, dtype)
    checked = []
    for provider in layer_providers(layer, CPU, dtype):
        if not provider.unavailable and not provider.name.startswith("compile"):
            result = provider.prepare(inputs)()
            check_layer(layer, inputs, result)
            y, *others = result if isinstance(result, tuple) else (result,)
            with pytest.raises(AssertionError, match=f"{layer.op}: y: "):
                check_layer(layer, inputs, (1.02 * y, *others))
            assert (y.dtype, y.stride(1) == 1) == (dtype, provider.layout == "NHWC")
            checked.append(provider.name)
    assert checked == [OURS, "onednn eager", "onednn eager NCHW"]


def test_compiled_layers_are_right_and_compiled_once() -> None:
    layer = LAYERS["up1.c1"]
    provider = by_name(layer_providers(layer, CPU, torch.bfloat16))["compile"]
    for seed in range(2):
        inputs = {name: t + seed for name, t in device_inputs(layer, CPU, torch.bfloat16).items()}
        run = provider.prepare(inputs)
        with torch.compiler.set_stance("fail_on_recompile") if seed else torch.compiler.set_stance("default"):
            check_layer(layer, inputs, run())


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["batch", None])
def test_eager_baselines_of_a_net_are_right(training: bool, dtype: torch.dtype, norm: str | None) -> None:
    model, x, target = problem(norm)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    check = net_check(model, x, target, training=training)
    checked = []
    for provider in net_providers(CPU, dtype, training=training):
        if provider.unavailable or provider.name.startswith("compile"):
            continue
        if norm is None and provider.name == "eager folded":
            with pytest.raises(Unavailable, match="no batch norm"):
                provider.prepare(model, x, target)
            continue
        right = provider.prepare(model, x, target if training else None)()
        check(provider, right)
        for wrong in (right * (1.001 if dtype == torch.float32 else 2), right * float("nan")):
            with pytest.raises(AssertionError, match=f"{provider.name}: distance to float64"):
                check(provider, wrong)
        checked.append(provider.name)
    expected = {OURS, "eager", "eager channels_last" if dtype == torch.float32 else "eager channels_last AMP"}
    if not training:
        expected |= {"eager channels_last"} | ({"eager folded"} if norm else set())
        expected |= {OURS_FROZEN} if dispatch.prepares_nets(x, dtype, []) else set()
        expected |= {name for name in runtimes.NAMES if not runtimes.unavailable(name, CPU, dtype)}
    assert set(checked) == expected
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), "prepare changed the model"


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_nets_are_right(training: bool) -> None:
    model, x, target = problem()
    check = net_check(model, x, target, training=training)
    checked = []
    for provider in net_providers(CPU, torch.float32, training=training):
        if provider.name.startswith("compile") and not provider.unavailable:
            check(provider, provider.prepare(model, x, target)())
            checked.append(provider.name)
    assert checked == (["compile"] if training else ["compile", "compile freezing"])


def test_training_steps_train() -> None:
    model, x, target = problem()
    for provider in net_providers(CPU, torch.bfloat16, training=True):
        if not provider.unavailable and not provider.name.startswith("compile"):
            run = provider.prepare(model, x, target)
            losses = [float(run()) for _ in range(20)]
            assert losses[-1] < losses[0], provider.name


def test_what_cannot_run_says_why() -> None:
    layer = LAYERS["inc.c2"]
    found = by_name(layer_providers(layer, CPU, torch.bfloat16)) | by_name(
        net_providers(CPU, torch.bfloat16, training=False)
    )
    reasons = {name: provider.unavailable for name, provider in found.items() if provider.unavailable}
    assert reasons.pop(OURS_TRITON)
    assert reasons.pop("ONNX Runtime") == "its convolutions on a CPU are in float32"
    assert reasons.pop("OpenVINO", "needs openvino: ").startswith("needs openvino: ")
    assert runtimes.unavailable("OpenVINO", torch.device("cuda"), torch.float32) == "measured on CPUs only"
    assert reasons == {
        "cudnn graph": "the device is cpu, not cuda",
        "fastunet CUDA graph": "CUDA graphs need CUDA, the device is cpu",
        "compile max-autotune": "max-autotune takes minutes on a CPU, and was not asked for",
        "compile CUDA graphs": "CUDA graphs need CUDA, the device is cpu",
    }
    assert not by_name(layer_providers(layer, CPU, torch.bfloat16, thorough=True))["compile max-autotune"].unavailable


def test_compiled_functions_do_not_share_a_code_object() -> None:
    made = [providers.own_code(lambda a, b: a - b) for _ in range(2)]
    assert made[0](5, 3) == 2
    assert made[0].__code__ is not made[1].__code__


def test_a_capture_warms_up_beside_and_replays() -> None:
    cuda = MagicMock()
    replay = providers.capture(cuda.run, cuda)
    calls = [name.rpartition("().")[2] for name, *_ in cuda.mock_calls]
    assert calls == [
        *("Stream", "current_stream", "wait_stream", "stream", "__enter__", "run", "run", "run", "__exit__"),
        *("current_stream", "wait_stream", "CUDAGraph", "graph", "__enter__", "run", "__exit__"),
    ]
    assert replay() is cuda.run.return_value
    assert cuda.CUDAGraph().replay.call_count == 1
