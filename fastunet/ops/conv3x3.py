"""conv3x3: the 3x3 convolution with its norm, activation, pooling and concatenation: one op, fastunet::conv3x3."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec

import torch
from torch import Tensor
from torch.autograd import Function

from fastunet import checks, dispatch
from fastunet.ops import conv3x3_aten, recompute
from fastunet.ops.convolution import check_eps, check_inputs, check_norm, check_pair
from fastunet.ops.epilogue import arguments_of, slope_of
from fastunet.ops.registration import Changed, define, define_autocast, define_backward, empty_in, memory_format
from fastunet.reference import functional as reference

P = ParamSpec("P")
# By norm, the name by which dispatch, tables of measurements and explain know the op.
NAMES = {
    "none": "conv3x3_bias_relu",
    "batch": "conv3x3_batch_norm_relu",
    "instance": "conv3x3_instance_norm_relu",
}


class ConvArgs(NamedTuple):
    """y = activation(norm(conv2d([x, up], weight, stride, padding=1)) + bias), and with pool max_pool2d(y, 2)."""

    x: Tensor  # [N, C1, H, W]
    up: Tensor | None  # [N, C2, H, W], concatenated after x
    weight: Tensor  # [Cout, C1 + C2, 3, 3]
    bias: Tensor | None = None  # [Cout], the norm's beta where there is one
    norm: str = "none"  # "none", "batch" or "instance"
    gamma: Tensor | None = None  # [Cout]
    running_mean: Changed = None  # [Cout]
    running_var: Changed = None
    training: bool = False  # batch norm by the statistics of this batch, which move the running ones by momentum
    momentum: float = 0.0
    eps: float = 0.0
    slope: float | None = None  # of the activation's negative side: None is the identity, 0 is ReLU
    pool: bool = False
    stride: int = 1  # or 2: y is [N, Cout, ceil(H / 2), ceil(W / 2)]
    input_slope: float | None = None  # x is the output of such an activation, which leaves its backward to this op
    grad_is_ready: bool = False  # y's gradient comes from such an op, already carried through this one's activation
    needs_backward: bool = False  # there will be a backward

    @property
    def name(self) -> str:
        return NAMES[self.norm] + (dispatch.STRIDE2 if self.stride == 2 else "")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of y."""
        h, w = self.x.shape[2:]
        return (h, w) if self.stride == 1 else ((h + 1) // 2, (w + 1) // 2)

    def choice(self, *, training: bool = False) -> dispatch.Choice:
        return dispatch.choose(
            self.name, self.x, self.weight, training=training or self.needs_backward or self.training
        )


class ConvGradArgs(NamedTuple):
    """Gradients of x, up, weight, bias and gamma, those that output_mask asks for; the rest as in ConvArgs.

    raw is the convolution's output, mean and invstd [Cout] or [N, Cout] its statistics, y the op's output where it was
    kept.
    """

    grad_y: Tensor | None
    grad_pooled: Tensor | None
    x: Tensor
    up: Tensor | None
    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    raw: Tensor | None
    mean: Tensor | None
    invstd: Tensor | None
    y: Tensor | None
    norm: str
    training: bool
    eps: float
    slope: float | None
    input_slope: float | None
    stride: int
    output_mask: list[bool]


# --- forward ---


def _forward(args: ConvArgs, choice: dispatch.Choice) -> tuple[Tensor | None, ...]:
    """Return (y, pooled, raw, mean, invstd): the last three where there is a norm and a backward that needs them."""
    if choice.implementation == "triton":
        from fastunet.ops import conv3x3_triton

        return conv3x3_triton.forward(args)
    return conv3x3_aten.forward(args, choice.implementation)


def _forward_fake(args: ConvArgs) -> tuple[Tensor | None, ...]:
    x, weight = args.x, args.weight
    format = memory_format(x, args.up, weight)
    n, channels, (h, w) = x.shape[0], weight.shape[0], args.size
    y = empty_in(format, x, n, channels, h, w)
    pooled = empty_in(format, x, n, channels, h // 2, w // 2) if args.pool else None
    if not args.needs_backward or args.norm == "none":
        return y, pooled, None, None, None
    shape = (n, channels) if args.norm == "instance" else (channels,)
    if args.norm == "batch" and not args.training:
        return y, pooled, torch.empty_like(y), None, None
    dtype = conv3x3_aten.statistics_dtype(args.gamma, x)
    return y, pooled, torch.empty_like(y), x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _composition(args: ConvArgs) -> tuple[Tensor | None, ...]:
    """Compute it by torch functions. The last arguments are between two ops: here each undoes its own activation."""
    concatenated = args.x if args.up is None else torch.cat([args.x, args.up], dim=1)
    options = {"stride": args.stride, **arguments_of(args.slope)}
    if args.norm == "none":
        y = reference.conv3x3_bias_relu(concatenated, args.weight, args.bias, **options)
    elif args.norm == "instance":
        affine = (args.gamma, args.bias)
        y = reference.conv3x3_instance_norm_relu(concatenated, args.weight, *affine, eps=args.eps, **options)
    else:
        norm = (args.gamma, args.bias, args.running_mean, args.running_var)
        options = {"training": args.training, "momentum": args.momentum, "eps": args.eps, **options}
        y = reference.conv3x3_batch_norm_relu(concatenated, args.weight, *norm, **options)
    return y, reference.max_pool2x2(y) if args.pool else None, None, None, None


# --- backward ---


def _backward(args: ConvGradArgs, choice: dispatch.Choice) -> tuple[Tensor | None, ...]:
    if choice.implementation == "triton":
        from fastunet.ops import conv3x3_triton

        return conv3x3_triton.backward(args)
    return conv3x3_aten.backward(args, choice.implementation)


class Conv3x3(Function):
    @staticmethod
    def forward(ctx: Any, *values: Any) -> tuple[Tensor, ...]:
        args = ConvArgs(*values)
        y, pooled, raw, mean, invstd = _op.below_autograd(*args._replace(needs_backward=True))
        on_triton = args.choice(training=True).implementation == "triton"
        slope = None if args.grad_is_ready else args.slope
        # Our kernels find y again from raw, in registers.
        needs_y = (args.pool or slope is not None) and not (on_triton and args.norm != "none")
        # Those that training moves may move again before its backward, which does not read them.
        running = (None, None) if args.training else (args.running_mean, args.running_var)
        has_norm = args.norm != "none"
        kept = (args.bias, args.gamma, *running, raw, mean, invstd) if has_norm else (None,) * 7
        recompute.save(ctx, args.x, args.up, args.weight, *kept, y if needs_y else None)
        ctx.is_recomputable = on_triton and (args.norm == "instance" or args.training)
        ctx.options = args.norm, args.training, args.eps, slope, args.input_slope, args.stride
        ctx.pool = args.pool
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(raw, mean, invstd, *(() if args.pool else (pooled,)))
        return y, pooled, raw, mean, invstd

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_pooled: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        grads: dict[str, Tensor] = {}
        if grad_y is not None or grad_pooled is not None:
            needed = dict(zip(ConvArgs._fields, ctx.needs_input_grad, strict=True))
            output_mask = [needed[name] for name in _DIFFERENTIABLE]
            *_, input_slope, _ = ctx.options
            saved = recompute.saved(ctx, reads_values=needed["weight"] or input_slope is not None)
            found = _backward_op(grad_y, grad_pooled if ctx.pool else None, *saved, *ctx.options, output_mask)
            grads = {name: grad for name, grad in zip(_DIFFERENTIABLE, found, strict=True) if needed[name]}
        return tuple(grads.get(name) for name in ConvArgs._fields)


_DIFFERENTIABLE = ("x", "up", "weight", "bias", "gamma")
_op = define(
    "conv3x3",
    ConvArgs,
    5,
    implementation=_forward,
    fake=_forward_fake,
    composition=_composition,
    autograd=Conv3x3,
    # Torch's instance norm answers contiguous for any format; two ops may share an activation's gradient.
    is_torchs=lambda args: args.norm != "instance" and not args.grad_is_ready and args.input_slope is None,
)
_backward_op = define_backward(_op, ConvGradArgs, _DIFFERENTIABLE, implementation=_backward)
define_autocast(
    _op, cast=("x", "up"), parameters=lambda args: ("weight", "bias") if args.norm == "none" else ("weight",)
)


def conv3x3(what: str, args: ConvArgs) -> tuple[Tensor, Any]:
    """Check the arguments and return (y, pooled), pooled None or empty without pool; errors name the op `what`."""
    check(what, args)
    y, pooled, raw, mean, invstd = _op.invoke(args)
    if args.norm != "none":
        recompute.remember(y, (raw, mean, invstd, args.gamma, args.bias), args.slope)
    return y, pooled


def check(what: str, args: ConvArgs) -> None:
    """Raise ShapeError, DtypeError, DeviceError or ConfigError for what the op cannot take, before any work."""
    x, weight = args.x, args.weight
    check_inputs(what, x, args.up, weight)
    if args.stride not in (1, 2):
        raise checks.ConfigError(f"{what}: stride: expected 1 or 2, got {args.stride}")
    height, width = args.size
    if args.pool:
        checks.check_pooled(what, height, width)
    if args.norm == "none":
        if args.bias is None:
            return
        checks.check_shape(what, "bias", args.bias, weight.shape[:1])
        checks.check_together(what, x, bias=args.bias)
        return
    running = {"running_mean": args.running_mean, "running_var": args.running_var}
    check_norm(what, x, weight, gamma=args.gamma, beta=args.bias, **running)
    if (args.gamma is None) != (args.bias is None):
        check_pair(what, gamma=args.gamma, beta=args.bias)
    if (args.running_mean is None) != (args.running_var is None):
        check_pair(what, **running)
    check_eps(what, args.eps, training=args.training)
    if args.norm == "instance":
        if height * width == 1:
            raise checks.ShapeError(f"{what}: expected more than 1 pixel per image, got input {list(x.shape)}")
        return
    if args.training and x.shape[0] * height * width == 1:
        raise checks.ShapeError(
            f"{what}: expected more than 1 value per channel when training, got input {list(x.shape)}"
        )
    if not args.training and args.running_mean is None:
        raise checks.ConfigError(f"{what}: expected running_mean and running_var when not training, got None")


# --- the public ops ---


def _op_of(arguments: Callable[P, ConvArgs]) -> Callable[P, Tensor]:
    """Return the public op whose call has these arguments; its name and docstring are theirs."""

    arguments.__annotations__["return"] = "Tensor"

    @functools.wraps(arguments)
    def op(*args: P.args, **options: P.kwargs) -> Tensor:
        return conv3x3(arguments.__name__, arguments(*args, **options))[0]

    return op


def _pooled(op: Callable[P, Tensor]) -> Callable[P, tuple[Tensor, Tensor]]:
    """Return the op that gives (y, F.max_pool2d(y, 2)) of another's y."""
    arguments, name = op.__wrapped__, f"{op.__name__}_pool"  # type: ignore[attr-defined]

    @functools.wraps(arguments)
    def pooled(*args: P.args, **options: P.kwargs) -> tuple[Tensor, Tensor]:
        return conv3x3(name, arguments(*args, **options)._replace(pool=True))

    doc = f"Return (y, F.max_pool2d(y, 2)) of y = {op.__name__}(...); H and W >= 2."
    of_pooled = inspect.signature(arguments).replace(return_annotation="tuple[Tensor, Tensor]")
    return _documented(pooled, name, doc, of_pooled)


def _concatenated(op: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, Tensor, P], Tensor]:
    """Return the op that takes [skip, up] in the place of another's x."""
    arguments, name = op.__wrapped__, f"concat_{op.__name__}"  # type: ignore[attr-defined]

    def concatenated(skip: Tensor, up: Tensor, *args: P.args, **options: P.kwargs) -> Tensor:
        return conv3x3(name, arguments(skip, *args, **options)._replace(up=up))[0]

    doc = f"""Compute {op.__name__}(torch.cat([skip, up], 1), ...); the kernels do not write the concatenation.

    skip [N, C1, H, W], up [N, C2, H, W], weight [Cout, C1 + C2, 3, 3]; otherwise as {op.__name__}.
    """
    x, *others = inspect.signature(arguments).parameters.values()
    parameters = [x.replace(name="skip"), x.replace(name="up"), *others]
    return _documented(concatenated, name, doc, inspect.signature(arguments).replace(parameters=parameters))


def _documented(op: Any, name: str, doc: str, signature: inspect.Signature) -> Any:
    op.__name__, op.__qualname__, op.__doc__, op.__signature__ = name, name, doc, signature
    return op


@_op_of
def conv3x3_bias_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    relu: bool = True,
    negative_slope: float = 0.0,
) -> ConvArgs:
    """Compute relu(conv2d(x, weight, bias, stride=stride, padding=1)) in one pass.

    x [N, Cin, H, W], weight [Cout, Cin, 3, 3], bias [Cout] or None, all of one floating dtype and device; the result is
    [N, Cout, H, W] in that dtype, with stride=2 [N, Cout, ceil(H / 2), ceil(W / 2)], channels_last if x or weight is.
    relu=False omits the activation; negative_slope > 0 makes it LeakyReLU. Equal to
    `F.relu(F.conv2d(x, weight, bias, stride=stride, padding=1))`, NaN included.
    Raises ShapeError, DtypeError, DeviceError or ConfigError before any work.

    On the CPU, float32 of 128 channels and more runs by Winograd's algorithm where that is faster. Its rounding errors
    scale with the largest values of a tile of 6x6 pixels, and a NaN or infinity makes all results of its tile NaN.
    """
    return ConvArgs(x, None, weight, bias, slope=slope_of(relu, negative_slope), stride=stride)


@_op_of
def conv3x3_batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int = 1,
    relu: bool = True,
    negative_slope: float = 0.0,
) -> ConvArgs:
    """Compute relu(batch_norm(conv2d(x, weight, stride=stride, padding=1), running_mean, running_var, gamma, beta,
    training, momentum, eps)).

    x [N, Cin, H, W], weight [Cout, Cin, 3, 3], the other tensors [Cout] or None, of x's dtype or float32. training=True
    takes the statistics of this batch (Ioffe & Szegedy 2015) and updates the running ones in place by momentum, with
    the unbiased variance, as torch does; training=False takes the running ones. The rest as conv3x3_bias_relu. Raises
    ValueError, as torch does, where training has one value per channel.
    """
    norm = ("batch", gamma, running_mean, running_var, training, momentum, eps)
    return ConvArgs(x, None, weight, beta, *norm, slope_of(relu, negative_slope), stride=stride)


@_op_of
def conv3x3_instance_norm_relu(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    eps: float = 1e-5,
    stride: int = 1,
    relu: bool = True,
    negative_slope: float = 0.0,
) -> ConvArgs:
    """Compute relu(instance_norm(conv2d(x, weight, stride=stride, padding=1), weight=gamma, bias=beta, eps=eps)).

    Each image and channel is normalised by its own mean and biased variance (Ulyanov et al. 2016), in training and
    inference alike; a channels_last input stays so, which torch's instance norm does not do. gamma and beta [Cout],
    both or neither, in x's dtype or float32; the rest as conv3x3_bias_relu. Raises ValueError, as torch does, on images
    of one pixel.
    """
    slope = slope_of(relu, negative_slope)
    return ConvArgs(x, None, weight, beta, "instance", gamma, eps=eps, slope=slope, stride=stride)


conv3x3_bias_relu_pool = _pooled(conv3x3_bias_relu)
conv3x3_batch_norm_relu_pool = _pooled(conv3x3_batch_norm_relu)
conv3x3_instance_norm_relu_pool = _pooled(conv3x3_instance_norm_relu)
concat_conv3x3_bias_relu = _concatenated(conv3x3_bias_relu)
concat_conv3x3_batch_norm_relu = _concatenated(conv3x3_batch_norm_relu)
concat_conv3x3_instance_norm_relu = _concatenated(conv3x3_instance_norm_relu)


def double_conv3x3_bias_relu(
    x: Tensor,
    up: Tensor | None,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    *,
    relu: bool = True,
    negative_slope: float = 0.0,
    pool: bool = False,
) -> Any:
    """Compute conv3x3_bias_relu twice, first of x, or of [x, up] where up is given: y, or (y, pooled) with pool.

    Equal to two calls; but the backward of the first activation is part of the second convolution's input gradient,
    which saves a pass over memory.
    """
    what, slope = "double_conv3x3_bias_relu", slope_of(relu, negative_slope)
    is_one = (
        torch.compiler.is_compiling() or ConvArgs(x, up, weights[1]).choice(training=True).implementation == "triton"
    )
    middle, _ = conv3x3(what, ConvArgs(x, up, weights[0], biases[0], slope=slope, grad_is_ready=is_one))
    input_slope = slope if is_one else None
    args = ConvArgs(middle, None, weights[1], biases[1], slope=slope, pool=pool, input_slope=input_slope)
    results = conv3x3(what, args)
    return results if pool else results[0]
