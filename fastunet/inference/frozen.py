"""Inference on the CPU by weights that are prepared once and never looked at again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastunet import dispatch
from fastunet.checks import BackendError, ConfigError, DeviceError, DtypeError
from fastunet.cpu import net_graph
from fastunet.ops.registration import check_untransformed
from fastunet.unet import UNet, check_is_of_images

# Images of ever new sizes are not to fill the memory: so many are kept, and so many bytes of weights for all of them.
_MOST_SIZES, _MOST_BYTES = 64, 2 << 30


def freeze(model: UNet, *, dtype: torch.dtype = torch.float32) -> FrozenUNet:
    """Return a copy of the model for inference on the CPU that asks nothing after it is prepared.

    At each call a `UNet` asks whether its modules, settings and weights are what they were. The copy asks nothing: what
    is done to the model afterwards has no effect. Of images [N, C, H, W] of any size its results are those of model(x)
    up to rounding; with bfloat16, those of model(x) under autocast. The first call of each size prepares it, which may
    take seconds, and is kept for 64 sizes, or as many as take 2 GiB: the net becomes one graph that oneDNN compiles,
    unless its layers gain more by Winograd's algorithm, its values have no bounds (another activation than ReLU,
    instance norm), or this build of torch has no oneDNN Graph (torch.jit.enable_onednn_fusion).

    dtype: torch.float32 or torch.bfloat16, of the computation and the result.

    Raises ConfigError for a model that is no `UNet` of images as built (hooks, exchanged parts, volumes), in train
    mode, or of norms without running statistics in bfloat16; DtypeError for other dtypes; DeviceError for a model or an
    image that is not on the CPU; BackendError without oneDNN, or without its bfloat16 on this processor.
    """
    if not isinstance(model, UNet):
        raise ConfigError(f"freeze: expected a fastunet.UNet, got {type(model).__name__}")
    check_is_of_images("freeze", model)
    if not model.has_plain_layers():
        raise ConfigError("freeze: expected a UNet as built, got one with hooks, patches or exchanged parts")
    if model.training:
        raise ConfigError("freeze: a frozen model is for inference: expected eval mode, got train mode")
    parameters = [*model.parameters()]
    dtypes = {dtype, *(p.dtype for p in parameters)}
    if not dtypes <= {torch.float32, dtype} or dtype not in (torch.float32, torch.bfloat16):
        found = ", ".join(sorted(map(str, dtypes)))
        raise DtypeError(f"freeze: expected parameters in float32, and dtype float32 or bfloat16, got {found}")
    devices = {p.device.type for p in parameters}
    if devices != {"cpu"}:
        raise DeviceError(f"freeze: expected a model on the CPU, got {', '.join(sorted(devices))}")
    if not dispatch.prepares_nets(torch.empty(1, device="cpu"), dtype, parameters):
        raise BackendError(
            f"freeze: expected oneDNN with {dtype}, and backend 'auto'; this processor or setting has not"
        )
    return FrozenUNet(copy.deepcopy(model), dtype)


class FrozenUNet(nn.Module):
    """See `freeze`. model: the copy, which is not to be changed."""

    def __init__(self, model: UNet, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.requires_grad_(False), dtype
        self.training = False
        # For each size a graph's weights are kept twice: as they are, and in oneDNN's order.
        weights = 2 * dtype.itemsize * sum(p.numel() for p in model.parameters())
        self._most_sizes = max(1, min(_MOST_SIZES, _MOST_BYTES // weights))
        self._nets: dict[tuple[Any, ...], Callable[[Tensor], Tensor]] = {}

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self.forward(x)
        net = self._nets.get(self._key(x)) or self._prepared(x)
        return net(x.to(memory_format=torch.channels_last))

    def _prepared(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        check_untransformed("a frozen model")
        self.model.check_image(x)
        if x.device.type != "cpu" or x.numel() == 0:
            raise DeviceError(f"freeze: expected images on the CPU, got {list(x.shape)} on {x.device}")
        net = self.model.prepared_net(x, self.dtype)
        if self.dtype != torch.float32 and not net.folds_norms:
            raise ConfigError("freeze: expected batch norms with running statistics in bfloat16, or none, got others")
        if len(self._nets) >= self._most_sizes:
            self._nets.clear()
        self._nets[self._key(x)] = found = net_graph.prepare(net, x)
        return found

    def _key(self, x: Tensor) -> tuple[Any, ...]:
        return x.shape, x.dtype, x.device, dispatch.multiplies_in_float32()

    def train(self, mode: bool = True) -> Self:
        """Leave the model in eval mode, whatever the module is in that holds it."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What is prepared is not copied or pickled: a copy prepares its own."""
        return {**self.__dict__, "_nets": {}}
