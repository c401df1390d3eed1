"""What the two norm ops share: the way through our kernels, forward and back."""

from __future__ import annotations

from torch import Tensor

from fastunet import dispatch
from fastunet.ops.convolution import conv_backward_triton
from fastunet.ops.registration import memory_format, none_like


def runs_on_triton(op: str, x: Tensor, weight: Tensor, *, training: bool) -> bool:
    """Whether our kernels run the op; training: there is to be a backward, or statistics of a batch.

    An empty batch, whose statistics are torch's business, stays with ATen.
    """
    return dispatch.choose(op, x, weight, training=training).implementation == "triton" and x.numel() > 0


def forward_triton(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    slope: float | None,
    pool: bool,
    *,
    groups: int,
    eps: float,
    running: tuple[Tensor, Tensor] | None = None,
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """(y, pooled, raw, mean, invstd) with the statistics of this batch, [groups, Cout]; running ones move."""
    from fastunet.kernels.conv3x3 import conv3x3_with_statistics
    from fastunet.kernels.norm import Affine, finish_statistics, normalise

    raw, statistics = conv3x3_with_statistics(x, weight, up=up, allow_tf32=dispatch.tf32_allowed())
    mean, invstd = finish_statistics(statistics, groups, eps=eps, running=running, momentum=momentum)
    return *normalise(raw, Affine(mean, invstd, gamma, beta), slope, pool=pool), raw, mean, invstd


def in_format_of(
    inputs: tuple[Tensor | None, ...], y: Tensor, pooled: Tensor | None, raw: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, pooled and raw, or what stands for one that is None, in the memory format of the inputs."""
    format = memory_format(*inputs)
    y, *others = (none_like(y) if t is None else t.contiguous(memory_format=format) for t in (y, pooled, raw))
    return y, others[0], others[1]


def backward_triton(
    grad_y: Tensor | None,
    grad_pooled: Tensor | None,
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    raw: Tensor,
    statistics: tuple[Tensor, Tensor],
    slope: float | None,
    mask: list[bool],
    *,
    statistics_given: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, up, weight, gamma and beta. statistics: mean and invstd, float32 [groups, Cout]."""
    from fastunet.kernels.norm import Affine
    from fastunet.kernels.norm_grad import norm_grad

    grad_raw, grad_gamma, grad_beta = norm_grad(
        raw,
        grad_y,
        grad_pooled,
        Affine(*statistics, gamma, beta),
        slope,
        statistics_given=statistics_given,
        wants_raw=any(mask[:3]),
        wants_affine=any(mask[3:]),
    )
    grads = [none_like(x)] * 3
    if grad_raw is not None:
        *grads, _ = conv_backward_triton(grad_raw, x, up, weight, [*mask[:3], False])
    return (
        grads[0],
        grads[1],
        grads[2],
        grad_gamma.to(gamma.dtype) if mask[3] and grad_gamma is not None and gamma is not None else none_like(x),
        grad_beta.to(beta.dtype) if mask[4] and grad_beta is not None and beta is not None else none_like(x),
    )
