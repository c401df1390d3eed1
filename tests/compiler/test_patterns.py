"""What is one of fastunet's ops in a graph of torch functions, and what is not: exact counts, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import assert_same, patterns_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fastunet.compiler.patterns import WITH_UPSAMPLING, Pattern

X = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """Modules by name, and a function of them and the inputs."""

    def __init__(self, run: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def conv(channels: int = 3, out: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, **{"padding": 1, **options})


def chain(*modules: nn.Module) -> nn.Sequential:
    net = nn.Sequential(*modules)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d):
            for t in (module.weight, module.bias, module.running_mean, module.running_var):
                if t is not None:
                    t.data.uniform_(0.5, 2)
    return net


def by_chain(chains: list[nn.Module], training: bool) -> list[list[Pattern]]:
    """The patterns of each chain, whose numbers stay the same: all are of one image, in one graph."""
    found: list[list[Pattern]] = [[] for _ in chains]
    net = Net(lambda m, x: [chain(x) for chain in m.chains], chains=nn.ModuleList(chains))
    for pattern in assert_same(net.train(training), X).found:
        found[int(pattern.layer.split(".")[1])].append(pattern)
    return found


ONE_OP = {
    "conv3x3": (lambda: chain(conv()), "conv3x3"),
    "no bias": (lambda: chain(conv(bias=False), nn.ReLU()), "conv3x3 + relu"),
    "same": (lambda: chain(conv(padding="same"), nn.ReLU()), "conv3x3 + relu"),
    "leaky": (lambda: chain(conv(), nn.LeakyReLU(0.2, inplace=True)), "conv3x3 + leaky_relu"),
    "batch norm": (
        lambda: chain(conv(bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        "conv3x3 + batch_norm + relu",
    ),
    "bias before batch norm": (lambda: chain(conv(), nn.BatchNorm2d(4), nn.ReLU()), "conv3x3 + batch_norm + relu"),
    "batch norm without parameters": (lambda: chain(conv(), nn.BatchNorm2d(4, affine=False)), "conv3x3 + batch_norm"),
    "batch norm without statistics": (
        lambda: chain(conv(), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()),
        "conv3x3 + batch_norm + relu",
    ),
    "momentum": (lambda: chain(conv(), nn.BatchNorm2d(4, momentum=0.3, eps=1e-2)), "conv3x3 + batch_norm"),
    "instance norm": (
        lambda: chain(conv(), nn.InstanceNorm2d(4, affine=True), nn.LeakyReLU()),
        "conv3x3 + instance_norm + leaky_relu",
    ),
    "dropout of nothing": (
        lambda: chain(conv(), nn.Dropout2d(0.0), nn.BatchNorm2d(4), nn.Dropout(0.0), nn.ReLU()),
        "conv3x3 + batch_norm + relu",
    ),
    "pool": (lambda: chain(conv(), nn.ReLU(), nn.MaxPool2d(2)), "conv3x3 + relu + max_pool"),
    "stride": (lambda: chain(conv(stride=2)), "conv3x3 of stride 2x2"),
    "stride and batch norm": (
        lambda: chain(conv(stride=(2, 2)), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.MaxPool2d(2)),
        "conv3x3 of stride 2x2 + batch_norm + leaky_relu + max_pool",
    ),
    "stride and instance norm": (
        lambda: chain(conv(stride=2, bias=False), nn.InstanceNorm2d(4, affine=True), nn.ReLU()),
        "conv3x3 of stride 2x2 + instance_norm + relu",
    ),
    "transposed": (lambda: chain(nn.ConvTranspose2d(3, 4, 2, stride=2)), "conv_transpose2x2"),
    "head": (lambda: chain(nn.Conv2d(3, 4, 1)), "conv1x1"),
    "sigmoid": (lambda: chain(nn.Conv2d(3, 4, 1), nn.Sigmoid()), "conv1x1 + sigmoid"),
    "softmax": (lambda: chain(nn.Conv2d(3, 4, 1), nn.Softmax(dim=1)), "conv1x1 + softmax"),
    "prelu follows": (lambda: chain(conv(), nn.BatchNorm2d(4), nn.PReLU()), "conv3x3 + batch_norm"),
    "silu follows": (lambda: chain(conv(), nn.SiLU()), "conv3x3"),
    "group norm follows": (lambda: chain(conv(), nn.GroupNorm(2, 4), nn.ReLU()), "conv3x3"),
    "statistics of each image and of all": (
        lambda: chain(conv(), nn.InstanceNorm2d(4, track_running_stats=True)),
        "conv3x3",
    ),
    "larger pool follows": (lambda: chain(conv(), nn.ReLU(), nn.MaxPool2d(3, 2)), "conv3x3 + relu"),
    "softmax over rows": (lambda: chain(nn.Conv2d(3, 4, 1), nn.Softmax(dim=2)), "conv1x1"),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_op(training: bool) -> None:
    """What each chain becomes, exactly, and that it computes the same."""
    found = by_chain([make() for make, _ in ONE_OP.values()], training)
    replaced = [[pattern.description for pattern in patterns if pattern.is_replaced] for patterns in found]
    assert dict(zip(ONE_OP, replaced, strict=True)) == {name: [text] for name, (_, text) in ONE_OP.items()}


def test_active_dropout_ends_a_pattern() -> None:
    net = chain(conv(), nn.Dropout2d(0.5), nn.ReLU())
    assert patterns_of(net.train(), X).descriptions == ["conv3x3"]
    assert patterns_of(net.eval(), X).descriptions == ["conv3x3 + relu"]


def pruned(module: nn.Conv2d) -> nn.Conv2d:
    module = prune.random_unstructured(module, "weight", amount=0.5)
    with torch.no_grad():
        module(X)  # Leaves it with a masked weight that has no history, which can be copied.
    return module


LEFT = {
    "stride": (lambda: conv(stride=3), "stride (3, 3) instead of (1, 1)"),
    "oblong stride": (lambda: conv(stride=(2, 1)), "stride (2, 1) instead of (1, 1)"),
    "stride of a head": (lambda: nn.Conv2d(3, 4, 1, stride=2), "stride (2, 2) instead of (1, 1)"),
    "padding": (lambda: conv(padding=0), "padding (0, 0) instead of (1, 1)"),
    "groups": (lambda: conv(out=3, groups=3), "groups 3 instead of 1"),
    "padding mode": (lambda: conv(padding_mode="reflect"), "padding (0, 0) instead of (1, 1)"),
    "kernel": (lambda: nn.Conv2d(3, 4, 5, padding=2), "conv2d of 5x5"),
    "oblong kernel": (lambda: nn.Conv2d(3, 4, (3, 1), padding=(1, 0)), "conv2d of 3x1"),
    "transposed 3x3": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), "conv_transpose2d of 3x3"),
    "output padding": (lambda: nn.ConvTranspose2d(3, 4, 2, stride=2, output_padding=1), "output_padding (1, 1)"),
    "overlapping pool": (lambda: nn.MaxPool2d(3, 2, 1), "max_pool2d of 3x3"),
    "ceil": (lambda: nn.MaxPool2d(2, ceil_mode=True), "ceil_mode"),
    "upsampling": (lambda: nn.Upsample(scale_factor=2), "upsampling by interpolation has no op"),
    "parametrised": (lambda: parametrizations.weight_norm(conv()), "its weight is computed"),
    "pruned": (lambda: pruned(conv()), "its weight is computed"),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_what_is_no_op_exactly_is_left_with_the_reason(training: bool) -> None:
    found = by_chain([make() for make, _ in LEFT.values()], training)
    for (name, (_, reason)), patterns in zip(LEFT.items(), found, strict=True):
        assert [pattern.is_replaced for pattern in patterns] == [False], name
        assert reason in patterns[0].reason, name


def test_what_is_no_batch_of_floating_point_images_is_left() -> None:
    single = patterns_of(nn.Sequential(conv()), X[0])
    assert single.reasons == ["expected floating-point images [N, C, H, W], got torch.float32 [4, 9, 8]"]
    imaginary = patterns_of(nn.Sequential(conv(dtype=torch.complex64)), X.to(torch.complex64))
    assert imaginary.reasons == ["expected floating-point images [N, C, H, W], got torch.complex64 [2, 4, 9, 8]"]


def test_a_shared_weight_is_left() -> None:
    """It would be prepared for one of its uses, and thrown away for the other."""
    net = Net(lambda m, x: m.a(m.a(x)), a=conv(3, 3))
    patterns = assert_same(net.train(), X)
    assert patterns.ops == []
    assert patterns.reasons == ["its weight is shared by 2 convolutions (a)"] * 2


# --- values that others need ---


@pytest.mark.parametrize("norm_is_returned", [False, True])
def test_what_others_see_keeps_existing(norm_is_returned: bool) -> None:
    """Deep supervision: each value inside a chain that is returned too ends the pattern there."""

    def run(m: Any, x: Tensor) -> Any:
        raw = m.conv(x)
        normal = m.norm(raw)
        return normal if norm_is_returned else raw, F.relu(normal)

    patterns = assert_same(Net(run, conv=conv(), norm=nn.BatchNorm2d(4)).train(), X)
    assert patterns.descriptions == ["conv3x3 + batch_norm" if norm_is_returned else "conv3x3"]


def test_a_skip_is_used_beside_its_pool() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = F.relu(m.conv(x))
        return y, F.max_pool2d(y, 2), F.max_pool2d(y, 2), y * 2

    patterns = assert_same(Net(run, conv=conv()).train(), X)
    assert patterns.descriptions == ["conv3x3 + relu + max_pool", "max_pool"]


def test_a_value_changed_in_place_under_a_second_name_is_not_fused() -> None:
    """relu_ of what the pool also reads: the pool sees it changed."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.conv(x)
        F.relu_(y)
        return F.max_pool2d(y, 2)

    patterns = assert_same(Net(run, conv=conv()).train(), X)
    assert patterns.descriptions == ["conv3x3", "max_pool"]


@pytest.mark.parametrize("change", ["method", "setitem", "iadd", "out"])
def test_an_input_changed_between_two_steps_is_not_fused(change: str) -> None:
    """The op stands where the last step stood, and would read the changed image."""

    def run(m: Any, x: Tensor) -> Any:
        z = x * 1
        y = m.conv(z)
        if change == "method":
            z.add_(1)
        elif change == "setitem":
            z[:, 0] = 2.0
        elif change == "iadd":
            z += 1
        else:
            torch.add(z, 1, out=z)
        return m.norm(y), z

    patterns = assert_same(Net(run, conv=conv(), norm=nn.BatchNorm2d(4)).eval(), X)
    assert patterns.descriptions == ["conv3x3"]


def view_then_change(y: Tensor) -> Any:
    z = y.view(y.shape[0], -1)
    y.add_(1)
    return z, y


def change_a_view(y: Tensor) -> Any:
    y.view(y.shape[0], -1).mul_(3)
    return y, y + 1


def change_by_another(y: Tensor) -> Any:
    y += y.flip(3)
    y[:, 0] = 1.0
    return y.permute(0, 2, 3, 1)


def change_by_an_activation(y: Tensor) -> Any:
    return F.elu(y, inplace=True)


CHANGES = (change_by_an_activation, view_then_change, change_a_view, change_by_another)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_what_an_op_gives_may_be_changed_in_place(change: Callable[[Tensor], Any], training: bool) -> None:
    """Through the result itself or what shares its memory, which a copy with other strides would not."""
    net = Net(lambda m, x: change(m.norm(m.conv(x))), conv=conv(), norm=nn.BatchNorm2d(4)).train(training)
    assert assert_same(net, X).descriptions == ["conv3x3 + batch_norm"]


def test_statistics_move_in_the_order_they_did() -> None:
    """One batch norm after two convolutions: fused, the second's would come first."""

    def run(m: Any, x: Tensor) -> Any:
        a, b = m.a(x), m.b(x)
        a, b = m.norm(a), m.norm(b)
        b = F.relu(b)
        return F.relu(a) + b

    patterns = assert_same(Net(run, a=conv(), b=conv(), norm=nn.BatchNorm2d(4, momentum=0.4)).train(), X)
    assert sorted(patterns.descriptions) == ["conv3x3", "conv3x3 + batch_norm"]


def test_a_chain_across_the_end_of_autocast_is_cut_there() -> None:
    def run(m: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = m.conv(x)
        return F.relu(y.float())

    patterns = patterns_of(Net(run, conv=conv()).train(), X)
    assert patterns.descriptions == ["conv3x3"]


def test_a_parametrised_norm_is_computed_before_the_op() -> None:
    """Its gamma is made after the convolution; the op stands after both."""

    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    net = chain(conv(), nn.BatchNorm2d(4), nn.ReLU())
    parametrize.register_parametrization(net[1], "weight", Double())
    assert assert_same(net.train(), X).descriptions == ["conv3x3 + batch_norm + relu"]


# --- joined inputs ---


def joined(order: str, up: nn.Module, pad: Callable[[Tensor, Tensor], Tensor] | None = None) -> Net:
    def run(m: Any, skip: Tensor, low: Tensor) -> Tensor:
        high = m.up(low)
        high = high if pad is None else pad(high, skip)
        both = [skip, high] if order == "skip first" else [high, skip]
        return F.relu(m.conv(torch.cat(both, dim=1)))

    return Net(run, up=up, conv=conv(6, 4))


UPSAMPLING = {
    "transposed": lambda: nn.ConvTranspose2d(5, 3, 2, stride=2),
    "bilinear": lambda: nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), nn.Conv2d(5, 3, 1)
    ),
}


@pytest.mark.parametrize(
    ("order", "up", "training"),
    [
        ("skip first", "transposed", True),
        ("up first", "transposed", False),
        ("skip first", "bilinear", False),
    ],
)
def test_joined_inputs(order: str, up: str, training: bool) -> None:
    net = joined(order, UPSAMPLING[up]()).train(training)
    patterns = assert_same(net, torch.randn(2, 3, 8, 6), torch.randn(2, 5, 4, 3))
    assert patterns.descriptions[-1] == "cat + conv3x3 + relu"


@pytest.mark.parametrize("mode", ["constant", "replicate"])
def test_joined_inputs_of_odd_sizes(mode: str) -> None:
    net = joined("skip first", UPSAMPLING["transposed"](), lambda up, skip: F.pad(up, (0, 1, 0, 1), mode=mode))
    patterns = assert_same(net.train(), torch.randn(2, 3, 9, 7), torch.randn(2, 5, 4, 3))
    assert patterns.descriptions == ["conv_transpose2x2", "cat + conv3x3 + relu"]


@pytest.mark.parametrize("order", ["skip first", "up first"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{"mode": "nearest"}, *({"mode": "bilinear", "align_corners": corners} for corners in (False, True))],
    ids=str,
)
def test_an_interpolated_input_is_not_concatenated(options: dict[str, Any], stride: int, order: str) -> None:
    """It is one pattern with the convolution, which alone is replaced."""
    net = joined(order, nn.Upsample(scale_factor=2, **options))
    net.conv = conv(8, 4, stride=stride)
    patterns = assert_same(net.train(), torch.randn(2, 3, 8, 6), torch.randn(2, 5, 4, 3))
    convolved = "conv3x3" if stride == 1 else "conv3x3 of stride 2x2"
    assert [pattern.description for pattern in patterns.found] == [f"upsample + cat + {convolved} + relu"]
    assert "the upsampling before it is left" in patterns.found[0].reason
    assert patterns.descriptions == [pattern.description for pattern in patterns.found]


def test_an_interpolated_input_may_be_padded_and_is_one_patterns() -> None:
    up = nn.Upsample(scale_factor=2, mode="bilinear")
    net = joined("skip first", up, lambda up, skip: F.pad(up, (0, 1, 0, 1)))
    net.conv = conv(8, 4)
    images = torch.randn(2, 3, 9, 7), torch.randn(2, 5, 4, 3)
    assert assert_same(net.train(), *images).descriptions == ["upsample + cat + conv3x3 + relu"]

    def twice(m: Any, skip: Tensor, low: Tensor) -> Tensor:
        high = m.up(low)
        return m.a(torch.cat([skip, high], 1)) + m.b(high)

    used_twice = Net(twice, up=up, a=conv(8), b=conv(5))
    patterns = assert_same(used_twice.train(), images[0][:, :, :8, :6], images[1])
    assert [pattern.description for pattern in patterns.found] == ["upsample", "cat + conv3x3", "conv3x3"]


def test_three_inputs_or_another_dimension_are_joined_as_before() -> None:
    three = Net(lambda m, x: m.conv(torch.cat([x, x, x], 1)), conv=conv(9))
    assert assert_same(three.train(), X).descriptions == ["conv3x3"]
    rows = Net(lambda m, x: m.conv(torch.cat([x, x], 2)), conv=conv())
    assert assert_same(rows.train(), X).descriptions == ["conv3x3"]
    used_twice = Net(lambda m, x: (lambda y: m.conv(y) + y[:, :4])(torch.cat([x, x], 1)), conv=conv(6))
    assert assert_same(used_twice.train(), X).descriptions == ["conv3x3"]


# --- inference on the CPU: whole steps, with prepared weights ---


def folded(net: nn.Module, *inputs: Tensor) -> list[str]:
    """The descriptions in eval under auto, outputs compared in float32 to the bounds of a few roundings."""
    patterns = patterns_of(net.eval(), *inputs, force=False)
    torch._dynamo.reset()
    with torch.no_grad():
        actual = torch.compile(net, backend="fastunet", options={"fallback": "eager"})(*inputs)
        torch.testing.assert_close(actual, net.double()(*(x.double() for x in inputs)).float(), rtol=1e-5, atol=1e-5)
    return patterns.descriptions


@pytest.mark.parametrize("order", ["skip first", "up first"])
@pytest.mark.parametrize("pad", [None, "odd", "shifted"])
@pytest.mark.parametrize("up", ["conv_transpose2x2", "upsample"])
def test_the_step_up_is_one_op_in_inference(up: str, pad: str | None, order: str) -> None:
    by: nn.Module = nn.Upsample(scale_factor=2) if up == "upsample" else UPSAMPLING["transposed"]()
    widths = {None: None, "odd": (0, 1, 0, 1), "shifted": (1, 0, 1, 0)}[pad]
    net = joined(order, by, None if widths is None else lambda up, skip: F.pad(up, widths))
    skip = torch.randn(2, 3, 8, 6) if pad is None else torch.randn(2, 3, 9, 7)
    low = torch.randn(2, 3 if up == "upsample" else 5, 4, 3)
    expected = {
        None: [f"{up} + cat + conv3x3 + relu"],
        "odd": [f"{up} + pad + cat + conv3x3 + relu"],
        "shifted": [up, "cat + conv3x3 + relu"] if up != "upsample" else ["upsample + cat + conv3x3 + relu"],
    }
    assert folded(net, skip, low) == expected[pad]


@pytest.mark.parametrize(
    ("options", "is_folded"),
    [
        ({"scale_factor": (2.0, 2.0)}, True),
        ({"scale_factor": 2, "mode": "nearest-exact"}, True),
        ({"size": (8, 6)}, True),
        # The size is twice low's, but the seventh row repeats the third, not the fourth.
        ({"scale_factor": 2.2, "mode": "nearest-exact"}, False),
        ({"scale_factor": 2, "mode": "bilinear"}, False),
    ],
    ids=str,
)
def test_only_an_upsampling_that_repeats_pixels_is_folded(options: dict[str, Any], is_folded: bool) -> None:
    net = joined("skip first", Net(lambda m, x: F.interpolate(x, **options)))
    inputs = (torch.randn(2, 3, 8, 6), torch.randn(2, 3, 4, 3))
    (found,) = patterns_of(net.eval(), *inputs, force=False).found
    assert folded(net, *inputs) == ["upsample + cat + conv3x3 + relu"]
    assert (found.op == WITH_UPSAMPLING) == is_folded
    assert (found.interpolation is None) == is_folded


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: chain(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Sigmoid()),
            "conv3x3 + batch_norm + relu + conv1x1 + sigmoid",
        ),
        # Inductor makes one pass of the norm and the activation; the convolution's weight is prepared.
        (lambda: chain(conv(), nn.InstanceNorm2d(4, affine=True), nn.LeakyReLU()), "conv3x3"),
        (lambda: chain(conv(), nn.BatchNorm2d(4, affine=False), nn.ReLU()), "conv3x3 + batch_norm + relu"),
        # The op with a head has no stride.
        (
            lambda: chain(conv(stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
            "conv3x3 of stride 2x2 + batch_norm + relu",
        ),
    ],
    ids=["head", "instance norm", "bias before batch norm", "stride"],
)
def test_what_inference_folds(make: Callable[[], nn.Module], expected: str) -> None:
    assert folded(make(), X) == [expected]
