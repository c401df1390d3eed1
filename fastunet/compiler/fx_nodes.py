"""Reading the graphs of torch functions that Dynamo records: what a node calls, with which arguments, and what it
changes beside its result.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.overrides import get_testing_overrides

from fastunet import torch_private

# What a node may call: a function, whose name stands for all of its spellings. Methods go by name.
_SPELLINGS: dict[Callable[..., Any], tuple[Any, ...]] = {
    **{getattr(torch, f"conv{dims}d"): () for dims in (1, 2, 3)},
    **{getattr(torch, f"conv_transpose{dims}d"): () for dims in (1, 2, 3)},
    F.max_pool2d: (torch.max_pool2d,),
    F.batch_norm: (),
    F.instance_norm: (),
    F.dropout: (F.dropout1d, F.dropout2d, F.dropout3d),
    F.relu: (torch.relu, torch.relu_, "relu", "relu_"),
    F.leaky_relu: (F.leaky_relu_,),
    F.silu: (),
    torch.prelu: (),
    torch.sigmoid: (F.sigmoid, "sigmoid"),
    F.softmax: (),
    torch.softmax: ("softmax",),
    torch.cat: (torch.concat, torch.concatenate),
    F.interpolate: (),
    F.pad: (torch_private.pad,),
}


def _parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the parameters of a function of torch's with their defaults, but for `out`."""
    signature = inspect.signature(get_testing_overrides()[function])
    return {name: parameter.default for name, parameter in signature.parameters.items() if name != "out"}


# Of each spelling the name and the parameters.
_SIGNATURES: dict[Any, tuple[str, dict[str, Any]]] = {
    spelling: (function.__name__, _parameters(function))
    for function, others in _SPELLINGS.items()
    for spelling in (function, *others)
}
# x += y and its like.
_AUGMENTED = tuple(
    getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "pow", "and", "or", "xor")
)
# Of functions and methods whose result may be a view of what they are called on.
_VIEWS = (
    *("view", "view_as", "reshape", "flatten", "permute", "transpose", "movedim", "squeeze", "unsqueeze", "expand"),
    *("getitem", "narrow", "select", "chunk", "split", "unbind", "contiguous", "to", "detach"),
)
# Calls after which the same functions mean something else.
_MODES = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")


def name_of(node: object) -> str:
    """Return the function a node calls, by one name for all its spellings; "" if it is none of those known here, or
    called with more than the parameters known here (`out`).
    """
    if not isinstance(node, Node) or _key(node) not in _SIGNATURES:
        return ""
    name, parameters = _SIGNATURES[_key(node)]
    return name if all(key in parameters or (name, key) == ("cat", "axis") for key in node.kwargs) else ""


def arguments(node: Node) -> dict[str, Any]:
    """Return all arguments of a node whose `name_of` is known, by parameter, defaults filled in."""
    parameters = _SIGNATURES[_key(node)][1]
    given = dict(zip(parameters, node.args, strict=False)) | node.kwargs
    if "axis" in given:  # torch.cat's other name for it.
        given["dim"] = given.pop("axis")
    return {**parameters, **given}


def _key(node: Node) -> Any:
    return node.target if node.op in ("call_function", "call_method") else None


def value_of(node: object) -> Any:
    """Return the fake tensor (or number) that stands for a node's result, None where Dynamo left none."""
    return node.meta.get("example_value") if isinstance(node, Node) else None


def is_image(node: object) -> bool:
    """Whether a node's result is an ordinary tensor [N, C, H, W] of a real floating dtype."""
    value = value_of(node)
    # What stands for a tensor within a transform of torch.func is no fake tensor itself.
    is_fake = isinstance(value, Tensor) and hasattr(value, "fake_mode")
    return is_fake and value.dim() == 4 and value.is_floating_point()


def only_user(node: Node) -> Node | None:
    """Return the node that alone uses this one's result, in one place."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].all_input_nodes.count(node) == 1 else None


def layer_of(node: Node) -> str:
    """Return the path of the module whose forward called it, from the model: "down1.conv"; "" in the model's own
    forward.
    """
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.partition("].")[2]


class Order:
    """Where the nodes of a graph stand, and what happens between two of them."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._nodes = list(nodes)
        self._index = {node: i for i, node in enumerate(self._nodes)}

    def is_quiet(self, nodes: Iterable[Node]) -> bool:
        """Whether the nodes can be computed in one step at the place of the last: nothing else from the first on
        changes a tensor or a mode, or touches the statistics they move.
        """
        members = set(nodes)
        inside = [self._index[node] for node in members]
        norms = [arguments(n) for n in members if name_of(n) == "batch_norm" and arguments(n)["training"]]
        statistics = {norm[key] for norm in norms for key in ("running_mean", "running_var")}
        return not any(
            has_effect(node) or statistics.intersection(node.all_input_nodes)
            for node in self._nodes[min(inside) : max(inside)]
            if node not in members
        )

    def is_changed(self, image: Node) -> bool:
        """Whether a node after it may change an image in place, as itself or through a view."""
        views = {image}
        for node in self._nodes[self._index[image] + 1 :]:
            inputs = node.all_input_nodes
            if getattr(node.target, "__name__", node.target) in _VIEWS and views.intersection(inputs[:1]):
                views.add(node)
            elif node.op != "output" and has_effect(node):
                is_any = node.op == "call_function" and torch_private.may_mutate(node.target)
                if views.intersection(inputs if is_any or "out" in node.kwargs else inputs[:1]):
                    return True
        return False


def has_effect(node: Node) -> bool:
    """Whether a node may change anything but its own result. What is not known to be pure may."""
    if node.op == "call_method":
        name, value = str(node.target), value_of(node.args[0])
        # num_batches_tracked.add_(1): no op of ours reads it.
        counts = name == "add_" and isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 0
        return (name.endswith("_") or name.startswith("__i")) and not counts
    if node.op != "call_function":
        return node.op not in ("placeholder", "get_attr")
    name = getattr(node.target, "__name__", str(node.target))
    if name_of(node):
        in_place = arguments(node).get("inplace")
    else:  # By position, as far as one can tell.
        in_place = node.kwargs.get("inplace") or any(a is True for a in node.args)
    return (
        name in _MODES
        or name.endswith("_")
        or bool(in_place)
        or node.target in _AUGMENTED
        or node.target is operator.setitem
        or node.kwargs.get("out") is not None
        or torch_private.may_mutate(node.target)
        or not node.users
    )
