"""Every op of fastunet.ops, forward and backward, on the device against float64 with derived bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastunet
from fastunet import dispatch, ops

from .budget import assert_within, random_cotangent, random_input
from .ops import Call, expected

Shapes = dict[str, tuple[int, ...]]

# Number formats: dtype, and whether float32 convolutions may use TF32.
FORMATS: Mapping[str, tuple[torch.dtype, bool]] = {
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
EMPTY: Mapping[str, Any] = {}
_NORM = {"eps": 1e-3, "negative_slope": 0.1}
_TRAINING = {**_NORM, "training": True, "momentum": 0.3}
_STRIDED = {"stride": 2}
# Parameters of a norm, which mixed precision keeps in float32.
_FLOAT32 = ("gamma", "beta")


@dataclass(frozen=True)
class Case:
    """An op, the shapes of its tensors by parameter name, its other arguments, and whether it has a backward."""

    op: str
    shapes: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    buffers: tuple[int, ...] | None = None
    backward: bool = True

    def __str__(self) -> str:
        return f"{self.op} {[*next(iter(self.shapes.values()))]}"


# n, c, h, w, c_out: whole vectors and tiles; and nothing that fits.
SIZES = ((2, 64, 24, 16, 64), (3, 5, 11, 9, 17))


def cases() -> list[Case]:
    """Return two sizes of every op."""
    return [case for size in SIZES for case in cases_of(*size)]


def cases_of(n: int, c: int, h: int, w: int, c_out: int) -> list[Case]:
    """Return every op, on images [n, c, h, w] (the second input of a concatenation has 2c channels) and to c_out
    channels.
    """
    x, up, channels = (n, c, h, w), (n, 2 * c, h, w), (c_out,)
    plain: Shapes = {"x": x, "weight": (c_out, c, 3, 3)}
    concat: Shapes = {"skip": x, "up": up, "weight": (c_out, 3 * c, 3, 3)}
    weights = {"weight1": (c_out, c, 3, 3), "bias1": channels, "weight2": (c, c_out, 3, 3), "bias2": (c,)}
    affine: Shapes = {"gamma": channels, "beta": channels}
    bias: Shapes = {"bias": channels}
    head: Shapes = {"head_weight": (2, c_out, 1, 1), "head_bias": (2,)}
    logits = {"logits": x, "target": x}
    low: Shapes = {"low": (n, c_out, h // 2, w // 2), "up_weight": (c_out, c, 2, 2), "up_bias": (c,)}
    steps_up: Shapes = {"skip": x, **low, "weight": (c_out, 2 * c, 3, 3)}
    batch, instance = "conv3x3_batch_norm_relu", "conv3x3_instance_norm_relu"
    return [
        Case("conv3x3_bias_relu", plain | bias),
        Case("conv3x3_bias_relu_pool", plain | bias),
        Case("concat_conv3x3_bias_relu", concat | bias, {"negative_slope": 0.1}),
        Case("conv3x3_bias_relu", plain | bias, _STRIDED),
        Case("double_conv3x3_bias_relu", {"x": x, **weights}, {"pool": True}),
        Case(batch, plain | affine, _TRAINING, channels),
        Case(batch, plain | affine, {**_TRAINING, "training": False}, channels),
        Case(f"{batch}_pool", plain | affine, _TRAINING, channels),
        Case(f"concat_{batch}", concat | affine, _TRAINING, channels),
        Case(f"concat_{batch}", concat | affine, _TRAINING | _STRIDED, channels),
        Case(f"{batch}_pool", plain | affine, {**_TRAINING, **_STRIDED, "training": False}, channels),
        Case(instance, plain | affine, _NORM),
        Case(f"{instance}_pool", plain | affine, _NORM),
        Case(instance, plain | affine, _NORM | _STRIDED),
        Case(f"concat_{instance}", concat | affine, _NORM),
        Case("max_pool2x2", {"x": x}),
        Case("conv_transpose2x2", {"x": x, "weight": (c, c_out, 2, 2), "bias": channels}),
        Case("conv1x1", {"x": x, "weight": (2, c, 1, 1), "bias": (2,)}, {"activation": "softmax"}),
        Case("conv3x3_relu_conv1x1", plain | bias | head, {"sigmoid": True}, backward=False),
        Case("conv_transpose2x2_concat_conv3x3_relu", steps_up | bias, {"negative_slope": 0.1}, backward=False),
        Case("segmentation_sums", logits, {"entropy": True, "activation": "softmax"}),
        Case("sigmoid_dice_loss", logits, {"smooth": 1.0}),
    ]


def registered(op: str, options: Mapping[str, Any]) -> str:
    """Return the name by which dispatch knows the op that a public one calls with these options."""
    if op == "sigmoid_dice_loss":
        return "segmentation_sums"
    name = op.removeprefix("concat_").removeprefix("double_").removesuffix("_pool")
    return name + dispatch.STRIDE2 if options.get("stride") == 2 else name


def make_inputs(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Return random tensors, weights scaled so that their sums stay near 1; a target lies between 0 and 1."""
    inputs = {}
    for i, (name, shape) in enumerate(shapes.items()):
        kind = torch.float32 if name in _FLOAT32 else dtype
        t = random_input(shape, dtype=kind, scale=scale_of(name, shape), seed=i, device=device)
        inputs[name] = t.sigmoid() if name == "target" else t
    return inputs


def scale_of(name: str, shape: tuple[int, ...]) -> float:
    """Return the deviation of a random tensor of that name."""
    return math.prod(shape[1:]) ** -0.5 if "weight" in name else 1.0


def run_op(op: str, inputs: Mapping[str, Tensor], buffers: Mapping[str, Tensor], options: Mapping[str, Any]) -> Any:
    """Call the public op; a double convolution takes its parameters in pairs."""
    function = getattr(ops, op)
    if op == "double_conv3x3_bias_relu":
        pairs = [(inputs[f"{name}1"], inputs[f"{name}2"]) for name in ("weight", "bias")]
        return function(inputs["x"], inputs.get("up"), *pairs, **options)
    return function(*inputs.values(), *buffers.values(), **options)


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    """Return an op's outputs, of which it may have one or two."""
    return result if isinstance(result, tuple) else (result,)


def check(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    *,
    allow_tf32: bool = False,
    run: Callable[..., Any] | None = None,
) -> None:
    """Raise AssertionError, naming the result and its worst element, unless the case holds under the backend in force.

    allow_tf32: what torch is set to. run: computes the op, with the arguments of `run_op`, which it is by default.
    """
    inputs = make_inputs(case.shapes, dtype, device)
    buffers = {}
    if case.buffers is not None:
        names = ("running_mean", "running_var")
        buffers = {name: random_input(case.buffers, seed=i, device=device) for i, name in enumerate(names, 10)}
        buffers["running_var"] = buffers["running_var"].abs() + 0.5
    before = {name: t.clone() for name, t in buffers.items()}
    differentiable = [name for name in inputs if name != "target"] if case.backward else []
    for name in differentiable:
        inputs[name].requires_grad_()
    outputs = outputs_of((run or run_op)(case.op, inputs, buffers, case.options))
    cotangents = [random_cotangent(y, seed=20 + i) for i, y in enumerate(outputs)] if case.backward else []
    actual = results_of(outputs, inputs, cotangents) | buffers
    exact = {name: t.detach() for name, t in inputs.items()}
    known = how(case.op, actual, allow_tf32, case.options) | {"composes": _composes(case.op, exact)}
    compare(actual, Call(case.op, exact, case.options, before, cotangents, **known))


def _composes(op: str, inputs: Mapping[str, Tensor]) -> bool:
    """Whether a kernel computes an upsampling together with the convolution after it."""
    if not op.startswith("conv_transpose2x2_concat"):
        return False
    skip, weight = inputs["skip"], inputs["weight"]
    return dispatch.choose(op, skip, weight).implementation == "triton"


def results_of(
    outputs: tuple[Tensor, ...], inputs: Mapping[str, Tensor], cotangents: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Outputs, and where there are cotangents the gradients of the inputs that require one, by name."""
    results = {name: y.detach() for name, y in zip(("y", "pooled"), outputs, strict=False)}
    leaves = {name: t for name, t in inputs.items() if t.requires_grad}
    if cotangents:
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        results |= {f"grad {name}": g for name, g in zip(leaves, grads, strict=True)}
    return results


def how(
    op: str, results: Mapping[str, Tensor], allow_tf32: bool = False, options: Mapping[str, Any] = EMPTY
) -> dict[str, Any]:
    """Return what a `Call` must know of the implementation that gave the results."""
    y = results["y"]
    return {
        "allow_tf32": allow_tf32 and y.is_cuda,  # A CPU has no TF32.
        "y": y if op in DECIDED_BY_Y else None,
        "stores_steps": implementation_of(op, y.dtype, y.device, options).implementation == "aten",
    }


# Ops whose backward looks at the output that it returned; with a norm, kernels find it again, unrounded.
DECIDED_BY_Y = ("conv3x3_bias_relu", "conv3x3_bias_relu_pool", "concat_conv3x3_bias_relu", "double_conv3x3_bias_relu")


def compare(actual: Mapping[str, Tensor], call: Call, *, without: Sequence[str] = ()) -> None:
    """Raise AssertionError, naming the result, unless each one expected, but those `without`, is within its bounds."""
    for name, result in expected(call).items():
        if name in without:
            continue
        try:
            assert_within(actual[name], result.value, result.tolerance)
        except AssertionError as error:
            raise AssertionError(f"{call.op}: {name}: {error}") from error


def implementation_of(
    op: str, dtype: torch.dtype, device: torch.device, options: Mapping[str, Any] = EMPTY
) -> dispatch.Choice:
    """Return what runs the public op with these options under the backend in force, and why."""
    return dispatch.choose(registered(op, options), torch.empty(0, dtype=dtype, device=device))


def backends_for(op: str, device: torch.device, dtype: torch.dtype) -> tuple[list[str], str]:
    """Return under which backends to run a public op, ours first, and why "triton" is not among them."""
    unsupported = dispatch.triton_unsupported(device, dtype)
    if unsupported is not None:
        return ["aten"], unsupported
    with fastunet.backend("triton"):
        choice = implementation_of(op, dtype, device)
    return (["triton", "aten"], "") if choice.implementation == "triton" else (["aten"], choice.reason)
