"""A net's inference as a whole, noted down once for each kind of image and repeated as long as the net is the same.

Nothing is checked, chosen or described any more; each tensor is allocated, and let go of, as by the layers themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import dispatch, modules
from .model_state import ModelState, autocast_dtype
from .ops.replay import Programs, kinds, may_replay

# Of the modules that a net may have for its calls to be repeated: what they do follows from settings and tensors.
_OWN = ("fastunet.modules", "fastunet.quantization")
_TORCHS = (*modules.PLAIN_TYPES, nn.Sequential, nn.ModuleList, nn.MaxPool2d, nn.Upsample)
# Kinds of images remembered of each net.
_MOST = 64


class _Net:
    """What was noted down of a net, and its state then."""

    def __init__(self, net: nn.Module) -> None:
        _, *inner = net.modules()
        self.state = ModelState(net)
        self.is_known = all(map(_is_known, inner))
        self.programs = Programs(_MOST)


def _is_known(module: nn.Module) -> bool:
    is_known = type(module) in _TORCHS or type(module).__module__ in _OWN
    return is_known and not modules.has_hooks(module) and "forward" not in vars(module)


_nets: WeakKeyDictionary[nn.Module, _Net] = WeakKeyDictionary()


def in_one_go(net: nn.Module, x: Tensor, layers: Callable[[Tensor], Tensor]) -> Tensor:
    """layers(x), which runs the layers of a `UNet` one by one: on Triton kernels in inference, repeated from a list
    where it ran for images of the same kind, dtype and autocast setting before.

    What has changed since, the values of weights aside, makes the lists anew. A net with other modules than those it is
    built of, or with hooks on them, always runs layer by layer.
    """
    if torch.compiler.is_compiling():
        return layers(x)
    if net.training:
        _nets.pop(net, None)  # It would hold on to weights that training may put others in the place of.
    if not _may_repeat(net, x):
        return layers(x)
    known = _nets.get(net)
    if known is None or not known.state.holds():
        known = _nets[net] = _Net(net)
    if not known.is_known:
        return layers(x)
    kind = (dispatch.selected_backend(), autocast_dtype(x.device.type), *kinds([x], []))
    return known.programs.run(kind, [x, *known.state.tensors], functools.partial(layers, x))


def _may_repeat(net: nn.Module, x: Tensor) -> bool:
    """Whether what runs are Triton kernels, in inference, and nothing watches the layers."""
    return (
        type(x) is Tensor
        and not net.training
        and not torch.is_grad_enabled()
        and (x.is_cuda or dispatch.interpreting())
        and dispatch.selected_backend() != "aten"
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not any(_hooks_of_all_modules)
        and may_replay()
    )


_hooks_of_all_modules = (
    *(torch.nn.modules.module._global_forward_pre_hooks, torch.nn.modules.module._global_forward_hooks),
    *(torch.nn.modules.module._global_backward_pre_hooks, torch.nn.modules.module._global_backward_hooks),
)
