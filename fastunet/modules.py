"""The U-Net's blocks on fused ops. Parameters are those of `fastunet.reference`'s blocks; only forward differs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet import dispatch, ops, reference
from fastunet.reference.unet import padding_to


class DoubleConv(reference.DoubleConv):
    """Twice conv3x3, norm, activation, each one op. x, or [x, up] where up is given; with pool, (y, max_pool2x2(y));
    with head, head(y), in one op with the second convolution where nothing else needs y.
    """

    def forward(self, x: Tensor, up: Tensor | None = None, *, pool: bool = False, head: OutConv | None = None) -> Any:
        block: Any = self.double_conv
        conv1, norm1, act1, conv2, norm2, act2 = block
        if _both_are_plain(conv1, norm1, act1, conv2, norm2, act2) and not self._fuses(head):
            weights, biases = (conv1.weight, conv2.weight), (conv1.bias, conv2.bias)
            y = ops.double_conv3x3_bias_relu(x, up, weights, biases, negative_slope=_slope(act1), pool=pool)
            return y if head is None else head(y)
        return self.second(conv_norm_activation(conv1, norm1, act1, x, up), pool=pool, head=head)

    def second(self, x: Tensor, *, pool: bool = False, head: OutConv | None = None) -> Any:
        """The rest of forward, from the output of the first three on."""
        block: Any = self.double_conv
        _, _, _, conv2, norm2, act2 = block
        if head is not None and self._fuses(head):
            return _conv_norm_head(conv2, norm2, act2, x, head)
        y = conv_norm_activation(conv2, norm2, act2, x, pool=pool)
        return y if head is None else head(y)

    def _fuses(self, head: OutConv | None) -> bool:
        """Whether one op computes the second three and the head."""
        if head is None or not head.is_fusable():
            return False
        block: Any = self.double_conv
        _, _, _, conv2, norm2, act2 = block
        return _is_fusable(conv2, norm2, act2) and _is_inference(norm2)


def with_pool(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(y, max_pool2x2(y)) of y = block(x), in one op unless a hook is to see y."""
    if not has_hooks(block):
        return block(x, pool=True)
    y = block(x)
    return y, ops.max_pool2x2(y)


class Down(reference.Down):
    """DoubleConv of an image that the level above has already pooled."""

    def forward(self, pooled: Tensor, *, pool: bool = False) -> Any:
        return with_pool(self.maxpool_conv[1], pooled) if pool else self.maxpool_conv[1](pooled)


class Up(reference.Up):
    """Double the lower level, pad it to the skip's size, and DoubleConv the two without joining them.

    folds_upsampling: in inference the upsampling may be computed together with the convolution after it, by a weight
    composed of both, where that is faster. False has each computed by itself, as in training. The composed weight is
    made again when one of the two changes, but not within a CUDA graph: `fastunet.graphed` records a new one.
    """

    folds_upsampling = True

    def forward(self, low: Tensor, skip: Tensor, *, head: OutConv | None = None) -> Tensor:
        up: Any = self.up
        conv: Any = self.conv
        if head is not None and has_hooks(conv):
            return head(self.forward(low, skip))
        if self._composes(low, skip):
            return conv.second(self._composed(low, skip), head=head)
        low = ops.conv_transpose2x2(low, up.weight, up.bias) if _has(up, CONV_TRANSPOSE2X2) else up(low)
        padding = padding_to(low, skip)
        return conv(skip, F.pad(low, padding) if any(padding) else low, head=head)

    def _composes(self, low: Tensor, skip: Tensor) -> bool:
        """Whether the upsampling is computed together with the convolution after it."""
        if not isinstance(self.conv, DoubleConv):  # Quantised.
            return False
        block: Any = self.conv.double_conv
        conv, norm, act, *_ = block
        return (
            self.folds_upsampling
            and _has(self.up, CONV_TRANSPOSE2X2)
            and _is_fusable(conv, norm, act)
            and _is_inference(norm)
            and not has_hooks(self.conv)
            and all(s // 2 == n for s, n in zip(skip.shape[2:], low.shape[2:], strict=True))
            # A graph may be traced through here, but not through the question; the op asks at every call.
            and (torch.compiler.is_compiling() or dispatch.choose(JOINED_UP, skip, conv.weight).prepares)
        )

    def _composed(self, low: Tensor, skip: Tensor) -> Tensor:
        up: Any = self.up
        block: Any = self.conv.double_conv
        conv, norm, act, *_ = block
        bias, given = _bias_and_norm(conv, norm)
        return ops.conv_transpose2x2_concat_conv3x3_relu(
            skip, low, up.weight, up.bias, conv.weight, bias, norm=given, negative_slope=_slope(act)
        )


class OutConv(reference.OutConv):
    """The 1x1 head with its activation."""

    def forward(self, x: Tensor) -> Tensor:
        if not _has(self.conv, CONV1X1):
            return super().forward(x)
        return ops.conv1x1(x, self.conv.weight, self.conv.bias, activation=self.head)

    def is_fusable(self) -> bool:
        """Whether a convolution before it can take it into its epilogue."""
        return self.head in (None, "sigmoid") and _has(self.conv, CONV1X1) and not has_hooks(self)


def conv_norm_activation(
    conv: Any, norm: Any, act: Any, x: Tensor, up: Tensor | None = None, *, pool: bool = False
) -> Any:
    """act(norm(conv(x))) as one op, or module by module where one of them is not what the op computes.

    A norm exchanged for another kind (SyncBatchNorm), a hook on one of the three: then they are called as they stand.
    """
    if not _is_fusable(conv, norm, act):
        y = act(norm(conv(x if up is None else torch.cat([x, up], dim=1))))
        return (y, ops.max_pool2x2(y)) if pool else y
    activation: dict[str, Any] = {"negative_slope": _slope(act)}
    if isinstance(norm, nn.BatchNorm2d):
        return _batch_norm(conv, norm, x, up, pool, activation)
    if isinstance(norm, nn.InstanceNorm2d):
        parameters = (conv.weight, norm.weight, norm.bias)
        if up is not None:
            return ops.concat_conv3x3_instance_norm_relu(x, up, *parameters, eps=norm.eps, **activation)
        op = ops.conv3x3_instance_norm_relu_pool if pool else ops.conv3x3_instance_norm_relu
        return op(x, *parameters, eps=norm.eps, **activation)
    if up is not None:
        return ops.concat_conv3x3_bias_relu(x, up, conv.weight, conv.bias, **activation)
    return (ops.conv3x3_bias_relu_pool if pool else ops.conv3x3_bias_relu)(x, conv.weight, conv.bias, **activation)


def _is_inference(norm: Any) -> bool:
    """Whether norm is none, or batch norm by running statistics, and no gradient will be asked for."""
    given = type(norm) is nn.BatchNorm2d and not norm.training and norm.running_mean is not None
    return not torch.is_grad_enabled() and (given or isinstance(norm, nn.Identity))


def _conv_norm_head(conv: Any, norm: Any, act: Any, x: Tensor, head: OutConv) -> Tensor:
    bias, given = _bias_and_norm(conv, norm)
    options: dict[str, Any] = {"sigmoid": head.head == "sigmoid", "negative_slope": _slope(act)}
    return ops.conv3x3_relu_conv1x1(x, conv.weight, bias, head.conv.weight, head.conv.bias, norm=given, **options)


def _bias_and_norm(conv: Any, norm: Any) -> tuple[Any, Any]:
    """The arguments `bias` and `norm` of the ops for inference."""
    if isinstance(norm, nn.Identity):
        return conv.bias, None
    return norm.bias, (norm.running_mean, norm.running_var, norm.weight, norm.eps)


def _slope(act: Any) -> float:
    return getattr(act, "negative_slope", 0.0)


JOINED_UP = "conv_transpose2x2_concat_conv3x3_relu"
PLAIN_TYPES = (
    *(nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d),
    *(nn.Identity, nn.ReLU, nn.LeakyReLU),
)
_PLAIN_CONV = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
CONV3X3 = {**_PLAIN_CONV, "kernel_size": (3, 3), "transposed": False}
CONV1X1 = {**_PLAIN_CONV, "kernel_size": (1, 1), "padding": (0, 0), "transposed": False}
CONV_TRANSPOSE2X2 = {
    **_PLAIN_CONV,
    "kernel_size": (2, 2),
    "stride": (2, 2),
    "padding": (0, 0),
    "output_padding": (0, 0),
    "transposed": True,
}


def _is_fusable(conv: Any, norm: Any, act: Any) -> bool:
    """Whether the three are what one of the ops computes: as built, or changed by the user into something else."""
    return (
        _has(conv, CONV3X3)
        and _is_plain(norm)
        and _is_plain(act)
        and (conv.bias is None or isinstance(norm, nn.Identity))
    )


def _both_are_plain(conv1: Any, norm1: Any, act1: Any, conv2: Any, norm2: Any, act2: Any) -> bool:
    """Whether two blocks without norm follow each other with the same activation, and none sees what is between."""
    slopes = {_slope(act) for act in (act1, act2)}
    without_norm = isinstance(norm1, nn.Identity) and isinstance(norm2, nn.Identity)
    return without_norm and len(slopes) == 1 and _is_fusable(conv1, norm1, act1) and _is_fusable(conv2, norm2, act2)


def _has(conv: Any, geometry: dict[str, Any]) -> bool:
    """Whether a plain convolution has exactly this geometry."""
    return _is_plain(conv) and geometry.items() <= vars(conv).items()


def _is_plain(module: nn.Module) -> bool:
    """One of the types the fused ops stand for, itself and not a subclass, without hooks or running instance norm."""
    tracking = isinstance(module, nn.InstanceNorm2d) and module.track_running_stats
    return type(module) in PLAIN_TYPES and not has_hooks(module) and not tracking


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called before or after the module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _batch_norm(conv: Any, norm: Any, x: Tensor, up: Tensor | None, pool: bool, activation: dict[str, Any]) -> Any:
    """As nn.BatchNorm2d.forward: which statistics, and how far the running ones move."""
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    use_batch = norm.training or norm.running_mean is None
    running = (norm.running_mean, norm.running_var) if not norm.training or norm.track_running_stats else (None, None)
    parameters = (conv.weight, norm.weight, norm.bias, *running)
    options: dict[str, Any] = {"training": use_batch, "momentum": momentum, "eps": norm.eps, **activation}
    if up is not None:
        return ops.concat_conv3x3_batch_norm_relu(x, up, *parameters, **options)
    return (ops.conv3x3_batch_norm_relu_pool if pool else ops.conv3x3_batch_norm_relu)(x, *parameters, **options)
