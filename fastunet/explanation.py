"""Which implementation runs where, and why, without running it."""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fastunet import dispatch, modules
from fastunet.checks import BackendError
from fastunet.compiler.backend import default_fallback, find_patterns, replace_patterns
from fastunet.compiler.fx_nodes import arguments, value_of
from fastunet.compiler.patterns import Pattern
from fastunet.inference.cuda_graphs import GraphedModel
from fastunet.inference.frozen import FrozenUNet
from fastunet.inference.quantization import QuantizedConv3x3
from fastunet.ops.registration import Op, call_of
from fastunet.torch_private import FakeTensorMode, TorchDispatchMode, original

# ATen ops worth a line of their own: layers that run beside our ops.
_ATEN_LAYERS = ("convolution", "batch_norm", "max_pool", "upsample", "cat", "pad", "relu")
_OWN_BLOCKS = (modules.DoubleConv, modules.Up, modules.OutConv)


@dataclass(frozen=True)
class Row:
    """One op of one layer, or all that one op could compute: the op or the pattern, its image [N, C, H, W] and dtype,
    what runs it, and why. Of a model not made of fastunet's blocks, also the op that replaces the pattern, or "".
    """

    layer: str
    op: str
    input: str
    implementation: str
    reason: str
    replaced_by: str = ""


@dataclass(frozen=True)
class Explanation:
    """The rows in the order they run; printing it gives a table of at most 100 columns."""

    rows: tuple[Row, ...]

    @property
    def replaced(self) -> int:
        """Return in how many rows an op of fastunet's replaces a pattern."""
        return sum(row.replaced_by != "" for row in self.rows)

    @property
    def left(self) -> int:
        """Return how many rows torch.compile's other backend has."""
        return len(self.rows) - self.replaced

    def __str__(self) -> str:
        """Return a line for each row, and below each reason once; of long names the middle is left out."""
        dtypes = {row.input.rpartition(" ")[2] for row in self.rows}
        is_one = len(dtypes) == 1  # then it stands in the title
        inputs = [row.input.rpartition(" ")[0] if is_one else row.input for row in self.rows]
        notes = [f"replaced by {row.replaced_by}; {row.reason}" if row.replaced_by else row.reason for row in self.rows]
        numbers = {note: str(number) for number, note in enumerate(dict.fromkeys(notes), 1)}
        title = f"input, {dtypes.pop()}" if is_one else "input"
        short = [
            _column(title, [re.sub(r"[\[\]]", "", each).replace(", ", "x") for each in inputs]),
            _column("runs on", [row.implementation for row in self.rows]),
            _column("why", [numbers[note] for note in notes]),
        ]
        layers, ops = _column("layer", [row.layer for row in self.rows]), _column("op", [row.op for row in self.rows])
        left = _WIDTH - sum(len(column[0]) + len(_GAP) for column in short) - len(_GAP)
        layers = _cut(layers, max(_LAYER, left - len(ops[0])))
        columns = [layers, _cut(ops, left - len(layers[0])), *short]
        table = [_GAP.join(line).rstrip() for line in zip(*columns, strict=True)]
        return "\n".join([*table, "", *(_note(number, note) for note, number in numbers.items())])


# Columns of a printed explanation, of which a layer's name has so many where there are too few for all.
_WIDTH, _LAYER, _GAP = 100, 24, "  "


def _column(title: str, cells: list[str]) -> list[str]:
    """Return a title and its cells, all of one length."""
    width = max(map(len, (title, *cells)))
    return [cell.ljust(width) for cell in (title, *cells)]


def _cut(column: list[str], width: int) -> list[str]:
    """Return a column without the middle of long cells, at which place different ones stay different; as it is where
    there is no such place, or no need.
    """
    cells = [cell.rstrip() for cell in column]
    for tail in sorted(range(1, width - 1), key=lambda tail: abs(tail - width * 2 // 3)):
        found = [c if len(c) <= width else f"{c[: width - 1 - tail]}…{c[-tail:]}" for c in cells]
        if len(set(found)) == len(set(cells)):
            return _column(found[0], found[1:])
    return column


def _note(number: str, text: str) -> str:
    indent = len(number) + len(_GAP)
    return textwrap.fill(f"{number}{_GAP}{text}", _WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)


def explain(model: nn.Module, example: Tensor, *, device: torch.device | str | None = None) -> Explanation:
    """Return which implementation each op of model(example) gets under the backend in force, and the reason.

    Of a model of fastunet's own blocks, a row for each op that runs. Of any other, compiled or not, a row for each
    convolution, pooling and upsampling with all that would be computed with it: what
    `torch.compile(model, backend="fastunet")` puts in its place, or why it is left. Of `fastunet.graphed` and
    `fastunet.freeze` the rows of the model within.

    Nothing is computed and nothing changes: the model runs on fake tensors, without data. `device` asks about another
    device than the example's, "cuda" also on a machine that has none. The model's mode is as it stands: in training it
    is asked as for a step with gradients, in eval as for inference. It resets what
    torch.compile has cached: compiled models compile again when they are next called.
    Raises BackendError where the forced backend cannot run an op.
    """
    model = original(model)
    model = model.model if isinstance(model, GraphedModel | FrozenUNet) else model
    target = torch.device(device) if device is not None else example.device
    with torch.set_grad_enabled(model.training):
        if has_own_blocks(model):
            return Explanation(tuple(_recorded(model, example, target).rows))
        rows: list[Row] = []

        def see(graph_module: GraphModule, inputs: list[Any], layers: dict[int, str]) -> None:
            for _, found in find_patterns(graph_module, device=target):
                rows.extend(_row_of(pattern, layers) for pattern in found)

        _compile(model, example, see)
        return Explanation(tuple(rows))


def has_own_blocks(model: nn.Module) -> bool:
    """Return whether a model calls ops of fastunet's itself; any other has them put in by torch.compile."""
    return any(isinstance(module, _OWN_BLOCKS) for module in original(model).modules())


def calls(model: nn.Module, example: Tensor) -> list[tuple[Op, Any]]:
    """Return the ops that model(example) calls, or would if every pattern were replaced, in the order they run, each
    with its arguments, whose tensors are fake. Nothing is computed; as `explain` otherwise.
    """
    model = original(model)
    model = model.model if isinstance(model, GraphedModel | FrozenUNet) else model
    with torch.set_grad_enabled(model.training):
        if has_own_blocks(model):
            return _recorded(model, example, example.device).calls
        recorder = _Recorder({})

        def see(graph_module: GraphModule, inputs: list[Any], layers: dict[int, str]) -> None:
            replace_patterns(graph_module, force=True)
            with recorder:
                graph_module(*inputs)

        _compile(model, example, see)
        return recorder.calls


def _fake(mode: FakeTensorMode, t: Tensor, device: torch.device) -> Tensor:
    with mode:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device, requires_grad=False)


def _recorded(model: nn.Module, example: Tensor, device: torch.device) -> _Recorder:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    state = {name: _fake(mode, t, device) for name, t in (*model.named_parameters(), *model.named_buffers())}
    layers = {id(t): name.rpartition(".")[0] for name, t in state.items()}
    with mode, _Recorder(layers) as recorder, recorder.seeing(model):
        torch.func.functional_call(model, state, (_fake(mode, example, device),))
    return recorder


def _compile(model: nn.Module, example: Tensor, see: Callable[[GraphModule, list[Any], dict[int, str]], None]) -> None:
    """Call `see` with each graph of a copy of the model on fake tensors, its inputs, and names of layers by tensor."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {id(p): nn.Parameter(_fake(mode, p, p.device), p.requires_grad) for p in model.parameters()}
    plain = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    memo |= {id(t): _fake(mode, t, t.device) for t in (*model.buffers(), *plain)}
    copied = copy.deepcopy(model, memo)
    layers = {id(t): name.rpartition(".")[0] for name, t in (*copied.named_parameters(), *copied.named_buffers())}
    failures: list[BackendError] = []

    def backend(graph_module: GraphModule, inputs: Any) -> Callable:
        try:
            see(graph_module, inputs, layers)
        except BackendError as error:  # The compiler would wrap it in one of its own.
            failures.append(error)
        return graph_module.forward

    torch.compiler.reset()
    try:
        with mode:
            torch.compile(copied, backend=backend, dynamic=False)(_fake(mode, example, example.device))
    finally:
        torch.compiler.reset()
    if failures:
        raise failures[0]


def _row_of(pattern: Pattern, layers: dict[int, str]) -> Row:
    weight = arguments(pattern.anchor).get("weight")
    # Within a frame after a graph break the modules' paths are not those from the model on; the weights tell.
    tensor = weight.meta["grapharg"].example if isinstance(weight, Node) and "grapharg" in weight.meta else None
    value = value_of(pattern.anchor)
    layer = layers.get(id(tensor), pattern.layer)
    if not pattern.is_replaced:
        return Row(layer, pattern.description, _typed(value), default_fallback(), pattern.reason)
    assert pattern.op is not None
    assert pattern.runs_on is not None
    return Row(layer, pattern.description, _typed(value), pattern.runs_on, pattern.reason, pattern.op)


def _typed(image: Tensor) -> str:
    return f"{list(image.shape)} {str(image.dtype).removeprefix('torch.')}"


class _Recorder(TorchDispatchMode):
    """Asks dispatch about each registered op as it passes, and records the other layers too.

    A layer goes by the module that holds the op's weight.
    """

    def __init__(self, layers: dict[int, str]) -> None:
        super().__init__()
        self.layers = layers
        self.rows: list[Row] = []
        self.calls: list[tuple[Op, Any]] = []
        self.is_within = False

    @contextmanager
    def seeing(self, model: nn.Module) -> Iterator[None]:
        """Have each quantised layer of the model be one row within the block, whatever it is computed of."""
        names = {module: name for name, module in model.named_modules() if isinstance(module, QuantizedConv3x3)}

        def before(module: QuantizedConv3x3, inputs: tuple[Any, ...]) -> None:
            x, up = (*inputs, None)[:2]
            choice = module.choose(x, up)
            self.rows.append(Row(names[module], "conv3x3 in e4m3", _typed(x), choice.implementation, choice.reason))
            self.is_within = True

        def after(*_: Any) -> None:
            self.is_within = False

        # Hooks on layers of other kinds, or on all modules, would change what they watch.
        hooks = [module.register_forward_pre_hook(before) for module in names]
        hooks += [module.register_forward_hook(after) for module in names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call, name = call_of(func, args), func.overloadpacket.__name__
        if call is not None and not self.is_within:
            self.calls.append(call)
            given = call[1]
            # The fake parameters ask for no gradient, as the model's do where gradients are recorded.
            choice = given.choice(training=torch.is_grad_enabled())
            self._note(getattr(given, "name", name), args, choice)
        elif not self.is_within and any(part in name for part in _ATEN_LAYERS):
            is_of_volumes = any(isinstance(a, Tensor) and a.dim() == 5 for a in args)
            reason = dispatch.VOLUMES if is_of_volumes else "not one of fastunet's ops"
            self._note(name, args, dispatch.Choice("aten", reason))
        return func(*args, **(kwargs or {}))

    def _note(self, op: str, args: Any, choice: dispatch.Choice) -> None:
        x = next((a for a in args if isinstance(a, Tensor)), None)
        if x is not None:
            layer = next((self.layers[id(a)] for a in args if id(a) in self.layers), "")
            self.rows.append(Row(layer, op, _typed(x), choice.implementation, choice.reason))
