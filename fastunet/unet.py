"""`fastunet.UNet`: the U-Net on fused ops."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastunet import dispatch, modules, pretrained, reference
from fastunet.checks import ConfigError, ShapeError, check_activation, check_together
from fastunet.cpu.model_state import Memo, autocast_dtype
from fastunet.cpu.pooling import max_pool2x2
from fastunet.cpu.prepared_net import PreparedNet, like
from fastunet.ops.registration import is_unseen
from fastunet.reference import ReferenceUNet

# The ways in which a net is computed.
MODULES, LAYERS, OPS = "modules", "layers", "ops"  # or a PreparedNet


def _either(name: str, value: Any, alias: str, other: Any, default: Any = None) -> Any:
    """Return the one of two spellings of an argument that is given. ConfigError where both are, or neither."""
    if value is not None and other is not None:
        raise ConfigError(f"UNet: expected {name} or {alias}, which mean the same, got both")
    found = value if value is not None else other if other is not None else default
    if found is None:
        raise ConfigError(f"UNet: {name}: expected a number of channels (also known as {alias}), got none")
    return found


class UNet(ReferenceUNet):
    """The U-Net of Ronneberger et al. 2015 (arXiv:1505.04597), every layer a fused op.

    [N, in_channels, H, W] to [N, out_channels, H, W]: logits, or probabilities where `head` is given. Any H and W from
    2**depth, odd ones included, depth = len(features) - 1. With the defaults, state_dict keys and shapes are those of
    milesial/Pytorch-UNet's UNet(in_channels, out_channels). Parameters are contiguous, activations channels_last.

    Arguments:
        features: channels of each level, from the image to the bottom.
        norm: "batch", "instance" (affine), or None, where the convolutions have a bias instead.
        upsample: "transpose" (2x2 transposed convolution) or "bilinear" (align_corners=True, and half as many channels
            at each level's end); of volumes "transpose" or "trilinear".
        activation: "relu", or "leaky_relu" with slope 0.01.
        head: None, "sigmoid", or "softmax" over the channels.
        dims: 2, of images, or 3, of volumes [N, C, D, H, W]: the same net of torch's own 3-D layers, none of them
            fused, for forward and backward alone. Prediction in tiles, training by `fastunet train`, export,
            quantisation, `graphed` and `tune` are of images.
        n_channels, n_classes, bilinear: in_channels, out_channels and upsample as milesial/Pytorch-UNet spells them.

    In inference each upsampling may be folded into the convolution after it: on the CPU in float32, by the Triton
    kernels in 16 bits on sm_90 and above. `up.folds_upsampling = False` for an `up` of `model.ups` leaves it out.

    It is an nn.Module like any other: hooks fire on every module; parts may be exchanged, subclassed, wrapped, patched,
    frozen. What no fused op computes then runs module by module, as in `fastunet.reference`, and activations have the
    memory format of the input: pass channels_last images for speed. `fastunet.explain` shows what runs.

    `UNet.from_pretrained` makes one from a checkpoint, of milesial/Pytorch-UNet and others; `save_pretrained` keeps it.

    Raises ValueError on unknown options, ShapeError on an image too small or with other channels.
    """

    inc: Any
    outc: Any
    double_conv_type, down_type, up_type, out_type = modules.DoubleConv, modules.Down, modules.Up, modules.OutConv

    def __init__(
        self,
        in_channels: int | None = None,
        out_channels: int | None = None,
        *,
        features: Sequence[int] = (64, 128, 256, 512, 1024),
        norm: str | None = "batch",
        upsample: str | None = None,
        activation: str = "relu",
        head: str | None = None,
        n_channels: int | None = None,
        n_classes: int | None = None,
        bilinear: bool | None = None,
        dims: int = 2,
    ) -> None:
        spelled = None if bilinear is None else "bilinear" if bilinear else "transpose"
        super().__init__(
            _either("in_channels", in_channels, "n_channels", n_channels),
            _either("out_channels", out_channels, "n_classes", n_classes),
            features=features,
            norm=norm,
            upsample=_either("upsample", upsample, "bilinear", spelled, default="transpose"),
            activation=activation,
            head=head,
            dims=dims,
        )
        self._memo = Memo()

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)

    def forward_levels(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Compute forward(x), and what each step up but the last gives: [N, C, H, W] of each level, from the bottom on.

        Raises as forward.
        """
        levels: list[Tensor] = []
        y = self._run(x, levels)
        return y, levels[: self.depth - 1]

    def _run(self, x: Tensor, levels: list[Tensor] | None = None) -> Tensor:
        """forward(x), which appends to `levels` what the steps up give."""
        way: Any = MODULES if modules.is_watched(x) else self._way(x)
        if way is MODULES:
            return self._by_modules(x, levels)
        self.check_image(x)
        # Unlike `contiguous`, `to` gives an image of one channel the strides by which it is known as channels_last.
        x = x.to(memory_format=torch.channels_last)
        if way is OPS:
            return self._by_ops(x, levels)
        return self._by_layers(x, levels) if way is LAYERS else way(x, levels)

    def _by_ops(self, x: Tensor, levels: list[Tensor] | None) -> Tensor:
        skips = []
        for block in self.encoder:
            skip, x = block.fused_pool(x)
            skips.append(skip)
        x = self.bottleneck.fused(x)
        *decoder, last = self.decoder
        for block in decoder:
            x = block.fused(x, skips.pop())
            if levels is not None:
                levels.append(x)
        return last.fused(x, skips.pop(), head=self.head)

    def _by_layers(self, x: Tensor, levels: list[Tensor] | None) -> Tensor:
        skips = []
        *encoder, bottleneck = self._descent()
        for block in encoder:
            skips.append(block.layered(x))
            x = max_pool2x2(skips[-1])
        x = bottleneck.layered(x)
        for block in self.decoder:
            x = block.layered(x, skips.pop())
            if levels is not None:
                levels.append(x)
        return self.head.layered(x)

    def _way(self, x: Tensor) -> Any:
        """How to compute the net: by its modules, where one's own call is asked for; by weights prepared for all of it,
        in inference on the CPU; by the modules' layers, where all is left to ATen, which gains nothing of knowing the
        neighbours; else by fused ops.
        """
        if self.dims == 3:
            self._check_sides(x)
            return MODULES
        if torch.compiler.is_compiling():
            return OPS if self.has_plain_layers() else MODULES
        signature, autocast = None, autocast_dtype(x.device.type)
        if x.dim() == 4 and is_unseen((x,)):
            signature = (x.shape, x.dtype, autocast, x.device, torch.is_grad_enabled(), dispatch.settings(x.device))

        def find() -> Any:
            if not self.has_plain_layers():
                return MODULES
            return OPS if signature is None else self._way_by_size(x, autocast)

        way = self._memo.answer(self, signature, find)
        return way if modules.has_torchs_methods() else MODULES

    def _way_by_size(self, x: Tensor, autocast: torch.dtype | None) -> Any:
        dtype = autocast or x.dtype
        is_inference = not torch.is_grad_enabled() and not any(module.training for module in self.modules())
        if is_inference and dispatch.prepares_nets(x, dtype, [*self.parameters()]):
            net = self.prepared_net(x, dtype)
            if dtype == torch.float32 or net.folds_norms:
                return net
        if autocast is not None and not torch.is_grad_enabled():
            return OPS  # They keep cast weights, which layers would cast at every call.
        blocks = [*self._descent(), *(block.conv for block in self.decoder)]
        levels = [*range(self.depth + 1), *reversed(range(self.depth))]
        one = x.new_empty(1, dtype=dtype)
        images = [one.expand(x.shape[0], 1, *(side >> level for side in x.shape[2:])) for level in levels]
        is_left = all(
            modules.is_left_to_aten(conv, norm, image)
            for block, image in zip(blocks, images, strict=True)
            for conv, norm in block.convolutions()
        )
        return LAYERS if is_left else OPS

    def prepared_net(self, x: Tensor, dtype: torch.dtype) -> PreparedNet:
        """Return the net for inference in `dtype` on images like x, by weights prepared for all of it."""
        image, descent, skips = torch.empty(1, dtype=dtype, device="cpu").expand(x.shape), [], list[Tensor]()
        for block in self._descent():
            image = image[:, :, : image.shape[2] // 2, : image.shape[3] // 2] if skips else image
            descent.append(block.prepared_layers([image]))
            image = like(image, descent[-1][-1].conv.weight.shape[0])
            skips.append(image)
        low, ascent = skips.pop(), []
        for block in self.decoder:
            ascent.append(block.prepared_step(low, skips.pop()))
            low = like(ascent[-1].second.images[0], ascent[-1].second.conv.weight.shape[0])
        return PreparedNet(descent, ascent, self.head, dtype)

    def has_plain_layers(self) -> bool:
        """Return whether no module's own call is asked for, so that neighbours can be computed together."""
        return (
            modules.is_plain_block(self.inc, modules.DoubleConv)
            and all(modules.is_plain_block(down, modules.Down) for down in self.downs)
            and all(modules.is_plain_block(up, modules.Up) for up in self.ups)
            and modules.is_plain_block(self.outc, modules.OutConv)
        )

    @property
    def encoder(self) -> list[Any]:
        """The double convolutions above the bottleneck, from the image on; each is followed by a pooling."""
        return self._descent()[:-1]

    @property
    def bottleneck(self) -> Any:
        """The double convolution of the lowest level."""
        return self._descent()[-1]

    @property
    def decoder(self) -> list[Any]:
        """The steps up, from the bottleneck on."""
        return self.ups

    @property
    def head(self) -> Any:
        """The 1x1 convolution at the end, with its activation."""
        return self.outc

    def _descent(self) -> list[Any]:
        return [self.inc, *(down.block for down in self.downs)]

    def check_image(self, x: Tensor) -> None:
        """Raise ShapeError, DtypeError or DeviceError for an input that the net as it is cannot take."""
        weight = next(iter(self.inc.double_conv)).weight
        self._check_input(x, weight)
        check_together("UNet", x, weight=weight)

    def _check_input(self, x: Tensor, weight: Tensor) -> None:
        """Raise ShapeError for what the layers as they are cannot take, before any of them runs."""
        channels = weight.shape[1]
        if x.dim() == 4 and x.shape[1] == channels and min(x.shape[2:]) >= 2 << self.depth and x.is_floating_point():
            return  # As almost always, and then there is nothing to explain.
        self._check_sides(x)
        if x.shape[1] != channels:
            raise ShapeError(f"UNet: expected {channels} input channels, got {x.shape[1]} in {list(x.shape)}")

    def _check_sides(self, x: Tensor) -> None:
        """Raise ShapeError for what is no image (or volume), or is too small for as many levels."""
        check_activation("UNet", dims=self.dims, input=x)
        least, sides, first = 2**self.depth, x.shape[2:], "depth, " if self.dims == 3 else ""
        if min(sides) < least:
            raise ShapeError(f"UNet: expected {first}height and width >= {least} (2**depth), got {_by(sides)}")
        norms = (nn.InstanceNorm2d, nn.InstanceNorm3d)
        if max(sides) < 2 * least and any(isinstance(layer, norms) for layer in self.downs[-1].modules()):
            raise ShapeError(
                f"UNet: instance norm needs more than one pixel at the bottom: "
                f"expected {first}height or width >= {2 * least} (2**(depth + 1)), got {_by(sides)}"
            )

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str] | Mapping[str, Any], *, dtype: torch.dtype | None = None, **options: Any
    ) -> Self:
        """The U-Net of some weights, on the CPU and in eval mode; the random state is left alone.

        The weights are fastunet's or milesial/Pytorch-UNet's, or mateuszbuda/brain-segmentation-pytorch's, whose head
        is a sigmoid. A prefix "module." or "_orig_mod." of all names, milesial's `mask_values`, a convolution's bias
        before a norm and missing batch counts make no difference; outputs are equal to rounding.

        Arguments:
            source: a folder (of `save_pretrained`, or the RUN of `fastunet train`), a .safetensors file, a file of
                torch.save (read by weights_only=True alone: no pickle is run), or a state dict. The last two may keep
                it under "state_dict", "model_state_dict", "model" or "net".
            dtype: that of the model; None keeps the weights', half precision too.
            options: arguments of UNet. What weights do not tell, `activation` and `head`, is as given, else as
                config.json says, else "relu" and the format's head. The others follow from the weights, which what is
                given must agree with.

        Raises:
            DataError: a file that is missing, broken, refused by weights_only, or of an unknown model; the message
                names it.
            DtypeError: weights of several dtypes, where dtype is None; or another than float16, bfloat16, float32, 64.
            ConfigError: an option that UNet does not have, or the weights contradict.
            MissingPackageError: a safetensors file, without that package.
        """
        config, state = pretrained.load(source, options, dtype)
        with torch.device("meta"):
            try:
                model = cls(**config)
            except TypeError as error:
                raise ConfigError(
                    f"from_pretrained: expected {cls.__name__} to take the arguments of UNet, got: {error}"
                ) from error
        model = model.to(state["outc.conv.weight"].dtype).to_empty(device="cpu")
        model.load_state_dict(state)
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write FOLDER/config.json and FOLDER/model.safetensors, from which `from_pretrained` makes an equal model.

        The folder is made where there is none. Both files are complete before one appears, and replace those of an
        earlier save_pretrained.

        Raises:
            DataError: folder is a file, or holds another config.json, that of a training run included: it says more,
                which would be lost.
            ConfigError: the model is no longer UNet(**model.config), because a module or its settings were changed.
            DtypeError: weights of several dtypes.
            MissingPackageError: without safetensors.
        """
        with torch.device("meta"):
            plain = UNet(**self.config)
        # Of a subclass the name alone may differ. SyncBatchNorm has batch norm's weights and means the same.
        for now, built in zip(str(self).splitlines()[1:], str(plain).splitlines()[1:], strict=False):
            if now.replace("SyncBatchNorm", f"BatchNorm{self.dims}d") != built:
                raise ConfigError(f"save_pretrained: expected UNet as built, {built.strip()}, got {now.strip()}")
        pretrained.save(folder, self.config, self.state_dict())

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes to a repository of the Hugging Face Hub, made where there is none.

        Returns the commit's address. Raises as `save_pretrained`; MissingPackageError without huggingface_hub, whose
        own errors say what the Hub refuses.
        """
        return pretrained.push(self.save_pretrained, repo_id, private, token)

    def to_reference(self) -> ReferenceUNet:
        """Return the reference model, in plain PyTorch: a copy of this one as it is now, exchanged parts and hooks too,
        without gradients.

        Raises ConfigError for a subclass with a forward of its own.
        """
        if type(self).forward is not UNet.forward:
            raise ConfigError(f"to_reference: expected UNet's forward, got {type(self).__name__}'s own")
        model = copy.deepcopy(self).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        for module in model.modules():
            for kind, plain in _REFERENCES.items():
                if isinstance(module, kind) and type(module).forward is kind.forward:
                    module.__class__ = plain
        model.zero_grad()
        return model


def _by(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))


def check_is_of_images(what: str, model: nn.Module) -> None:
    """Raise ConfigError where a U-Net of volumes, which has the model alone, is the model or within it."""
    if any(isinstance(module, ReferenceUNet) and module.dims == 3 for module in model.modules()):
        raise ConfigError(f"{what}: expected a UNet of images (dims=2), got dims=3: {dispatch.VOLUMES}")


_REFERENCES: dict[type[nn.Module], type[nn.Module]] = {
    UNet: ReferenceUNet,
    modules.DoubleConv: reference.DoubleConv,
    modules.Down: reference.Down,
    modules.Up: reference.Up,
    modules.OutConv: reference.OutConv,
}
