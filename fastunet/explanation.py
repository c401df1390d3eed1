"""Which implementation runs where, and why, without running it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastunet import dispatch
from fastunet.ops.registration import NAMESPACE, choice_for

# ATen ops worth a line of their own: layers that run beside our ops.
_ATEN_LAYERS = ("convolution", "batch_norm", "max_pool2d", "upsample", "cat", "pad", "relu")


@dataclass(frozen=True)
class Row:
    """One op of one layer: the op, its input [N, C, H, W] and dtype, what runs it, and why."""

    layer: str
    op: str
    input: str
    implementation: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """The rows in the order they run; printing it gives the table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        table = [("layer", "op", "input", "runs on", "why")]
        table += [(row.layer, row.op, row.input, row.implementation, row.reason) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        )


def explain(model: nn.Module, example: Tensor, *, device: torch.device | str | None = None) -> Explanation:
    """Which implementation each op of model(example) gets under the backend in force, and the reason.

    Nothing is computed and nothing changes: the model runs on fake tensors, without data. `device` asks about another
    device than the example's, "cuda" also on a machine that has none. The model's mode is as it stands: in training it
    is asked as for a step with gradients, in eval as for inference.
    Raises BackendError where the forced backend cannot run an op.
    """
    target = torch.device(device) if device is not None else example.device
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(t: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=target, requires_grad=False)

    state = {name: fake(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    layers = {id(t): name.rpartition(".")[0] for name, t in state.items()}
    with torch.set_grad_enabled(model.training), mode, _Recorder(layers) as recorder:
        torch.func.functional_call(model, state, (fake(example),))
    return Explanation(tuple(recorder.rows))


class _Recorder(TorchDispatchMode):
    """Asks dispatch about each op of ours as it passes, and notes the layers that are not ours.

    A layer goes by the module that holds the op's weight; hooks would change what they watch.
    """

    def __init__(self, layers: dict[int, str]) -> None:
        super().__init__()
        self.layers = layers
        self.rows: list[Row] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x = next((a for a in args if isinstance(a, Tensor)), None)
        op = func.name().partition("::")[2].partition(".")[0]
        ours = func.namespace == NAMESPACE
        if x is not None and (ours or any(part in op for part in _ATEN_LAYERS)):
            choice = self._choice(op, x, args) if ours else dispatch.Choice("aten", "not one of fastunet's ops")
            layer = next((self.layers[id(a)] for a in args if id(a) in self.layers), "")
            described = f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
            self.rows.append(Row(layer, op, described, choice.implementation, choice.reason))
        return func(*args, **(kwargs or {}))

    def _choice(self, op: str, x: Tensor, args: Any) -> dispatch.Choice:
        # The fake parameters ask for no gradient, as the model's do where gradients are recorded.
        return dispatch.choose(op, x) if torch.is_grad_enabled() else choice_for(op, x, args)
