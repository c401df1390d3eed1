"""What an op has to gain, in the place of layers that inductor would compile together with what surrounds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastunet import dispatch
from fastunet.compiler.fx_nodes import arguments, has_effect, name_of, value_of
from fastunet.cpu import winograd

if TYPE_CHECKING:
    import torch

    from fastunet.compiler.patterns import Pattern

# The speedup from which a kernel replaces what inductor compiles, which may also fuse it with what surrounds it; and
# over ATen, where inductor was not measured: all that fusing can gain a classic U-Net at a GPU's peak rates is a third.
_OVER_INDUCTOR, _OVER_ATEN = 1.1, 1.33
# The share of its convolutions' multiplications that a graph must spare by Winograd's algorithm, to pay for the fusion
# and the memory formats of inductor's that end at such layers. Measured in training on two cores: graphs that spare 5 %
# lose, with 25 and 27 % a step is as long as inductor's to 2 % (benchmarks/results/cpu/drop_in_training.json); the
# classic net, with 47 %, is 1.19 times as fast (unet_float32.json).
_SPARED = 1 / 3


def take_what_leaves(patterns: Sequence[Pattern], device: torch.device | None) -> None:
    """Replace the layers on the CPU, or of a graph that is to be on `device`, whose activation leaves the graph with a
    gradient to come.

    Of such a result inductor keeps a mask for the backward, whose bools it writes one by one (benchmarks/NOTES.md). The
    op keeps the result itself, which lives on anyway. So does torch of a ReLU, and of a leaky one in place; what
    another leaky ReLU gives may be changed afterwards.
    """
    if dispatch.selected_backend() == "aten":
        return
    for pattern in patterns:
        activation, value = pattern.activation, value_of(pattern.result)
        trains = value.requires_grad and (device or value.device).type == "cpu"
        leaves = any(user.op == "output" for user in pattern.result.users)
        if activation is None or pattern.runs_on != "aten" or not (trains and leaves):
            continue
        if name_of(activation) == "relu" or has_effect(activation):
            pattern.is_replaced = True
            pattern.reason = "its result leaves the graph, and inductor would write a mask for its gradient"


def leave_what_spares_little(patterns: Sequence[Pattern]) -> None:
    """Leave the layers that Winograd's algorithm would run unless together they spare the graph enough."""
    by_winograd = [pattern for pattern in patterns if pattern.is_replaced and pattern.runs_on == "winograd"]
    given = [(arguments(pattern.anchor), pattern) for pattern in by_winograd]
    spared = sum(winograd.spared(value_of(a["input"]), value_of(a["weight"])) * _products(p) for a, p in given)
    everything = sum(map(_products, patterns)) if by_winograd else 0
    for pattern in by_winograd if spared < _SPARED * everything else ():
        pattern.is_replaced = False
        pattern.reason = (
            f"Winograd's algorithm would save {spared / everything:.0%} of the graph's multiplications, "
            f"inductor's fusion gains more than that below {_SPARED:.0%}"
        )


def _products(pattern: Pattern) -> float:
    """How many products of weights and pixels the anchor adds up for one image; no end of them at an open size."""
    given = arguments(pattern.anchor)
    weight = value_of(given.get("weight"))
    if weight is None:
        return 0
    is_transposed = name_of(pattern.anchor).startswith("conv_transpose")
    sizes = [*value_of(given["input"] if is_transposed else pattern.anchor).shape[2:]]
    return weight.numel() * math.prod(sizes) if all(isinstance(size, int) for size in sizes) else math.inf


def gains_little(choice: dispatch.Choice) -> bool:
    """Whether a kernel that is faster than ATen may not be faster than what inductor compiles."""
    if choice.over_inductor is not None:
        return choice.over_inductor < _OVER_INDUCTOR
    return choice.speedup is not None and choice.speedup < _OVER_ATEN
