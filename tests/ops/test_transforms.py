"""What leaves plain reverse mode: forward-mode AD, torch.func and vmap of every op and loss, against the same of the
composition of torch functions that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from test_ops import (
    CASES,
    EACH_OP,
    INFERENCE,
    Case,
    X,
    assert_close,
    call,
    case_of,
    make_buffers,
    make_leaves,
    make_tensors,
)
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastunet
from fastunet import losses, ops
from fastunet.checks import ConfigError
from fastunet.inference.cuda_graphs import GraphedModel
from fastunet.reference import functional as reference

Function = Callable[..., tuple[Tensor, ...]]
LABELS = torch.randint(0, 3, (2, 1, 7, 6), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
LOSSES: dict[str, tuple[nn.Module, Tensor]] = {
    "dice": (losses.DiceLoss(sigmoid=True, reduction="none"), (LABELS != 0).expand(X)),
    "dice of labels": (losses.DiceLoss(softmax=True, to_onehot_y=True, ignore_index=2), LABELS),
    "dice of probabilities": (losses.DiceLoss(to_onehot_y=True, soft_label=True, other_act=torch.sigmoid), LABELS),
    "bce and dice": (losses.BCEDiceLoss(pos_weight=2.0, squared_pred=True), (LABELS == 1).expand(X)),
    "ce and dice": (losses.CEDiceLoss(weight=[1.0, 2.0, 3.0], ignore_index=0), LABELS),
}


def of_loss(name: str, expected: bool) -> Function:
    loss, target = LOSSES[name]

    def function(logits: Tensor) -> tuple[Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            if expected:
                patch.setattr(losses, "segmentation_sums", reference.segmentation_sums)
            return (loss(logits, target),)

    return function


def of_op(case: Case, namespace: Any) -> Function:
    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(tensors)
        arguments = [shape and next(remaining) for shape in case.shapes]
        return call(getattr(namespace, case.op), case, arguments, make_buffers(case, tensors[0].dtype))

    return function


PAIRS: dict[str, tuple[Function, Function, Case]] = {
    **{str(case): (of_op(case, ops), of_op(case, reference), case) for case in (*CASES, *INFERENCE)},
    **{name: (of_loss(name, False), of_loss(name, True), Case(name, (X,), {})) for name in LOSSES},
}


def like(tensors: Any, *batch: int) -> tuple[Tensor, ...]:
    """Random tensors of the shapes of some, a batch of them where asked for."""
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn((*batch, *t.shape), generator=generator, dtype=t.dtype) for t in tensors)


def scalar(f: Function) -> Callable[..., Tensor]:
    """The outputs of f weighed by random numbers and added up."""

    def function(*tensors: Tensor) -> Tensor:
        outputs = f(*tensors)
        weights = [torch.arange(y.numel()).sin().reshape(y.shape) for y in outputs]  # vmap refuses random numbers.
        return torch.stack([(y * w).sum() for y, w in zip(outputs, weights, strict=True)]).sum()

    return function


def jvp(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    return torch.func.jvp(f, tensors, like(tensors))


def dual_numbers(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    """One tensor at a time; the others have no tangent."""
    results: list[Tensor] = []
    for i, tangent in enumerate(like(tensors)):
        with forward_ad.dual_level():
            inputs = [forward_ad.make_dual(t, tangent) if j == i else t for j, t in enumerate(tensors)]
            results += [forward_ad.unpack_dual(y).tangent for y in f(*inputs)]
    return results


def per_sample_grads(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    in_dims = (0, *[None] * (len(tensors) - 1))
    grad = torch.func.grad(scalar(f), argnums=tuple(range(len(tensors))))
    return torch.func.vmap(grad, in_dims=in_dims)(*like(tensors[:1], 3), *tensors[1:])


def batched_cotangents(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = f(*leaves)
    return torch.autograd.grad(outputs, leaves, like(outputs, 2), is_grads_batched=True)


TRANSFORMS: dict[str, Callable[[Function, tuple[Tensor, ...]], Any]] = {
    "jvp": jvp,
    "forward_ad": dual_numbers,
    "vmap": lambda f, tensors: torch.func.vmap(f)(*like(tensors, 3)),
    "grad": lambda f, tensors: torch.func.grad(scalar(f), argnums=tuple(range(len(tensors))))(*tensors),
    "vmap of grad": per_sample_grads,
    "jacfwd": lambda f, tensors: torch.func.jacfwd(f)(*tensors),
    "jacrev": lambda f, tensors: torch.func.jacrev(f)(*tensors),
    "hessian": lambda f, tensors: torch.func.hessian(scalar(f))(*tensors),
    "batched cotangents": batched_cotangents,
}


def outcome(transform: Callable, f: Function, tensors: tuple[Tensor, ...]) -> tuple[list[Tensor], str]:
    """All results, or torch's error."""
    try:
        return torch.utils._pytree.tree_leaves(transform(f, tensors)), ""
    except RuntimeError as error:
        return [], str(error)


# Within torch.func an op is its composition, whatever the transform: the others are of one pair.
OF_ALL = ("jvp", "forward_ad", "vmap of grad", "batched cotangents")
OF_EACH_OP = [str(case) for case in EACH_OP]


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        *((name, transform) for name in (*OF_EACH_OP, *LOSSES) for transform in OF_ALL),
        # Ops for inference have no gradient outside torch.func.
        *((str(case), transform) for case in INFERENCE for transform in OF_ALL if transform != "batched cotangents"),
        *((OF_EACH_OP[0], transform) for transform in TRANSFORMS if transform not in OF_ALL),
    ],
)
def test_is_that_of_the_composition(name: str, transform: str) -> None:
    op, composition, case = PAIRS[name]
    tensors = tuple(t for t in make_tensors(case, torch.float64, torch.channels_last) if t is not None)
    (actual, error), (expected, expected_error) = (
        outcome(TRANSFORMS[transform], f, tensors) for f in (op, composition)
    )
    assert error == expected_error
    moves_statistics = case.buffers and case.options["training"] and "vmap" in transform
    assert bool(expected_error) == bool(moves_statistics), expected_error
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, b, f"result {i}")


def test_forward_mode_by_one_weight_and_reverse_mode_by_another() -> None:
    """Of two ops the first has no tangent: both are to agree on who takes the activation between them back."""
    results, case = [], case_of("double_conv3x3_bias_relu")
    for namespace in (ops, reference):
        x, w1, w2, *biases = (t for t in make_leaves(case, torch.float64, torch.channels_last) if t is not None)
        with forward_ad.dual_level():
            _, pooled = of_op(case, namespace)(x, w1, forward_ad.make_dual(w2, w2.detach().cos()), *biases)
            tangent = forward_ad.unpack_dual(pooled).tangent
            results.append(torch.autograd.grad(tangent, (x, w1, biases[0]), tangent.detach().cos()))
    for name, a, b in zip(["x", "w1", "b"], *results, strict=True):
        assert_close(a, b, name)


def test_a_backward_has_no_tangent_and_says_so() -> None:
    x, target = torch.randn(1, 2, 4, 4, requires_grad=True), torch.rand(1, 2, 4, 4)

    def sums(x: Tensor) -> Tensor:
        return ops.segmentation_sums(x, target)

    y = sums(x)
    grad = torch.randn_like(y)
    message = "segmentation_sums_backward has no forward-mode derivative: run the op's"
    with forward_ad.dual_level():
        torch.autograd.grad(y, x, grad, retain_graph=True)
        with pytest.raises(RuntimeError, match=message):
            torch.autograd.grad(y, x, forward_ad.make_dual(grad, grad), retain_graph=True)
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0], (grad,), (grad,))
    with pytest.raises(RuntimeError, match=r"no second derivative; transforms of torch.func"):
        torch.autograd.functional.jvp(sums, x, torch.ones_like(x))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_samples_with_labels_of_their_own(name: str) -> None:
    loss, target = LOSSES[name]
    (logits,) = like([torch.empty(X, dtype=torch.float64)], 2)
    targets = torch.stack([target, target.flip(0)])
    actual = torch.func.vmap(torch.func.grad(lambda x, t: loss(x, t).sum()))(logits, targets)
    for i in range(2):
        x = logits[i].clone().requires_grad_()
        assert_close(actual[i], torch.autograd.grad(loss(x, targets[i]).sum(), x)[0], f"sample {i}")


@pytest.mark.parametrize("transform", ["jvp", "forward_ad", "vmap of grad"])
@pytest.mark.parametrize("op", ["conv3x3_bias_relu", "conv1x1", "conv_transpose2x2", "conv3x3_relu_conv1x1"])
def test_under_autocast(op: str, transform: str) -> None:
    """The casts are those of torch's functions."""
    for case in (case for case in (*CASES, *INFERENCE) if case.op == op and "norm" not in case.options):
        tensors = tuple(t for t in make_tensors(case, torch.float32, torch.channels_last) if t is not None)
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = (TRANSFORMS[transform](f, tensors) for f in PAIRS[str(case)][:2])
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"norm": None}, {"norm": "instance", "upsample": "bilinear"}], ids=str)
def test_a_net_is_its_reference_model(options: dict[str, Any]) -> None:
    """Batch norm by running statistics; per-sample gradients are of a functional call."""
    model = fastunet.UNet(2, 3, features=(4, 8, 8), **options).double().eval()
    x, weights = *like([torch.empty(2, 2, 9, 11).double()]), dict(model.named_parameters())
    results = []
    for net in (model, model.to_reference()):
        function = partial(torch.func.functional_call, net)
        loss = lambda p, x: losses.CEDiceLoss()(function(p, x[None]), (x[None, :1] > 0).byte())  # noqa: B023, E731
        with torch.no_grad():
            jvp = torch.func.jvp(partial(function, weights), (x,), (x.cos(),))
        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
        results.append([*jvp, torch.func.vmap(net)(x[None]), *per_sample.values()])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert_close(a, b, f"result {i}")


def test_within_a_compiled_function() -> None:
    """By a backend that finds no patterns in a transform, and runs those of the rest."""
    torch._dynamo.reset()
    net, x = fastunet.UNet(2, 3, features=(4, 8), norm=None).to_reference(), *like([torch.empty(2, 2, 9, 11)])
    weights = dict(net.named_parameters())
    loss = lambda p, x: torch.func.functional_call(net, p, x[None]).square().sum()  # noqa: E731
    f = lambda p, x: (net(x), torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(p, x))  # noqa: E731
    compiled = torch.compile(f, fullgraph=True, backend="fastunet", options={"fallback": "eager"})
    torch.testing.assert_close(compiled(weights, x), f(weights, x))


def test_what_has_no_derivative_says_so() -> None:
    net, x = fastunet.UNet(1, 2, features=(32, 64)).eval(), torch.randn(1, 1, 8, 8)
    for model in (fastunet.quantize(net, x), GraphedModel(net)):
        with pytest.raises(ConfigError, match=r"for inference: expected a call outside of torch\.func"):
            torch.func.grad(lambda x, model=model: model(x).square().sum())(x)
        with forward_ad.dual_level(), pytest.raises(ConfigError, match="outside of torch"):
            model(forward_ad.make_dual(x, x))
