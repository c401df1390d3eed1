"""The U-Net's blocks on fused ops. Parameters are those of `fastunet.reference`'s blocks; only forward differs.

Each block's forward takes what the reference's takes and gives what it gives. Where something in a block is hooked,
patched or exchanged for what no op computes, the reference's forward runs, module by module. What goes by the name of
`fused` trusts that its caller has asked: it also computes across blocks, whose modules then are not called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastunet import dispatch, ops, reference
from fastunet.cpu.onednn import joins
from fastunet.cpu.prepared_net import COMPOSED, MODULE, ONEDNN, Layer, StepUp, like, padded_to, statistics_of
from fastunet.ops.conv3x3 import ConvArgs, conv3x3
from fastunet.reference.unet import HEADS
from fastunet.torch_private import convolve_of, has_hooks, in_transform


class DoubleConv(reference.DoubleConv):
    """Twice conv3x3, norm, activation, each one op."""

    double_conv: Any

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x) if not is_watched(x) and self.has_plain_layers() else super().forward(x)

    def has_plain_layers(self) -> bool:
        """Whether fused ops compute all that is in the block."""
        if not is_plain(self.double_conv, nn.Sequential):
            return False
        layers = [*self.double_conv]
        return len(layers) == 6 and is_fusable(*layers[:3]) and is_fusable(*layers[3:])

    def convolutions(self) -> list[tuple[Any, Any]]:
        """Each convolution with its norm."""
        conv1, norm1, _, conv2, norm2, _ = self.double_conv
        return [(conv1, norm1), (conv2, norm2)]

    def layered(self, x: Tensor) -> Tensor:
        """forward of x by torch's layers, none of which is watched."""
        for layer in self.double_conv:
            x = layer.forward(x)
        return x

    def prepared_layers(self, images: Sequence[Tensor]) -> list[Layer]:
        """Return the two convolutions with what follows each, for inputs like these."""
        conv1, norm1, act1, conv2, norm2, act2 = self.double_conv
        between = like(images[0], conv2.weight.shape[1])
        return [Layer(conv1, norm1, act1, images), Layer(conv2, norm2, act2, [between])]

    def fused(self, x: Tensor, up: Tensor | None = None, *, head: OutConv | None = None) -> Tensor:
        """forward of x, or of [x, up] without joining them; with head, head(forward(...))."""
        if self._is_one_op() and not (head is not None and self._fuses(head)):
            y = self._as_one_op(x, up)
            return y if head is None else head.fused(y)
        conv1, norm1, act1, *_ = self.double_conv
        return self.fused_second(conv_norm_activation(conv1, norm1, act1, x, up), head=head)

    def fused_pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(y, max_pool2x2(y)) of y = forward(x)."""
        if self._is_one_op():
            return self._as_one_op(x, pool=True)
        conv1, norm1, act1, conv2, norm2, act2 = self.double_conv
        return conv_norm_activation(conv2, norm2, act2, conv_norm_activation(conv1, norm1, act1, x), pool=True)

    def _is_one_op(self) -> bool:
        """Whether the two are without norm and of the same activation, and none sees what is between."""
        _, norm1, act1, _, norm2, act2 = self.double_conv
        return type(norm1) is nn.Identity and type(norm2) is nn.Identity and _slope(act1) == _slope(act2)

    def _as_one_op(self, x: Tensor, up: Tensor | None = None, *, pool: bool = False) -> Any:
        conv1, _, act, conv2, _, _ = self.double_conv
        weights, biases = (conv1.weight, conv2.weight), (conv1.bias, conv2.bias)
        return ops.double_conv3x3_bias_relu(x, up, weights, biases, negative_slope=_slope(act), pool=pool)

    def fused_second(self, x: Tensor, *, head: OutConv | None = None) -> Tensor:
        """The rest of `fused`, from the output of the first three on."""
        _, _, _, conv2, norm2, act2 = self.double_conv
        if head is not None and self._fuses(head):
            bias, given = _bias_and_norm(conv2, norm2)
            parameters = (conv2.weight, bias, head.conv.weight, head.conv.bias)
            options: dict[str, Any] = {"sigmoid": head.head == "sigmoid", "negative_slope": _slope(act2)}
            return ops.conv3x3_relu_conv1x1(x, *parameters, norm=given, **options)
        y = conv_norm_activation(conv2, norm2, act2, x)
        return y if head is None else head.fused(y)

    def _fuses(self, head: OutConv) -> bool:
        """Whether one op computes the second three and the head."""
        _, _, _, _, norm2, _ = self.double_conv
        return head.head in (None, "sigmoid") and _is_inference(norm2)


class Down(reference.Down):
    """Max-pooling, then DoubleConv. In a `UNet` as built the block above does the pooling."""

    maxpool_conv: Any

    def forward(self, x: Tensor) -> Tensor:
        if is_watched(x) or not self.has_plain_pool():
            return super().forward(x)
        return self.block(ops.max_pool2x2(x))

    @property
    def block(self) -> Any:
        """The double convolution that follows the pooling."""
        _, block = self.maxpool_conv
        return block

    def has_plain_pool(self) -> bool:
        """Whether the block gets what max_pool2x2 computes, and nothing else is done."""
        layers = self.maxpool_conv
        return is_plain(layers, nn.Sequential) and len(layers) == 2 and _is_max_pool2x2(next(iter(layers)))

    def has_plain_layers(self) -> bool:
        """Whether fused ops compute all that is in it."""
        return self.has_plain_pool() and is_plain_block(self.block, DoubleConv)


class Up(reference.Up):
    """Double the lower level, pad it to the skip's size, and DoubleConv the two without joining them.

    folds_upsampling: in inference the upsampling may be computed together with the convolution after it, by a weight
    composed of both, where that is faster. False has each computed by itself, as in training. The composed weight is
    recomputed when one of the two changes, but not within a CUDA graph: `fastunet.graphed` records a new one.
    """

    up: Any
    conv: Any
    folds_upsampling = True

    def forward(self, low: Tensor, skip: Tensor) -> Tensor:
        return self.fused(low, skip) if not is_watched(low) and self.has_plain_layers() else super().forward(low, skip)

    def has_plain_layers(self) -> bool:
        """Whether what is in it are fused ops, and an upsampling of torch's."""
        is_torchs = is_plain(self.up, nn.ConvTranspose2d) or is_plain(self.up, nn.Upsample)
        return is_torchs and is_plain_block(self.conv, DoubleConv)

    def layered(self, low: Tensor, skip: Tensor) -> Tensor:
        """forward(low, skip) by torch's layers, none of which is watched."""
        return self.conv.layered(torch.cat([skip, padded_to(self.up.forward(low), skip)], dim=1))

    def prepared_step(self, low: Tensor, skip: Tensor) -> StepUp:
        """Return the upsampling and the two layers after it, for inputs like these."""
        # In bfloat16, too: weights are composed in float32, and the upsampled image is not rounded.
        low32, skip32 = (torch.empty(1, device="cpu").expand(image.shape) for image in (low, skip))
        if self._composes(low32, skip32):
            return StepUp(self.up, COMPOSED, low, *self.conv.prepared_layers([skip]))
        conv, *_ = self.conv.double_conv
        total = conv.weight.shape[1]
        images = [like(skip, total)] if joins(skip) else [skip, like(skip, total - skip.shape[1])]
        is_packed = (
            _is_conv_transpose2x2(self.up) and dispatch.choose("conv_transpose2x2", low32, self.up.weight).prepares
        )
        by = ONEDNN if is_packed else MODULE
        return StepUp(self.up, by, low, *self.conv.prepared_layers(images))

    def fused(self, low: Tensor, skip: Tensor, *, head: OutConv | None = None) -> Tensor:
        """forward(low, skip); with head, head(forward(low, skip))."""
        if self._composes(low, skip):
            conv, norm, act, *_ = self.conv.double_conv
            bias, given = _bias_and_norm(conv, norm)
            parameters = (self.up.weight, self.up.bias, conv.weight, bias)
            options = {"norm": given, "negative_slope": _slope(act)}
            x = ops.conv_transpose2x2_concat_conv3x3_relu(skip, low, *parameters, **options)
            return self.conv.fused_second(x, head=head)
        return self.conv.fused(skip, padded_to(upsample(self.up, low), skip), head=head)

    def _composes(self, low: Tensor, skip: Tensor) -> bool:
        """Whether the upsampling is computed together with the convolution after it."""
        conv, norm, *_ = self.conv.double_conv
        return (
            self.folds_upsampling
            and _is_inference(norm)
            and _is_conv_transpose2x2(self.up)
            and all(s // 2 == n for s, n in zip(skip.shape[2:], low.shape[2:], strict=True))
            # A graph may be traced through here, but not through the question; the op asks at every call.
            and (
                torch.compiler.is_compiling()
                or (choice := dispatch.choose(dispatch.FUSED_UP, skip, conv.weight)).prepares
                or dispatch.is_to_measure(choice, skip.device)
            )
        )


class OutConv(reference.OutConv):
    """The 1x1 head with its activation."""

    conv: Any

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x) if not is_watched(x) and self.has_plain_layers() else super().forward(x)

    def has_plain_layers(self) -> bool:
        """Whether one op computes it."""
        return self.head in HEADS and _is_convolution(self.conv, 1)

    def layered(self, x: Tensor) -> Tensor:
        """forward of x by torch's layers, none of which is watched."""
        return super().forward(x)

    def fused(self, x: Tensor) -> Tensor:
        return ops.conv1x1(x, self.conv.weight, self.conv.bias, activation=self.head)


def upsample(up: Any, low: Tensor) -> Tensor:
    """up(low), by an op where there is one."""
    return ops.conv_transpose2x2(low, up.weight, up.bias) if _is_conv_transpose2x2(up) else up(low)


def conv_norm_activation(
    conv: Any, norm: Any, act: Any, x: Tensor, up: Tensor | None = None, *, pool: bool = False
) -> Any:
    """act(norm(conv(x))) of three that are fusable, as one op; x, or [x, up]. With pool, (y, max_pool2x2(y))."""
    if isinstance(norm, nn.Identity):
        args = ConvArgs(x, up, conv.weight, conv.bias, slope=_slope(act), pool=pool)
    else:
        kind, given = ("batch", _statistics(norm)) if isinstance(norm, nn.BatchNorm2d) else ("instance", {})
        parameters = (conv.weight, norm.bias, kind, norm.weight)
        args = ConvArgs(x, up, *parameters, eps=norm.eps, slope=_slope(act), pool=pool, **given)
    y, pooled = conv3x3(args.name, args)
    return (y, pooled) if pool else y


def _statistics(norm: Any) -> dict[str, Any]:
    """As nn.BatchNorm2d.forward: which statistics, and how far the running ones move."""
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    use_batch = norm.training or norm.running_mean is None
    mean, variance = norm.running_mean, norm.running_var
    if norm.training and not norm.track_running_stats:
        mean = variance = None
    return {"running_mean": mean, "running_var": variance, "training": use_batch, "momentum": momentum}


def is_left_to_aten(conv: Any, norm: Any, image: Tensor) -> bool:
    """Return whether the op of these two is torch's own anyway, on an image like this one whatever its channels."""
    if isinstance(norm, nn.InstanceNorm2d):  # Torch's answers contiguous for any format, and is slower.
        return False
    if not all(t.is_contiguous() for t in (*norm.parameters(), *norm.buffers())):  # Torch's gradient misreads.
        return False
    image = image.expand(-1, conv.weight.shape[1], -1, -1)
    args = ConvArgs(image, None, conv.weight, norm="batch" if isinstance(norm, nn.BatchNorm2d) else "none")
    training = torch.is_grad_enabled() or norm.training
    choice = args.choice(training=training)
    if choice.implementation != "aten" or dispatch.is_to_measure(choice, image.device):  # By its op.
        return False
    return not (training and dispatch.aten_is_slow(image, conv.weight))


def _is_inference(norm: Any) -> bool:
    """Whether norm is none, or batch norm by running statistics, and no gradient will be asked for."""
    return not torch.is_grad_enabled() and (statistics_of(norm) is not None or isinstance(norm, nn.Identity))


def _bias_and_norm(conv: Any, norm: Any) -> tuple[Any, Any]:
    """The arguments `bias` and `norm` of the ops for inference."""
    if isinstance(norm, nn.Identity):
        return conv.bias, None
    return norm.bias, (norm.running_mean, norm.running_var, norm.weight, norm.eps)


def _slope(act: Any) -> float:
    return getattr(act, "negative_slope", 0.0)


def is_fusable(conv: Any, norm: Any, act: Any) -> bool:
    """Whether the three are what one of the ops computes: as built, or changed by the user into something else."""
    if is_plain(norm, nn.InstanceNorm2d):
        has_op = not norm.track_running_stats and norm.running_mean is None
    else:
        has_op = is_plain(norm, nn.BatchNorm2d) or is_plain(norm, nn.Identity)
    # Of a slope that leaves the sign: the ops tell the gradient by the sign of the output.
    activates = is_plain(act, nn.ReLU) or (is_plain(act, nn.LeakyReLU) and 0 < act.negative_slope < float("inf"))
    return _is_convolution(conv, 3) and has_op and activates and (conv.bias is None or type(norm) is nn.Identity)


def _is_convolution(conv: Any, size: int) -> bool:
    """A plain 'same' convolution of this kernel size. The weight tells it: the size set beside it is not looked at."""
    is_right = is_plain(conv, nn.Conv2d) and conv.weight.shape[2:] == (size, size)
    return is_right and _is_set(conv, stride=1, padding=size // 2, dilation=1, groups=1, padding_mode="zeros")


def _is_conv_transpose2x2(up: Any) -> bool:
    is_right = is_plain(up, nn.ConvTranspose2d) and up.weight.shape[2:] == (2, 2)
    return is_right and _is_set(up, stride=2, padding=0, output_padding=0, dilation=1, groups=1)


def _is_max_pool2x2(pool: Any) -> bool:
    windows = {"kernel_size": 2, "stride": 2, "padding": 0, "dilation": 1}
    return is_plain(pool, nn.MaxPool2d) and _is_set(pool, **windows, ceil_mode=False, return_indices=False)


def _is_set(module: Any, **settings: Any) -> bool:
    """Whether the module is set so; a number stands for two of it as well."""
    return all(getattr(module, name) in (value, (value, value)) for name, value in settings.items())


def is_plain_block(block: Any, kind: type[DoubleConv] | type[Down] | type[Up] | type[OutConv]) -> bool:
    """Whether a neighbour may be computed together with the block's layers."""
    return is_plain(block, kind) and block.has_plain_layers()


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a call of module does what kind does, and nothing else: no subclass, hook, patch, or compiled call."""
    if type(module) is not kind or _methods(kind) != _METHODS[kind] or has_hooks(module):
        return False
    # What the instance may have of its own in the place of what its class does in a call.
    return _PATCHES.isdisjoint(vars(module))


def has_torchs_methods() -> bool:
    """Return whether no class of a plain module has had what its call runs exchanged."""
    return all(_methods(kind) == methods for kind, methods in _METHODS.items())


def _methods(kind: type[nn.Module]) -> tuple[Any, ...]:
    return kind.forward, kind.__call__, convolve_of(kind)


def is_watched(x: Any) -> bool:
    """Whether every module is to be called as such: for hooks of all modules, or for an export, a trace or a transform
    of torch.func, which take torch's own ops.
    """
    return (
        any(_HOOKS_OF_ALL_MODULES)
        or torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or in_transform()
        or isinstance(x, torch.fx.Proxy)
    )


_PATCHES = frozenset(("forward", "_conv_forward", "_check_input_dim", "_compiled_call_impl"))
_HOOKS_OF_ALL_MODULES = tuple(
    getattr(nn.modules.module, f"_global_{name}_hooks", {})
    for name in ("forward_pre", "forward", "backward_pre", "backward")
)
# As they are when this is imported: a class's own may be patched, too.
_METHODS: dict[type[nn.Module], Any] = {
    kind: _methods(kind)
    for kind in (
        *(nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.Identity, nn.ReLU, nn.LeakyReLU),
        *(nn.MaxPool2d, nn.Upsample, nn.Sequential, DoubleConv, Down, Up, OutConv),
    )
}
