"""What is known of a model from outside: whether it gives logits, through whatever it is wrapped in, and its mode."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from fastunet.checks import ConfigError
from fastunet.inference.cuda_graphs import GraphedModel
from fastunet.inference.frozen import FrozenUNet
from fastunet.reference import ReferenceUNet
from fastunet.reference.unet import OutConv
from fastunet.torch_private import original
from fastunet.unet import UNet

# By the name of what they wrap: what they give is what that gives.
WRAPPERS: dict[str, tuple[type[nn.Module], ...]] = {
    "module": (DataParallel, DistributedDataParallel, AveragedModel),
    "model": (GraphedModel, FrozenUNet),
}
# At the end of an nn.Sequential, what leaves logits logits and probabilities probabilities.
KEEPING = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Upsample)
# What gives each pixel by itself, in eval mode.
POINTWISE = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Softmax2d)
# Their code is not to be seen.
OPAQUE = (torch.fx.GraphModule, torch.jit.ScriptModule)


def gives_logits(model: nn.Module) -> bool | None:
    """Whether the model gives logits, or probabilities over channels, as its parts tell; None where they do not."""
    if isinstance(model, nn.Sigmoid | nn.Softmax2d) or (isinstance(model, nn.Softmax) and model.dim in (1, -3)):
        return False
    if isinstance(model, nn.Conv2d):
        return True
    if isinstance(model, OutConv):
        return model.head is None
    if isinstance(model, ReferenceUNet):
        return gives_logits(model.outc) if is_plain_unet(model) else None
    if isinstance(model, nn.Sequential):
        last = next((module for module in reversed(model) if not isinstance(module, KEEPING)), None)
        return None if last is None else gives_logits(last)
    if (compiled := original(model)) is not model:
        return gives_logits(compiled)
    for name, types in WRAPPERS.items():
        if isinstance(model, types):
            return gives_logits(model.get_submodule(name))
    return None


def is_plain_unet(model: nn.Module) -> bool:
    """Whether it is a UNet or its reference, with the forward that these have."""
    plain = getattr(type(model), "forward", None) in (UNet.forward, ReferenceUNet.forward)
    return isinstance(model, ReferenceUNet) and plain and "forward" not in vars(model)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return what is within torch's and fastunet's wrappers, and within nn.Sequential where the rest acts on pixels."""
    while True:
        name = next((name for name, types in WRAPPERS.items() if isinstance(model, types)), None)
        rest = [m for m in model if not isinstance(m, POINTWISE)] if type(model) is nn.Sequential else []
        inner = model.get_submodule(name) if name else rest[0] if len(rest) == 1 else original(model)
        if inner is model:
            return model
        model = inner


def as_probabilities(model: nn.Module, from_logits: bool | None) -> Callable[[Tensor], Tensor]:
    """Return the function of an image batch that gives the model's probabilities, float32.

    from_logits: what the model gives, None where that is to be found: by its parts; or, of code that wraps a U-Net, by
    whether its first result is the U-Net's own. A model without a U-Net in it is taken to give logits.

    Raises ConfigError, here or at the first call, where neither tells.
    """
    known = from_logits if from_logits is not None else gives_logits(model)
    if known is None and isinstance(model, OPAQUE):
        raise _unknown(model)
    if known is None and not _unets(model):
        known = True

    def run(x: Tensor) -> Tensor:
        nonlocal known
        if known is None:
            known = _are_logits(model, x)
        y = model(x)  # Also once it is known: a watched model may take another way, and round otherwise.
        if not isinstance(y, Tensor) or y.dim() != 4:
            got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ConfigError(f"predict: expected a model that gives a tensor [N, K, H, W], got {got}")
        y = y.float()
        if not known:
            return y
        return y.sigmoid() if y.shape[1] == 1 else y.softmax(dim=1)

    return run


def _are_logits(model: nn.Module, x: Tensor) -> bool:
    """Whether model(x) is logits: as is known of the one part that has given the same."""
    results = list[Tensor]()
    inner = [unet for unet in _unets(model) if unet is not model] or [model.get_submodule("outc")]
    if len(inner) == 1:
        around = (m for m in model.modules() if m is not model and inner[0] in m.modules())
        part = next((m for m in around if gives_logits(m) is not None), None)
        if part is not None:
            handle = part.register_forward_hook(lambda module, args, result: results.append(result))
            try:
                y = model(x)
            finally:
                handle.remove()
            if isinstance(y, Tensor) and any(y is r or torch.equal(y.float(), r.float()) for r in results):
                return bool(gives_logits(part))
    raise _unknown(model)


def _unknown(model: nn.Module) -> ConfigError:
    return ConfigError(
        f"predict: cannot tell whether {type(model).__name__} gives logits or probabilities: "
        "expected a U-Net in a wrapper of torch's, or in one whose result is the U-Net's own; "
        "pass from_logits=True or from_logits=False"
    )


def _unets(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, ReferenceUNet)]


# Of modules that predictions hold in eval mode, though they are in train mode: how many do.
_held: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the block all modules of the model are in eval mode; after the last such block, in any thread, each is as
    it was.
    """
    # Not torch.compile's wrapper, whose mode is that of what it wraps.
    modules = [module for module in model.modules() if "training" in vars(module)]
    with _lock:
        held = [module for module in modules if module.training or module in _held]
        for module in held:
            _held[module] = _held.get(module, 0) + 1
        if any(module.training for module in modules):
            _switch(model, False)
            for module in held:
                module.training = False
    try:
        yield
    finally:
        with _lock:
            for module in held:
                _held[module] -= 1
                if _held[module] == 0:
                    del _held[module]
            freed = {module for module in held if module not in _held}
            for module in freed:
                if type(module).train is not nn.Module.train:  # It may do more than set flags, and set those of others.
                    _switch(module, True)
            for module in modules:
                module.training = module in freed


def _switch(model: nn.Module, training: bool) -> None:
    with suppress(NotImplementedError):  # Of an exported program, whose mode is part of its code.
        model.train(training)
