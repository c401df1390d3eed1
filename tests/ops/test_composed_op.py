"""The step up as one kernel where whole ops and nets run on Triton: when it is taken, what it gives, and whose weights
it has.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conv3x3_checks import upsampling_inputs
from fastunet.kernels import gpu
from kernel_device import DEVICE, HOPPER, INTERPRETED, MARK, kernel_names, on
from torch import Tensor, nn

import fastunet
from fastunet import dispatch, ops
from fastunet.cpu import folding
from fastunet.testing import assert_within, composed_sums_expected, random_input, stored

pytestmark = [MARK, pytest.mark.usefixtures("ieee")]
if not INTERPRETED and torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("tensor descriptors need sm_90", allow_module_level=True)

HALF = torch.float16
KERNEL = "conv_transpose2x2_concat_conv3x3_kernel"
OP = "conv_transpose2x2_concat_conv3x3_relu"


@pytest.fixture(autouse=True)
def forced() -> Iterator[None]:
    with on(HOPPER), fastunet.backend("triton"), torch.no_grad():
        yield


def arguments(size: tuple[int, int], c_low: int = 32, c_out: int = 64) -> tuple[Tensor, ...]:
    """skip, low, up_weight, up_bias, weight of an image of that size."""
    return tuple(upsampling_inputs(size, n=2, c_low=c_low, c_out=c_out).values())


@pytest.mark.parametrize(
    ("size", "format"),
    [((6, 10), torch.channels_last), ((7, 10), torch.contiguous_format), ((3, 5), torch.channels_last)],
)
@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("up_first", [False, True])
def test_parity(size: tuple[int, int], format: torch.memory_format, repeats: bool, up_first: bool) -> None:
    """By a transposed convolution, or by repeating low's pixels."""
    skip, low, *parameters = arguments(size)
    skip, low = (t.contiguous(memory_format=format) for t in (skip, low))
    if repeats:
        parameters = [None, None, random_input((64, skip.shape[1] + low.shape[1], 3, 3), dtype=HALF, device=DEVICE)]
    with gpu.recording() as steps:
        y = ops.conv_transpose2x2_concat_conv3x3_relu(skip, low, *parameters, relu=False, up_first=up_first)
    assert kernel_names(steps).count(KERNEL) == 1
    value, error = composed_sums_expected(skip, low, *parameters, up_first=up_first)
    assert_within(y, value, stored(value, error, HALF))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (arguments((6, 10), c_out=32), "multiples of 16 channels to more than 32"),
        (tuple(t.float() for t in arguments((6, 10))), "16 bits"),
        (arguments((6, 10), c_low=24), None),  # What dispatch is not told.
    ],
    ids=["channels", "float32", "low"],
)
def test_elsewhere_in_two_steps(given: tuple[Tensor, ...], why: str | None) -> None:
    skip, low, up_weight, up_bias, weight = given
    with gpu.recording() as steps:
        y = ops.conv_transpose2x2_concat_conv3x3_relu(*given)
    assert kernel_names(steps).count(KERNEL) == 0
    up = ops.conv_transpose2x2(low, up_weight, up_bias)
    up = nn.functional.pad(up, [0, skip.shape[3] - up.shape[3], 0, skip.shape[2] - up.shape[2]])
    assert_within(y, ops.concat_conv3x3_bias_relu(skip, up, weight), 0)
    if why is not None:
        choice = dispatch.choose(OP, skip, weight)
        assert choice.implementation == "aten"
        assert why in choice.reason


def net(**options: object) -> fastunet.UNet:
    torch.manual_seed(0)
    model = fastunet.UNet(1, 2, features=(64, 128), **options).to(DEVICE)
    with fastunet.backend("aten"):
        model(image().float())  # Moves the running statistics.
    return model.eval()


def image() -> Tensor:
    return random_input((1, 1, 4, 6), dtype=HALF, device=DEVICE)


def test_a_net_takes_it_in_inference() -> None:
    """And under autocast, whose weights in float32 are here those of 16 bits: to the same bits."""
    model, x = net().half(), image()
    plain = {}
    for folds in (True, False):
        model.up1.folds_upsampling = folds
        with gpu.recording() as steps:
            plain[folds] = model(x)
        assert kernel_names(steps).count(KERNEL) == folds
    assert not torch.equal(plain[True], plain[False])
    model.float()
    for folds in (True, False):
        model.up1.folds_upsampling = folds
        with torch.autocast(DEVICE.type, HALF), gpu.recording() as steps:
            y = model(x.float())
        assert kernel_names(steps).count(KERNEL) == folds
        assert_within(y, plain[folds], 0)
    model.up1.folds_upsampling = True
    with torch.enable_grad(), torch.autocast(DEVICE.type, HALF), gpu.recording() as steps:
        model(x.float())
    assert kernel_names(steps).count(KERNEL) == 0


def test_a_compiled_net_takes_it() -> None:
    model, x = net().half(), image()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with gpu.recording() as steps:
        y = compiled(x)
    assert kernel_names(steps).count(KERNEL) == 1
    assert_within(y, model(x), 0)


def test_explain_says_so() -> None:
    model, x = net().half(), image()
    rows = {row.op: row for row in fastunet.explain(model, x).rows}
    assert (rows[OP].implementation, rows[OP].layer) == ("triton", "up1.up")
    model.up1.folds_upsampling = False
    assert OP not in {row.op for row in fastunet.explain(model, x).rows}


@pytest.mark.parametrize("norm", ["batch", None])
def test_changes_of_weights_are_seen(norm: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are composed again at the first call after one has changed, and at no other."""
    model, x = net(norm=norm).half(), image()
    made: list[int] = []
    compose = folding.compose_upsampling
    monkeypatch.setattr(folding, "compose_upsampling", lambda *given: made.append(1) or compose(*given))
    before = model(x)
    for times, p in enumerate((model.up1.up.weight, model.up1.up.bias, model.up1.conv.double_conv[0].weight), start=2):
        p.data.mul_(1.5)
        after = model(x)
        assert not torch.equal(after, before)
        assert_within(model(x), after, 0)
        assert len(made) == times
        before = after
