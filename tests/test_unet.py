"""fastunet.UNet against its reference model, and its parameter names against milesial/Pytorch-UNet's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from unet_pair import assert_trains_alike, moved

import fastunet
from fastunet import dispatch
from fastunet.checks import ConfigError, ShapeError
from fastunet.cpu.prepared_net import PreparedNet
from fastunet.reference import ReferenceUNet
from fastunet.testing import UNIT_ROUNDOFF, assert_within

SMALL = (4, 8, 16)


def milesial_keys(bilinear: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of milesial/Pytorch-UNet's UNet(3, 2, bilinear), written out from its definition."""
    shapes: dict[str, tuple[int, ...]] = {}

    def double_conv(prefix: str, a: int, b: int, mid: int | None = None) -> None:
        for index, (i, o) in ((0, (a, mid or b)), (3, (mid or b, b))):
            shapes[f"{prefix}.double_conv.{index}.weight"] = (o, i, 3, 3)
            for name in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{prefix}.double_conv.{index + 1}.{name}"] = (o,)
            shapes[f"{prefix}.double_conv.{index + 1}.num_batches_tracked"] = ()

    factor = 2 if bilinear else 1
    double_conv("inc", 3, 64)
    for i, (a, b) in enumerate(((64, 128), (128, 256), (256, 512), (512, 1024 // factor)), 1):
        double_conv(f"down{i}.maxpool_conv.1", a, b)
    ups = ((1024, 512 // factor), (512, 256 // factor), (256, 128 // factor), (128, 64))
    for i, (a, b) in enumerate(ups, 1):
        if not bilinear:
            shapes[f"up{i}.up.weight"], shapes[f"up{i}.up.bias"] = (a, a // 2, 2, 2), (a // 2,)
        double_conv(f"up{i}.conv", a, b, a // 2 if bilinear else None)
    shapes["outc.conv.weight"], shapes["outc.conv.bias"] = (2, 64, 1, 1), (2,)
    return shapes


@pytest.mark.parametrize(("upsample", "count"), [("transpose", 118), ("bilinear", 110)])
def test_state_dict_is_milesials(upsample: str, count: int) -> None:
    expected = milesial_keys(upsample == "bilinear")
    assert len(expected) == count
    with torch.device("meta"):
        for kind in (fastunet.UNet, ReferenceUNet):
            state = kind(3, 2, upsample=upsample).state_dict()
            assert {name: tuple(t.shape) for name, t in state.items()} == expected


# Each value of an option with each of another.
OPTIONS = [
    {"norm": "batch", "upsample": "transpose", "activation": "relu", "head": None},
    {"norm": "batch", "upsample": "bilinear", "activation": "leaky_relu", "head": "sigmoid"},
    {"norm": "batch", "upsample": "transpose", "activation": "leaky_relu", "head": "softmax"},
    {"norm": "instance", "upsample": "bilinear", "activation": "leaky_relu", "head": None},
    {"norm": "instance", "upsample": "transpose", "activation": "relu", "head": "sigmoid"},
    {"norm": "instance", "upsample": "bilinear", "activation": "relu", "head": "softmax"},
    {"norm": None, "upsample": "transpose", "activation": "leaky_relu", "head": None},
    {"norm": None, "upsample": "bilinear", "activation": "relu", "head": "sigmoid"},
    {"norm": None, "upsample": "transpose", "activation": "relu", "head": "softmax"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_its_reference(options: dict, training: bool) -> None:
    torch.manual_seed(0)
    model = moved(fastunet.UNet(2, 3, features=SMALL, **options)).double().train(training)
    assert_trains_alike(model, model.to_reference(), torch.randn(2, 2, 13, 18, dtype=torch.float64))


@pytest.mark.parametrize("upsample", ["transpose", "bilinear"])
def test_every_size_from_the_smallest_up(upsample: str) -> None:
    model = fastunet.UNet(1, 2, features=(2, 2, 4, 4, 4), upsample=upsample).double().eval()
    reference = model.to_reference()
    with torch.no_grad():
        for height, width in [*((16 + i, 33 - i) for i in range(18)), (16, 16), (17, 64)]:
            x = torch.randn(1, 1, height, width, dtype=torch.float64)
            torch.testing.assert_close(model(x), reference(x), rtol=1e-9, atol=1e-9)


def test_too_small_an_image_raises_with_the_minimum() -> None:
    with torch.device("meta"):
        model, instance = fastunet.UNet(1, 2), fastunet.UNet(1, 2, norm="instance")
    with pytest.raises(ShapeError, match=r"height and width >= 16 .*got 15x64"):
        model(torch.zeros(1, 1, 15, 64))
    with pytest.raises(ShapeError, match=r"height or width >= 32 .*got 16x31"):
        instance(torch.zeros(1, 1, 16, 31))
    with pytest.raises(ShapeError, match="expected 1 input channels, got 3"):
        model(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(("norm", "training"), [("instance", False), ("batch", True)])
def test_one_pixel_at_the_bottom_is_refused_as_by_torch(norm: str, training: bool) -> None:
    """No statistics can be taken of it; of two they can."""
    model = fastunet.UNet(1, 1, features=SMALL, norm=norm).double().train(training)
    x, reference = torch.randn(1, 1, 4, 8, dtype=torch.float64), model.to_reference()
    torch.testing.assert_close(model(x), reference(x), rtol=1e-9, atol=1e-9)
    for net in (model, reference):
        with pytest.raises(ValueError, match=r"more than (1|one) (value per channel|pixel|spatial element)"):
            net(x[..., :4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "layer"}, "norm: expected one of 'batch', 'instance', None, got 'layer'"),
        ({"activation": "gelu"}, "activation: expected one of"),
        ({"head": "tanh"}, "head: expected one of"),
        ({"features": (8,)}, "two or more features"),
        ({"features": (8, 0)}, "features >= 1"),
        ({"dims": 1}, "dims: expected 2, of images, or 3, of volumes, got 1"),
        ({"dims": 3, "upsample": "bilinear"}, "upsample: expected one of 'transpose', 'trilinear', got 'bilinear'"),
        ({"dims": 2, "upsample": "trilinear"}, "upsample: expected one of 'transpose', 'bilinear', got 'trilinear'"),
    ],
)
def test_unknown_options_raise(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastunet.UNet(1, 2, **options)


def test_milesials_spelling() -> None:
    model = fastunet.UNet(3, 2, features=SMALL, upsample="bilinear")
    same = fastunet.UNet(n_channels=3, n_classes=2, bilinear=True, features=SMALL)
    assert same.config == model.config
    assert str(same) == str(model)
    assert fastunet.UNet(3, n_classes=2, bilinear=False, features=SMALL).config["upsample"] == "transpose"
    with pytest.raises(ConfigError, match=r"out_channels: expected a number .*\(also known as n_classes\), got none"):
        fastunet.UNet(n_channels=3)
    with pytest.raises(ConfigError, match="upsample or bilinear, which mean the same, got both"):
        fastunet.UNet(3, 2, bilinear=True, upsample="transpose")


def test_moves_to_another_dtype_and_device() -> None:
    model, x = fastunet.UNet(1, 2, features=SMALL).eval().bfloat16(), torch.randn(1, 1, 16, 16, dtype=torch.bfloat16)
    assert model(x).dtype == torch.bfloat16
    y = model.to("meta")(x.to("meta"))
    assert (y.shape, y.device.type) == ((1, 2, 16, 16), "meta")


@pytest.mark.parametrize("norm", ["batch", pytest.param("instance", marks=pytest.mark.slow), None])
def test_compiles_in_one_graph(norm: str | None) -> None:
    torch._dynamo.reset()
    model = fastunet.UNet(1, 2, features=(2, 4), norm=norm)
    x = torch.randn(2, 1, 17, 16)
    cotangent = torch.randn(2, 2, 17, 16)
    model(x).backward(cotangent)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).backward(cotangent)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, True), (torch.float32, False), (torch.float64, False)])
@pytest.mark.usefixtures("layers_of_any_size")
def test_inference_compiles_in_one_graph(dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the graph hold what dispatch would answer: it would be traced through a question to a GPU or a file."""
    torch._dynamo.reset()
    model, x = fastunet.UNet(1, 2, features=(2, 4)).to(dtype).eval(), torch.randn(2, 1, 17, 16, dtype=dtype)
    for up in model.ups:  # In bfloat16 the model composes what the graph rounds between two steps.
        up.folds_upsampling = not autocast
    choose = dispatch.choose

    def asked(*args: Any, **options: Any) -> dispatch.Choice:
        if torch.compiler.is_dynamo_compiling():
            raise AssertionError("asked while the graph is traced")
        return choose(*args, **options)

    monkeypatch.setattr(dispatch, "choose", asked)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_within(compiled(x), model(x), 0)
        model.inc.double_conv[0].weight.data.mul_(2)
        assert_within(compiled(x), model(x), 0)
        with fastunet.backend("aten"):  # What was traced for the one runs on the other.
            assert_within(compiled(x), model(x), 0)


@pytest.mark.parametrize("training", [False, True])
def test_an_image_of_another_dtype_or_device_is_one_clear_error(training: bool) -> None:
    model = fastunet.UNet(1, 2, features=(2, 4)).train(training)
    with torch.set_grad_enabled(training):
        with pytest.raises(fastunet.checks.DtypeError, match=r"expected dtype torch\.float64 .* got torch\.float32"):
            model(torch.zeros(1, 1, 8, 8, dtype=torch.float64))
        with pytest.raises(fastunet.checks.DeviceError, match=r"expected device meta .* got cpu"):
            model(torch.zeros(1, 1, 8, 8, device="meta"))


@pytest.mark.parametrize("change", [lambda t: t[:1].clone(), Tensor.double], ids=["one value", "float64"])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_small_net_refuses_what_torchs_batch_norm_refuses(name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Though it folds the norm into the convolution's weight, which any numbers could be multiplied with."""
    model, x = fastunet.UNet(1, 2, features=(2, 4)).eval(), torch.zeros(1, 1, 8, 8)
    with torch.no_grad():
        model(x)
        parameter = getattr(model.inc.double_conv[1], name)
        parameter.data = change(parameter.data)
        for net in (model.to_reference(), model):
            with pytest.raises(RuntimeError):
                net(x)


@pytest.mark.parametrize("size", [(0, 128, 128), (1, 64, 64), (2, 128, 128), (2, 130, 75)], ids=str)
def test_a_small_net_of_packed_and_composed_layers_equals_its_reference(size: tuple[int, int, int]) -> None:
    """Eleven convolutions follow each other; a sum of up to 864 products is off by 6 sqrt(864) unit roundoffs of the
    largest value: 2,000 in all.
    """
    torch.manual_seed(0)
    model = moved(fastunet.UNet(1, 2, features=(16, 32, 64))).eval()
    count, height, width = size
    x = torch.randn(count, 1, height, width)
    with torch.no_grad():
        is_prepared = isinstance(model._way(x), PreparedNet)
        # A weight that changes is seen, whatever was made of it.
        for name in ("", "up2.up.weight", "up2.conv.double_conv.0.weight", "inc.double_conv.3.weight"):
            if name:
                model.get_parameter(name).mul_(2)
            expected = model.to_reference().double()(x.double())
            largest = float(expected.abs().max()) if count else 1.0
            assert_within(model(x), expected, 2000 * UNIT_ROUNDOFF[torch.float32] * largest)
    if dispatch.has_onednn():
        assert is_prepared == (count > 0)


def recorded(y: Tensor) -> Counter[str]:
    """Return how often autograd has recorded each kind of node for y, those of parameters included."""
    found, pending = set(), [y.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in found:
            found.add(node)
            pending += [following for following, _ in node.next_functions]
    return Counter(node.name() for node in found)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("norm", ["batch", None])
def test_training_on_the_cpu_records_what_torchs_layers_record(norm: str | None, autocast: bool) -> None:
    """But for a padding by nothing; and a layer that gains by an op of ours is the only one that has it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for features, ours in (((4, 8, 16), 0), ((4, 352), 1)):  # 352 to 352: a weight gradient as a matrix product.
            model = fastunet.UNet(1, 2, features=features, norm=norm)
            x = torch.randn(2, 1, 16, 16).to(memory_format=torch.channels_last)
            found, expected = recorded(model(x)), recorded(model.to_reference()(x))
            del expected["ConstantPadNdBackward0"]
            assert found["Conv3x3Backward"] == ours
            if not ours:
                assert found == expected


def memory_of(call: Callable[[], Tensor]) -> tuple[int, int]:
    """Return the bytes that a call takes at most, and that it leaves beside its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(changes)), sum(changes) - result.untyped_storage().nbytes()


@pytest.mark.parametrize("way", ["auto", "aten", "freeze"])
def test_no_call_of_inference_takes_more_than_the_one_before(way: str) -> None:
    """But for weights, which the first call may prepare and keep."""
    net: Any = fastunet.UNet(1, 2, features=(4, 8, 16)).eval()
    net = fastunet.freeze(net) if way == "freeze" else net
    with torch.no_grad(), fastunet.backend("aten" if way == "aten" else "auto"):
        first, *others = [memory_of(lambda: net(torch.zeros(2, 1, 64, 64))) for _ in range(4)]
    assert len(set(others)) == 1
    assert others[0][1] == 0
    if way == "aten":
        assert first == others[0]
