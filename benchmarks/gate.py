"""What must hold of a run's result before it is timed, ours or an opponent's: it is right, by float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import fastunet
from fastunet.testing import UNIT_ROUNDOFF, parity
from fastunet.testing.ops import Call

from .cases import Layer
from .harness.timing import cudnn_benchmark
from .opponents import Opponent, Run, bce_dice, reason_of

# A net in a dtype may be this many times as far from float64 as plain torch modules are in the same dtype.
_TIMES_PLAIN = 2.0


def check_layer(layer: Layer, inputs: Mapping[str, Tensor], result: Any, *, allow_tf32: bool = False) -> None:
    """AssertionError, naming the worst element, unless the last image of a layer's forward result is within bounds.

    The bounds are those of `expected`: derived from the shapes and the dtype, whoever computed it.
    """
    images = {name: t if name in ("weight", "bias") else t[-1:] for name, t in inputs.items()}
    call = Call(layer.op, images, {}, {}, [], allow_tf32=allow_tf32, stores_steps=True)
    outputs = [y[-1:] for y in parity.outputs_of(result)]
    parity.compare(dict(zip(("y", "pooled"), outputs, strict=False)), call)


def runs_or_reason(
    opponent: Opponent, prepare: Callable[[Opponent], list[Run]], check: Callable[[Opponent, Any], object]
) -> list[Run] | str:
    """An opponent's runs, the first of which was right; or why there are none."""
    try:
        with cudnn_benchmark():
            runs = prepare(opponent)
            result = runs[0]()
        check(opponent, result)
    except Exception as error:  # A compiler's, a driver's: an opponent that fails is not the end of the comparison.
        return reason_of(error)
    return runs


class NetGate:
    """What a model gives on images x, in float64 and by plain modules, and whether an opponent's first result is right.

    training: the result is the loss of the first step, else the outputs, of which the last image's are looked at. The
    float64 net is run once.
    """

    def __init__(self, model: fastunet.UNet, x: Tensor, target: Tensor, *, training: bool) -> None:
        self._model, self._x, self._training = copy.deepcopy(model).train(training), x if training else x[-1:], training
        self._target = target.double()
        self._exact = self._outputs(torch.float64)
        self._allowed: dict[str, float] = {}

    def check(self, opponent: Opponent, result: Tensor) -> float:
        """How far the result of the opponent's first run is off: AssertionError if by more than is allowed.

        Outputs may be twice as far from float64, relatively and in the 2-norm, as plain modules of the opponent's dtype
        are, or as far as roundings alone may take them; the loss, by what that can do to it (`loss_bound`).
        """
        if opponent.dtype not in self._allowed:
            dtype = getattr(torch, opponent.dtype)
            plain = _distance(self._outputs(dtype), self._exact)
            self._allowed[opponent.dtype] = max(_TIMES_PLAIN * plain, self._rounded(dtype))
        distance, exact = self._allowed[opponent.dtype], self._exact
        if self._training:
            what, off = "the loss", abs(float(result) - float(bce_dice(exact, self._target)))
            allowed = loss_bound(distance, exact, self._target)
        else:
            what, off, allowed = "the outputs, relative", _distance(result[-1:].double(), exact), distance
        if not off <= allowed:  # NaN is not.
            raise AssertionError(f"{opponent.name}: distance to float64 of {what}: {off:.2e}, allowed {allowed:.2e}")
        return off

    def _rounded(self, dtype: torch.dtype) -> float:
        """The relative distance that roundings alone may cause: of the float64 net, each layer's result off at random.

        A convolution's by as much as `fastunet.testing` grants its sum and its result, a norm's by its result's
        rounding. A norm of few values magnifies what came in; how much, only the net itself tells.
        """
        generator = torch.Generator(self._x.device).manual_seed(0)

        def disturb(module: nn.Module, inputs: Any, result: Tensor) -> Tensor:
            size = UNIT_ROUNDOFF[dtype]
            if isinstance(module, nn.Conv2d):
                size += 6 * module.weight[0].numel() ** 0.5 * UNIT_ROUNDOFF[torch.float32]
            noise = torch.rand(result.shape, generator=generator, dtype=torch.float64, device=result.device)
            return result * (1 + size * (2 * noise - 1))

        net = self._model.to_reference().double()
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d | nn.InstanceNorm2d):
                module.register_forward_hook(disturb)
        with torch.no_grad():
            return _distance(net(self._x.double()), self._exact)

    def _outputs(self, dtype: torch.dtype) -> Tensor:
        """Of plain modules in that dtype (16 bits in training: under autocast), in float64."""
        amp = self._training and dtype in (torch.bfloat16, torch.float16)
        held = torch.float32 if amp else dtype
        net = self._model.to_reference().to(held)
        with torch.no_grad(), torch.autocast(self._x.device.type, dtype) if amp else nullcontext():
            return net(self._x.to(held)).double()


def loss_bound(distance: float, logits: Tensor, target: Tensor) -> float:
    """How far BCE + Dice may be off where the logits, float64 [N, C, H, W], are off by that relative 2-norm.

    With e the root mean square of the errors: the derivative of a pixel's cross entropy by its logit is at most 1, so
    that the mean is off by e at most; that of a channel's Dice is at most 2 / (sum p + sum t) by a probability, and so
    1 / (2 sum t) by a logit. The rest are float32 roundings of the sums.
    """
    e = distance * float(logits.square().mean().sqrt())
    pixels = target[0, 0].numel()
    of_dice = float((pixels / (2 * target.sum((2, 3)))).max())
    roundings = (6 * pixels**0.5 + 16) * UNIT_ROUNDOFF[torch.float32]
    return e * (1 + of_dice) + roundings * (float(bce_dice(logits, target)) + 1)


def _distance(actual: Tensor, exact: Tensor) -> float:
    return float((actual - exact).norm() / exact.norm())
