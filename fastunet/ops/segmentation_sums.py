"""segmentation_sums: all that Dice, Jaccard and cross-entropy losses need to know of the pixels, in one pass."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastunet import checks, dispatch
from fastunet.kernels.config_passes import MOST_CHANNELS
from fastunet.ops.registration import define, define_backward, strided_like
from fastunet.reference import functional as reference

NAME = "segmentation_sums"
ACTIVATIONS = ("sigmoid", "softmax")
# Values of which ATen on a CPU has about six tensors at a time; with twice as many, BCE + Dice took a quarter longer.
_CHUNK = 1 << 17


class SumsArgs(NamedTuple):
    logits: Tensor  # [N, C, H, W]
    target: Tensor  # [N, C, H, W], or class indices [N, 1, H, W]
    mask: Tensor | None  # [N, 1, H, W]
    softmax: bool
    squared: bool
    entropy: bool

    def choice(self, *, training: bool = False) -> dispatch.Choice:
        choice = dispatch.choose(NAME, self.logits, training=training)
        if choice.implementation == "triton" and self.logits.shape[1] > MOST_CHANNELS:
            return dispatch.Choice("aten", f"the kernel takes up to {MOST_CHANNELS} channels")
        return choice


class SumsGradArgs(NamedTuple):
    """Gradients of logits and target, those that output_mask asks for: grad [rows, N, C] weighs each pixel's
    terms.
    """

    grad: Tensor
    logits: Tensor
    target: Tensor
    mask: Tensor | None
    softmax: bool
    squared: bool
    entropy: bool
    output_mask: list[bool]


def segmentation_sums(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    activation: str = "sigmoid",
    squared: bool = False,
    entropy: bool = False,
) -> Tensor:
    """Sum over the pixels of each image and channel, [rows, N, C], float32 (float64 for float64 logits).

    With p = sigmoid(logits) or softmax over the channels, t the target and m the mask (1 = counts, 0 = does not):

        0  overlap    sum(m^2 p t)
        1  predicted  sum(m p),  with squared  sum(m^2 p^2)
        2  truth      sum(m t),  with squared  sum(m^2 t^2)
        3  with entropy                 sum(m t (-log p))
        4  with entropy and "sigmoid"   sum(m (1 - t) (-log(1 - p)))

    logits [N, C, H, W] of any floating dtype. target [N, C, H, W], or [N, 1, H, W] of class indices, which count as
    their one-hot form; mask [N, 1, H, W] or None; both of any dtype. An index outside 0 to C - 1 where the mask is not
    zero is an error: ATen raises on the CPU, the kernel answers NaN for its image. Gradients go to the logits and to a
    target of C channels; the mask is a constant. Equal to the sums of torch's sigmoid, softmax, logsigmoid and
    log_softmax, of which `reference.segmentation_sums` is made; one pass over the pixels forward, one backward. With
    more than 1024 channels ATen runs. Raises ShapeError, DtypeError, DeviceError or ConfigError before any work.
    """
    checks.check_choice(f"{NAME}: activation", activation, ACTIVATIONS)
    checks.check_activation(NAME, logits=logits)
    one_channel = (logits.shape[0], 1, *logits.shape[2:])
    checks.check_shape(NAME, "target", target, one_channel if target.shape == one_channel else logits.shape)
    checks.check_shape(NAME, "mask", mask, one_channel)
    checks.check_device(NAME, logits, target=target, mask=mask)
    return _op.invoke(SumsArgs(logits, target, mask, activation == "softmax", squared, entropy))


def holds_indices(logits: Tensor, target: Tensor) -> bool:
    """Whether the target is of class indices: one channel where the logits have more."""
    return target.shape != logits.shape


def _sums_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


# --- forward ---


def _forward(args: SumsArgs, choice: dispatch.Choice) -> Tensor:
    if choice.implementation == "triton":
        from fastunet.kernels.segmentation_loss import segmentation_sums as launch

        return launch(*args[:3], softmax=args.softmax, squared=args.squared, entropy=args.entropy)
    return torch.cat([_sums(_part(args, images)) for images in _chunks(args.logits)], dim=1)


def _chunks(logits: Tensor) -> list[slice]:
    """Return images to compute together by ATen: on a CPU few enough that what lies between two passes stays in its
    cache.
    """
    images, *sizes = logits.shape
    if logits.is_cuda or images == 0:
        return [slice(None)]
    step = max(1, _CHUNK // max(1, math.prod(sizes)))
    return [slice(first, first + step) for first in range(0, images, step)]


def _part(args: Any, images: slice) -> Any:
    mask = None if args.mask is None else args.mask[images]
    return args._replace(logits=args.logits[images], target=args.target[images], mask=mask)


def _sums(args: SumsArgs) -> Tensor:
    x, t, m = _values(args)
    log_p = None if not args.entropy else x.log_softmax(1) if args.softmax else F.logsigmoid(x)
    p = log_p.exp() if args.softmax and log_p is not None else _probability(x, args.softmax)
    tm = t if m is None else t * m
    pm = p if m is None else p * m
    terms = [pm * tm, pm * pm if args.squared else pm, tm * tm if args.squared else tm]
    if log_p is not None and holds_indices(args.logits, args.target):
        # Of its label's class alone: another class may have no probability, and zero times infinity is NaN.
        terms.append(tm * -log_p.gather(1, _indices(args.target, args.mask)))
    elif log_p is not None:
        terms.append(tm * -log_p)
    if log_p is not None and not args.softmax:
        negative = x.sub(log_p).mul_(1 - t)  # softplus(x) = x + softplus(-x)
        terms.append(negative if m is None else negative.mul_(m))
    return torch.stack([term.sum((2, 3)) for term in terms])


def _probability(x: Tensor, softmax: bool) -> Tensor:
    return x.softmax(1) if softmax else x.sigmoid()


def _values(args: SumsArgs | SumsGradArgs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, target, both [N, C, H, W], and mask in the sums' dtype: contiguous, and indices one-hot."""
    logits, target, mask, dtype = args.logits, args.target, args.mask, _sums_dtype(args.logits)
    x = logits.to(dtype).contiguous()
    m = None if mask is None else mask.to(dtype).contiguous()
    if not holds_indices(logits, target):
        return x, target.to(dtype).contiguous(), m
    index = _indices(target, mask)
    one = torch.ones((), dtype=dtype, device=x.device).expand_as(index)  # Quicker than a number.
    return x, torch.zeros_like(x).scatter_(1, index, one), m


def _indices(target: Tensor, mask: Tensor | None) -> Tensor:
    """Return class indices as int64; those masked out, which may be any number, become 0."""
    index = target.long()
    return index if mask is None else index.masked_fill(mask == 0, 0)


def _forward_fake(args: SumsArgs) -> Tensor:
    rows = 3 if not args.entropy else 4 if args.softmax else 5
    return args.logits.new_empty(rows, *args.logits.shape[:2], dtype=_sums_dtype(args.logits))


def _composition(args: SumsArgs) -> Tensor:
    constant = None if args.mask is None else args.mask.detach()
    activation = ACTIVATIONS[args.softmax]
    return reference.segmentation_sums(
        args.logits, args.target, constant, activation=activation, squared=args.squared, entropy=args.entropy
    )


# --- backward ---


def _backward(args: SumsGradArgs, choice: dispatch.Choice) -> tuple[Tensor | None, ...]:
    logits, (needs_logits, needs_target) = args.logits, args.output_mask
    grad_logits = grad_target = None
    if needs_logits and choice.implementation == "triton":
        from fastunet.kernels.segmentation_loss import segmentation_sums_grad as launch

        found = launch(*args[:4], softmax=args.softmax, squared=args.squared)
        grad_logits = strided_like(found, torch.empty_like(logits))
    elif needs_logits:
        grad_logits = torch.empty_like(logits)
        for images in _chunks(logits):
            grad_logits[images] = _grad_logits(_part(args, images)._replace(grad=args.grad[:, images]))
    if needs_target:
        grad_target = torch.empty_like(args.target).copy_(_grad_target(args))
    return grad_logits, grad_target


def _grad_logits(args: SumsGradArgs) -> Tensor:
    """Of the Dice sums, with dp their gradient by p: p (1 - p) dp, for softmax p (dp - sum(p dp)). Of the entropies:
    p sum(t) - t for softmax, and p (of a negative's) or p - 1 (of a positive's) for sigmoid.
    """
    x, t, m = _values(args)
    p = _probability(x, args.softmax)
    of_overlap, of_predicted, _, *of_entropies = args.grad[..., None, None]
    tm = t if m is None else t * m
    if args.squared:
        dp = (of_overlap * tm).addcmul_(p if m is None else p * m, of_predicted, value=2)
    else:
        dp = torch.addcmul(of_predicted, of_overlap, tm)
    if args.softmax:
        result = torch.ops.aten._softmax_backward_data(dp, p, 1, dp.dtype)
        if of_entropies:
            by_label = t.mul_(of_entropies[0]) if holds_indices(args.logits, args.target) else t * of_entropies[0]
            result.sub_(by_label).addcmul_(p, by_label.sum(1, keepdim=True))
    else:
        result = dp.mul_(1 - p)
        if of_entropies:
            of_positive, of_negative = of_entropies
            result.addcmul_(t, of_positive - of_negative).add_(of_negative)
        result.mul_(p)
        if of_entropies:
            result.addcmul_(t, of_positive, value=-1)
    return result if m is None else result.mul_(m)


def _grad_target(args: SumsGradArgs) -> Tensor:
    """By plain torch on every device: soft targets that are learned are rare."""
    x, t, m = _values(args)
    of_overlap, _, of_truth, *of_entropies = args.grad[..., None, None]
    p = _probability(x, args.softmax)
    if m is not None:
        p, t = p * m, t * m
    result = of_overlap * p + (2 * of_truth * t if args.squared else of_truth)
    if of_entropies and args.softmax:
        result = result - of_entropies[0] * x.log_softmax(1)
    elif of_entropies:
        result = result - of_entropies[0] * F.logsigmoid(x) + of_entropies[1] * F.logsigmoid(-x)
    return result if m is None else result * m


# --- registration ---


class SegmentationSums(Function):
    @staticmethod
    def forward(ctx: Any, *values: Any) -> Tensor:
        logits, target, mask, *ctx.options = values
        ctx.save_for_backward(logits, target, mask)
        return _op.below_autograd(*values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, mask = ctx.saved_tensors
        output_mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1] and not holds_indices(logits, target)]
        grads = _backward_op(grad, logits, target, mask, *ctx.options, output_mask)
        return *(g if needed else None for g, needed in zip(grads, output_mask, strict=True)), None, None, None, None


_op = define(
    NAME,
    SumsArgs,
    1,
    implementation=_forward,
    fake=_forward_fake,
    composition=_composition,
    autograd=SegmentationSums,
)
_backward_op = define_backward(_op, SumsGradArgs, ("logits", "target"), implementation=_backward)
