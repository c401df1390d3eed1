"""The norm ops on their Triton kernels against the reference in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from fastunet.kernels import gpu
from kernel_device import DEVICE, MARK, kernel_names
from torch import Tensor

import fastunet
from fastunet import ops
from fastunet.ops.conv3x3 import ConvArgs
from fastunet.reference import functional as reference

pytestmark = [MARK, pytest.mark.usefixtures("ieee")]

FORMS = {
    "conv3x3_{}_norm_relu": ((2, 3, 5, 6), (4, 3, 3, 3)),
    "conv3x3_{}_norm_relu_pool": ((2, 3, 5, 6), (4, 3, 3, 3)),
    "concat_conv3x3_{}_norm_relu": ((2, 3, 5, 6), (2, 2, 5, 6), (4, 5, 3, 3)),
}
MODES = {
    "batch": {"training": True, "momentum": 0.3, "eps": 1e-3},
    "batch_eval": {"training": False, "eps": 1e-3},
    "instance": {"eps": 1e-3},
}
every_form = pytest.mark.parametrize("form", FORMS)
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def forced():
    with fastunet.backend("triton"):
        yield


def run(
    namespace, form: str, mode: str, dtype: torch.dtype, needs_grad: tuple[bool, ...] | None = None,
    memory_format: torch.memory_format = torch.channels_last, backward_on: str | None = None, **options,
) -> list[Tensor]:  # fmt: skip
    """Outputs, gradients and buffers of one op on random tensors, the same for every dtype."""
    kind, shapes = mode.partition("_")[0], FORMS[form]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator) for s in (*shapes, (4,), (4,))]
    buffers = [torch.randn(4, generator=generator), torch.rand(4, generator=generator) + 0.5] if kind == "batch" else []
    tensors = [t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for t in tensors]
    tensors, buffers = ([t.to(DEVICE, dtype) for t in ts] for ts in (tensors, buffers))
    needs_grad = needs_grad or (True,) * len(tensors)
    for t, want in zip(tensors, needs_grad, strict=True):
        t.requires_grad_(want)
    outputs = getattr(namespace, form.format(kind))(*tensors, *buffers, **MODES[mode], **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads: tuple[Tensor, ...] = ()
    if any(needs_grad):
        cotangents = [torch.randn(y.shape, generator=generator).to(DEVICE, dtype) for y in outputs]
        with fastunet.backend(backward_on or fastunet.dispatch.selected_backend()):
            grads = torch.autograd.grad(outputs, [t for t in tensors if t.requires_grad], cotangents)
    return [*outputs, *grads, *buffers]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Relative error in the 2-norm below 1e-5: a hundred roundings of float32."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape, i
        error = (a.double() - b).norm() / b.norm()
        assert error < 1e-5, f"result {i}: relative error {error:.1e}"


OPTIONS = [
    (torch.contiguous_format, {}),
    (torch.channels_last, {"relu": False}),
    (torch.channels_last, {"negative_slope": 0.5}),
]


@every_form
@every_mode
def test_values_gradients_and_buffers(form: str, mode: str) -> None:
    """Each op, and each mode, with each of the options."""
    memory_format, options = OPTIONS[(list(FORMS).index(form) + list(MODES).index(mode)) % 3]
    actual = run(ops, form, mode, torch.float32, memory_format=memory_format, **options)
    assert_close(actual, run(reference, form, mode, torch.float64, **options))
    for t in actual:
        assert t.dim() != 4 or t.is_contiguous(memory_format=memory_format)


@every_mode
def test_combinations_of_requires_grad(mode: str) -> None:
    form = "concat_conv3x3_{}_norm_relu"
    for needs_grad in itertools.product((True, False), repeat=5):
        if sum(needs_grad) in (2, 3):  # All, none, one, or all but one.
            continue
        actual = run(ops, form, mode, torch.float32, needs_grad)
        assert_close(actual, run(reference, form, mode, torch.float64, needs_grad))


@every_form
@every_mode
def test_backend_changed_between_forward_and_backward(form: str, mode: str) -> None:
    expected = run(reference, form, mode, torch.float64)
    assert_close(run(ops, form, mode, torch.float32, backward_on="aten"), expected)
    with fastunet.backend("aten"):
        assert_close(run(ops, form, mode, torch.float32, backward_on="triton"), expected)


@every_mode
def test_what_is_kept_for_backward_is_raw_alone(mode: str) -> None:
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        run(ops, "conv3x3_{}_norm_relu_pool", mode, torch.float32)
    assert [shape for shape in saved if len(shape) == 4 and shape[2:] != (3, 3)] == [(2, 3, 5, 6), (2, 4, 5, 6)]


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(pool: bool, training: bool, requires_grad: bool) -> None:
    x, weight, gamma, beta, mean, variance = (
        torch.randn(shape, device=DEVICE) for shape in ((2, 2, 4, 4), (3, 2, 3, 3), *[(3,)] * 4)
    )
    for t in (x, weight, gamma, beta):
        t.requires_grad_(requires_grad)
    statistics = (mean, variance.square() + 0.5)
    options = {"momentum": 0.1, "eps": 1e-3, "slope": 0.0, "pool": pool}
    args = ConvArgs(x, None, weight, beta, "batch", gamma, *statistics, training, **options)
    torch.library.opcheck(torch.ops.fastunet.conv3x3.default, tuple(args))
    if not training:
        args = args._replace(norm="instance", running_mean=None, running_var=None)
        torch.library.opcheck(torch.ops.fastunet.conv3x3.default, tuple(args))


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("training", [False, True])
def test_a_step_of_the_unet(norm: str, training: bool) -> None:
    torch.manual_seed(0)
    model = fastunet.UNet(1, 2, features=(3, 5), norm=norm).to(DEVICE).train(training)
    exact = model.to_reference().double()
    x, cotangent = (torch.randn(2, channels, 5, 6, device=DEVICE) for channels in (1, 2))
    y, expected = model(x), exact(x.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        if not training:
            torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-4)
    y.backward(cotangent)
    expected.backward(cotangent.double())
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        error = (p.grad.double() - q.grad).norm() / q.grad.norm()
        assert error < 1e-4, f"{name}: relative error {error:.1e}"
    for (name, b), c in zip(model.named_buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(b.double(), c.double(), rtol=1e-5, atol=1e-5, msg=name)


def test_the_kernels_ran() -> None:
    """The other tests would pass on ATen as well."""
    with gpu.recording() as launches:
        run(ops, "conv3x3_{}_norm_relu_pool", "batch", torch.float32)
    assert kernel_names(launches) == [
        *("conv3x3_kernel", "finish_statistics_kernel", "normalise_kernel"),
        *("norm_sums_kernel", "sum_rows_kernel", "norm_grad_kernel"),
        *("conv3x3_input_grad_kernel", "conv3x3_weight_grad_kernel", "sum_rows_kernel"),
    ]
    with torch.no_grad(), gpu.recording() as launches:
        run(ops, "conv3x3_{}_norm_relu_pool", "batch_eval", torch.float32, (False,) * 4)
    assert kernel_names(launches) == ["conv3x3_kernel"]


@pytest.mark.parametrize("mode", ["batch", "instance"])
def test_mixed_precision_keeps_parameters_in_float32(mode: str) -> None:
    shapes = ((2, 8, 6, 6), (16, 8, 3, 3), (16,), (16,))
    leaves = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
    buffers = [torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE)] if mode == "batch" else []
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = getattr(ops, f"conv3x3_{mode}_norm_relu")(*leaves, *buffers, **MODES[mode])
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y, leaves, torch.randn_like(y))
    assert [g.dtype for g in grads] == [torch.float32] * 4
    if buffers:
        assert not torch.equal(buffers[0].cpu(), torch.zeros(16))
